"""What guidance costs inside a ComfyUI, on a UNet of Stable Diffusion 1.5's size with random weights, as ratios measured in one run.

    PYTHON benchmarks/comfyui_costs.py COMFYUI [--pairs 7] [--latent 64] [--classifier-latent 64] [--cpu]

PYTHON is that ComfyUI's own. Two ratios: the pack's guider with CFG alone against core's CFGGuider on the same MODEL, whole runs of three
steps; and a noisy-latent classifier's forward and input gradient against the UNet call of a step (CFG, batch of two). Each is the
median of paired measurements, taken in turn and first one side first, then the other. On the CPU it is the processor time of this
process that is counted, so that others on the machine matter little; on a GPU it is the clock's. Smaller latents make the network
cheaper and the guider's share larger: what holds at 8 holds at 64. Ends with an error if a ratio is above its target.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
GUIDER_AT_MOST, CLASSIFIER_AT_MOST = 1.02, 0.03

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("comfyui", type=Path, help="the folder of a ComfyUI")
parser.add_argument("--pairs", type=int, default=7, help="measurements of each side")
parser.add_argument("--latent", type=int, default=64, help="side of the latent for the guider; 64 is 512 pixels")
parser.add_argument("--classifier-latent", type=int, default=64, help="side of the latent for the classifier")
parser.add_argument("--channels", type=int, nargs=2, default=(64, 128), help="of the classifier's two levels")
parser.add_argument("--cpu", action="store_true", help="measure on the CPU even if there is a GPU")


def start(comfyui: Path, *, cpu: bool) -> Callable[[str], Any]:
    """Set ComfyUI up as its main.py does, load the pack, and give what finds a module of it by its path."""
    sys.path[0] = str(comfyui)
    sys.argv = ["main.py"] + (["--cpu"] if cpu else [])
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing()
    import comfy.model_management  # type: ignore[import-not-found]

    load = importlib.import_module("nodes").load_custom_node

    if not asyncio.run(load(str(ROOT))):
        sys.exit("ComfyUI could not load the pack")
    return lambda path: importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.{path}")


def stable_diffusion() -> Any:
    """A MODEL of Stable Diffusion 1.5's size, weights random and small enough to stay finite."""
    import comfy.model_management  # type: ignore[import-not-found]
    import comfy.model_patcher  # type: ignore[import-not-found]
    import comfy.supported_models  # type: ignore[import-not-found]
    import torch

    config = comfy.supported_models.SD15(
        dict(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4],
            transformer_depth=[1] * 6 + [0] * 2, transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3,
            context_dim=768, use_linear_in_transformer=False, use_spatial_transformer=True, legacy=False, adm_in_channels=None,
            use_temporal_resblock=False, use_temporal_attention=False,
        )
    )  # fmt: skip
    management = comfy.model_management
    device, kinds = management.get_torch_device(), list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(device=device, model_params=860_000_000, supported_dtypes=kinds)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, kinds))
    model = config.get_model({}, "", device=torch.device("cpu"))
    for parameter in model.diffusion_model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(0.5)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def seconds(action: Callable[[], object], *, gpu: bool) -> float:
    import torch

    if gpu:
        torch.cuda.synchronize()
    clock = time.perf_counter if gpu else time.process_time
    begin = clock()
    action()
    if gpu:
        torch.cuda.synchronize()
    return clock() - begin


def ratio(
    one: Callable[[], object], other: Callable[[], object], *, pairs: int, gpu: bool
) -> tuple[float, float, float]:
    """(median of the paired ratios, median seconds of each side); the sides take turns at going first."""
    one(), other()  # warm up
    found: list[tuple[float, float]] = []
    for pair in range(pairs):
        order = (one, other) if pair % 2 == 0 else (other, one)
        times = [seconds(action, gpu=gpu) for action in order]
        found.append((times[0], times[1]) if pair % 2 == 0 else (times[1], times[0]))
    return (
        statistics.median(a / b for a, b in found),
        statistics.median(a for a, _ in found),
        statistics.median(b for _, b in found),
    )


def main() -> None:
    asked = parser.parse_args()
    part = start(asked.comfyui, cpu=asked.cpu)
    import comfy.model_management  # type: ignore[import-not-found]
    import comfy.sample  # type: ignore[import-not-found]
    import comfy.samplers  # type: ignore[import-not-found]
    import torch

    gpu = comfy.model_management.get_torch_device().type == "cuda"
    rules, guiders = part("latent_guidance.guidance"), part("nodes.runtime.comfy.guider")
    classifiers, process = part("latent_guidance.models.classifier"), part("latent_guidance.process")
    config = classifiers.ClassifierConfig(
        labels=tuple(f"class {i}" for i in range(1000)), latent_space="SD15", latent_channels=4, scaling_factor=0.18215,
        log_snr_range=(-12.0, 12.0), channels=tuple(asked.channels),
    )  # fmt: skip
    classifier = classifiers.Classifier(classifiers.new_classifier(config))
    with torch.inference_mode():
        model = stable_diffusion()
        tokens = torch.randn(2, 1, 77, 768)
        positive, negative = [[tokens[0], {}]], [[tokens[1], {}]]
        latent = torch.zeros(1, 4, asked.latent, asked.latent)
        noise = comfy.sample.prepare_noise(latent, 1)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
        core = comfy.samplers.CFGGuider(model)
        core.set_conds(positive, negative)
        core.set_cfg(4.0)
        ours = guiders.make_guider(model, positive, negative, (rules.CFG(guidance_scale=4.0),))
        euler = comfy.samplers.sampler_object("euler")

        def run(guider: Any) -> Any:
            return guider.sample(noise, latent, euler, sigmas, disable_pbar=True, seed=1)

        assert torch.allclose(run(ours), run(core), rtol=1e-4, atol=1e-4), "the two do not make the same picture"
        median, mine, theirs = ratio(lambda: run(ours), lambda: run(core), pairs=asked.pairs, gpu=gpu)
        side = asked.latent
        print(
            f"CFG by our guider against core's, {side} x {side}: {median:.4f} (at most {GUIDER_AT_MOST}; {mine:.3f} s and {theirs:.3f} s; "
            f"{asked.pairs} pairs)"
        )
        too_much = median > GUIDER_AT_MOST

        side, device = asked.classifier_latent, comfy.model_management.get_torch_device()
        comfy.model_management.load_models_gpu([model])
        classifier.network.to(device)
        rule = rules.ClassifierGuidance(scaling="raw", classifier=classifier, label="class 1", guidance_scale=1.0)
        x, sigma = torch.randn(1, 4, side, side, device=device), torch.tensor([2.0], device=device)
        pair = [torch.cat([value] * 2) for value in (x, sigma)]
        context = tokens.flatten(0, 1).to(device)
        median, mine, theirs = ratio(
            lambda: rule.gradient(process.VE_SCALED, x, sigma, 0),
            lambda: model.model.apply_model(*pair, c_crossattn=context),
            pairs=asked.pairs,
            gpu=gpu,
        )
        count = sum(parameter.numel() for parameter in classifier.network.parameters())
        print(
            f"classifier of {count / 1e6:.2f} M parameters, forward and gradient, against the UNet on two, {side} x {side}: "
            f"{median:.5f} (at most {CLASSIFIER_AT_MOST}; {mine:.3f} s and {theirs:.3f} s)"
        )
        if too_much or median > CLASSIFIER_AT_MOST:
            sys.exit("more than the target")


if __name__ == "__main__":
    main()
