"""KSampler, and the nodes it is made of when taken apart: noise, guiders, samplers, sigmas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ...schedules import Schedule
    from ..objects import Conditioning, GuiderNode, Model, Noise, Sampler

MAX_SEED = 0xFFFFFFFFFFFFFFFF
SCHEDULERS = ("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "normal")

# ComfyUI's name -> the library's function, its options, and where the noise of its steps comes from.
# ComfyUI's "ddim" is Euler's method (DDIM with eta 0 in these coordinates), its "ddpm" has the variance beta-tilde.
_SAMPLERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "euler": ("sample_euler", {}, None),
    "euler_ancestral": ("sample_euler_ancestral", {}, "batch"),
    "heun": ("sample_heun", {}, None),
    "dpmpp_2m": ("sample_dpmpp_2m", {}, None),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}, "brownian"),
    "ddpm": ("sample_ddpm", {"variance": "beta_tilde"}, "batch"),
    "ddim": ("sample_euler", {}, None),
    "euler_cfg_pp": ("sample_ddim_cfg_pp", {}, None),
    "euler_ancestral_cfg_pp": ("sample_ddim_cfg_pp", {"eta": 1.0}, "batch"),
    "dpmpp_2m_cfg_pp": ("sample_dpmpp_2m_cfg_pp", {}, None),
}
# What ComfyUI does on flow models that is not done here, and what to use instead.
_NOT_ON_FLOW = {
    "ddpm": (
        "takes the step of another process",
        "the node DDPM Sampler of this pack, which is right for both, or 'euler'",
    ),
    "dpmpp_2m_cfg_pp": (
        "noises with the velocity, unlike its own 'euler_cfg_pp'",
        "the node DPM++ 2M CFG++ Sampler of this pack, which is right for both, or 'euler_cfg_pp'",
    ),
}
SAMPLERS = tuple(_SAMPLERS)


def stock_sampler(name: str) -> Sampler:
    """The SAMPLER that ComfyUI calls ``name``."""
    from ... import samplers
    from ..objects import Sampler

    function, options, noise = _SAMPLERS[name]
    levels = _off_pure_noise if noise == "brownian" else None
    if name in _NOT_ON_FLOW:
        levels = partial(_not_on_flow, name)
    sources: dict[str, Callable[..., Any]] = {"batch": _batch_noise, "brownian": _brownian_noise}
    return Sampler(
        getattr(samplers, function),
        options,
        noise=None if noise is None else sources[noise],
        levels=levels,
    )


def _off_pure_noise(sigmas: Tensor, schedule: Schedule) -> Tensor:
    """ComfyUI starts its SDE samplers just below pure noise on flow models."""
    from ...schedules import FlowSchedule
    from ...step_grids import off_pure_noise

    return off_pure_noise(sigmas, schedule) if isinstance(schedule, FlowSchedule) else sigmas


def _not_on_flow(name: str, sigmas: Tensor, schedule: Schedule) -> Tensor:
    from ...schedules import FlowSchedule

    if isinstance(schedule, FlowSchedule):
        what, instead = _NOT_ON_FLOW[name]
        raise UserError(
            f"the stock sampler {name!r} on a flow model, where ComfyUI {what}",
            expected="an eps- or v-model, or another sampler",
            mend=f"use {instead}",
        )
    return sigmas


def _batch_noise(x: Tensor, sigmas: Tensor, noise: Noise) -> Callable[[Any, Any], Tensor]:
    """One generator for the batch, seeded with seed + 1, so that it does not repeat the initial noise (as ComfyUI 0.33 does)."""
    import torch

    generator = torch.Generator().manual_seed((noise.seed + 1) % 2**64)

    def noise_sampler(sigma: Any, sigma_next: Any) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    return noise_sampler


def _brownian_noise(x: Tensor, sigmas: Tensor, noise: Noise) -> Callable[[Any, Any], Tensor]:
    from ...noise import brownian_noise_sampler

    low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
    if low == high:  # a single step, which goes to 0 and draws no noise
        return _batch_noise(x, sigmas, noise)
    path = brownian_noise_sampler(x, low, high, seed=noise.seed)

    def noise_sampler(sigma: Any, sigma_next: Any) -> Tensor:
        with warnings.catch_warnings():  # torchsde warns of the last digit of the path's own end
            warnings.filterwarnings("ignore", message="Should have", category=UserWarning)
            return path(sigma, sigma_next)

    return noise_sampler


def sigma_grid(model: Model, scheduler: str, steps: int, denoise: float) -> Tensor:
    """The noise levels of a KSampler's run; with denoise < 1 the last part of a longer one, empty for denoise 0.

    (steps + 1,); "ddim_uniform" at denoise 1 may hold more.
    """
    import torch

    from ...step_grids import step_grid

    if denoise <= 0:
        return torch.zeros(0)
    return step_grid(model.schedule, scheduler, steps, denoise=denoise)


def _steps(maximum: int = 10000) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": 20, "min": 1, "max": maximum, "tooltip": "Number of steps; more is slower and finer."})


def _denoise() -> tuple[str, dict[str, Any]]:
    tooltip = "How much of the noise range is run through; below 1 keeps some of the latent given. Neutral: 0 (nothing changes)."
    return ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip})


def _cfg() -> tuple[str, dict[str, Any]]:
    tooltip = "Classifier-free guidance scale. Neutral: 1 (the negative prompt is not used)."
    return ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01, "tooltip": tooltip})


def _seed() -> tuple[str, dict[str, Any]]:
    return (
        "INT",
        {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True, "tooltip": "Seed of the noise."},
    )


class KSampler:
    """Samples a latent with classifier-free guidance."""

    RETURN_TYPES: ClassVar = ("LATENT",)
    FUNCTION: ClassVar = "sample"
    CATEGORY: ClassVar = "sampling"
    DESCRIPTION: ClassVar = "Denoises a latent with a model and a prompt."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model."}),
                "seed": _seed(),
                "steps": _steps(),
                "cfg": _cfg(),
                "sampler_name": (list(SAMPLERS), {"tooltip": "The sampling algorithm."}),
                "scheduler": (list(SCHEDULERS), {"tooltip": "How the noise levels are spaced."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture should show."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show; the empty prompt if nothing."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to start from."}),
                "denoise": _denoise(),
            }
        }

    def sample(
        self,
        model: Model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: dict[str, Any],
        denoise: float = 1.0,
    ) -> tuple[dict[str, Any]]:
        from ..objects import GuiderNode, Noise
        from ..sampling import sample

        whole = 1.0 if denoise > 0.9999 else denoise
        sigmas = sigma_grid(model, scheduler, steps, whole)
        guider = GuiderNode(model, positive, negative, cfg=cfg)
        samples, _ = sample(Noise(seed), guider, stock_sampler(sampler_name), sigmas, latent_image)
        return ({**latent_image, "samples": samples},)


class BasicScheduler:
    """The noise levels of a run."""

    RETURN_TYPES: ClassVar = ("SIGMAS",)
    FUNCTION: ClassVar = "get_sigmas"
    CATEGORY: ClassVar = "sampling/custom_sampling/schedulers"
    DESCRIPTION: ClassVar = "The noise levels that a run goes through."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model whose noise range it is."}),
                "scheduler": (list(SCHEDULERS), {"tooltip": "How the noise levels are spaced."}),
                "steps": _steps(),
                "denoise": _denoise(),
            }
        }

    def get_sigmas(self, model: Model, scheduler: str, steps: int, denoise: float) -> tuple[Tensor]:
        """The last steps + 1 levels, also where the grid holds more of them; a KSampler keeps those at denoise 1."""
        return (sigma_grid(model, scheduler, steps, denoise)[-(steps + 1) :],)


class KSamplerSelect:
    """A sampling algorithm by ComfyUI's name."""

    RETURN_TYPES: ClassVar = ("SAMPLER",)
    FUNCTION: ClassVar = "get_sampler"
    CATEGORY: ClassVar = "sampling/custom_sampling/samplers"
    DESCRIPTION: ClassVar = "A sampling algorithm."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sampler_name": (list(SAMPLERS), {"tooltip": "The sampling algorithm."})}}

    def get_sampler(self, sampler_name: str) -> tuple[Sampler]:
        return (stock_sampler(sampler_name),)


