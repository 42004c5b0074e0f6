"""Runs inside ComfyUI (see inside.py): a MODEL and a classifier known in closed form, in each of ComfyUI's samplings.

At scale 1 an unconditional model with the exact gradient of the class posterior is the exact conditional model.
"""

# ruff: noqa: ANN001, ANN003, ANN201, ANN202
from types import SimpleNamespace

import comfy.model_base
import comfy.model_patcher
import stage
import torch
from inside import part, result

loader, analytic = part("nodes.runtime.comfy.model"), part("latent_guidance.analytic")
guiders, processes = part("nodes.runtime.comfy.guider"), part("latent_guidance.process")
generator = torch.Generator().manual_seed(0)
SIDE, KINDS, LABELS = 2, 3, ("cat", "dog", "bird")
SIZE = 4 * SIDE * SIDE


def mixture(process):
    with torch.inference_mode(False):  # its tensors take part in gradients
        means = torch.randn(KINDS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        covs = torch.stack([torch.eye(SIZE, dtype=torch.float64) * (0.2 + 0.2 * kind) for kind in range(KINDS)])
        return analytic.GaussianMixture(process, torch.ones(KINDS), means, covs)


class Posterior:
    """The exact p(class | x) as a noisy-latent classifier."""

    network = None
    config = SimpleNamespace(
        labels=LABELS, head="classes", latent_channels=4, scaling_factor=1.0, shift_factor=0.0, log_snr_range=(-20.0, 20.0),
        latent_space="mixture",
    )  # fmt: skip
    exact = mixture(processes.VE_SCALED)

    def logits(self, u, log_snr):
        sigma = (-0.5 * log_snr).exp()
        return self.exact.class_log_probs(u * (1 + sigma**2).sqrt()[:, None, None, None], sigma)


class Exact(torch.nn.Module):
    """The network whose estimate, as ComfyUI reads its output, is the mixture's."""

    dtype = torch.float32
    sigma = None

    def forward(self, x_in, timesteps, context=None, **_):
        sampling, sigma = self.sampling, self.sigma
        ones = torch.ones_like(x_in)
        x = x_in / sampling.calculate_input(sigma, ones)
        at_0, at_1 = (sampling.calculate_denoised(sigma, value, x) for value in (0 * ones, ones))
        return (self.mixture(x, sigma) - at_0) / (at_1 - at_0)


def exact_model(kind):
    """A MODEL of ComfyUI's model type ``kind`` around an exact network."""
    network = Exact()
    settings = loader._model_config(
        loader.LatentSpace(4, 1.0, lambda: None, "mixture"), {}, {"disable_unet_model_creation": True, "in_channels": 4}, 1
    )  # fmt: skip
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(settings, model_type=comfy.model_base.ModelType[kind], device="cpu")
    model.diffusion_model, network.sampling = network, model.model_sampling
    network.mixture = mixture(guiders.process_of(model.model_sampling))
    made = comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))

    def tell(apply_model, args):
        network.sigma = args["timestep"].reshape(-1, 1, 1, 1)[:, 0, 0, 0]
        return apply_model(args["input"], args["timestep"], **args["c"])

    made.set_model_unet_function_wrapper(tell)
    return made


result["errors"] = {}
for kind in ("EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "FLOW", "FLUX"):
    model = exact_model(kind)
    here = stage.Stage(model, [[torch.zeros(1, 1, 4), {}]], None, torch.zeros(3, 4, SIDE, SIDE))
    process = guiders.process_of(model.get_model_object("model_sampling"))
    exact = mixture(process)
    for level in (0.9, 0.4) if process is processes.RECTIFIED_FLOW else (5.0, 0.5):
        sigma = torch.full((3,), level)
        alpha = float(process.alpha(sigma)[0])
        x = exact.marginal_sample(3, level, generator=generator).reshape(3, 4, SIDE, SIDE).float()
        plain = here.estimate((), x, level)
        guided = here.estimate(stage.rule(Posterior(), scale=1.0, scaling="raw"), x, level)
        wanted = exact(x, sigma, torch.zeros(3, dtype=torch.int64))
        spread = float(wanted.std())
        forms = {"ours": guided, "naive": plain + alpha * (guided - plain), "unguided": plain}
        result["errors"][f"{kind}, {level}"] = {
            name: float((form - wanted).abs().max()) / spread for name, form in forms.items()
        }