class RandomNoise:
    """Noise from one seed for the whole batch."""

    RETURN_TYPES: ClassVar = ("NOISE",)
    FUNCTION: ClassVar = "get_noise"
    CATEGORY: ClassVar = "sampling/custom_sampling/noise"
    DESCRIPTION: ClassVar = "Noise from one seed."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"noise_seed": _seed()}}

    def get_noise(self, noise_seed: int) -> tuple[Noise]:
        from ..objects import Noise

        return (Noise(noise_seed),)


class BasicGuider:
    """The model with one condition, unguided but for rules patched onto the model."""

    RETURN_TYPES: ClassVar = ("GUIDER",)
    FUNCTION: ClassVar = "get_guider"
    CATEGORY: ClassVar = "sampling/custom_sampling/guiders"
    DESCRIPTION: ClassVar = "Follows the conditioning as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model."}),
                "conditioning": ("CONDITIONING", {"tooltip": "What the picture should show."}),
            }
        }

    def get_guider(self, model: Model, conditioning: Conditioning) -> tuple[GuiderNode]:
        from ..objects import GuiderNode

        return (GuiderNode(model, conditioning),)


class CFGGuider:
    """The model with classifier-free guidance."""

    RETURN_TYPES: ClassVar = ("GUIDER",)
    FUNCTION: ClassVar = "get_guider"
    CATEGORY: ClassVar = "sampling/custom_sampling/guiders"
    DESCRIPTION: ClassVar = "Classifier-free guidance."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture should show."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show; the empty prompt if nothing."}),
                "cfg": _cfg(),
            }
        }

    def get_guider(self, model: Model, positive: Conditioning, negative: Conditioning, cfg: float) -> tuple[GuiderNode]:
        from ..objects import GuiderNode

        return (GuiderNode(model, positive, negative, cfg=cfg),)


class SamplerCustomAdvanced:
    """Samples with a noise, a guider, a sampler and noise levels."""

    RETURN_TYPES: ClassVar = ("LATENT", "LATENT")
    RETURN_NAMES: ClassVar = ("output", "denoised_output")
    FUNCTION: ClassVar = "sample"
    CATEGORY: ClassVar = "sampling/custom_sampling"
    DESCRIPTION: ClassVar = "Samples with noise, guider, sampler and noise levels of your choice."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "noise": ("NOISE", {"tooltip": "The noise."}),
                "guider": ("GUIDER", {"tooltip": "The model and how it is guided."}),
                "sampler": ("SAMPLER", {"tooltip": "The sampling algorithm."}),
                "sigmas": ("SIGMAS", {"tooltip": "The noise levels."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to start from."}),
            }
        }

    def sample(
        self, noise: Noise, guider: GuiderNode, sampler: Sampler, sigmas: Tensor, latent_image: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from ..sampling import sample

        if sigmas.ndim != 1:
            raise UserError(
                f"sigmas of shape {tuple(sigmas.shape)}", expected="a list of noise levels", mend="use BasicScheduler"
            )
        samples, denoised = sample(noise, guider, sampler, sigmas, latent_image)
        return {**latent_image, "samples": samples}, {**latent_image, "samples": denoised}
