"""What every sampler does at its edges: checking its input, calling the denoiser, drawing noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser, for_run
from ..errors import UserError
from ..noise import NoiseSampler
from ..process import Process

Callback = Callable[[int, float, Tensor, Tensor], None]
"""callback(i, sigma, x, denoised), called in every step before x moves on."""

ROUNDING = 1e-5
"""How far a first sigma may pass the limit of its process before it counts as wrong and not as rounded."""


def begin(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> tuple[Denoiser, Tensor]:
    """The denoiser made for this run, and its noise levels as float64 on the CPU.

    Levels in float64 make every coefficient exact whatever the dtype of x, and on the CPU they cost a GPU no
    synchronisation: a 0-dimensional tensor takes part in arithmetic without changing x's dtype or device.

    Raises:
        UserError: sigmas is not one strictly descending row of at least two finite levels that the process
            has.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        shape = tuple(sigmas.shape) if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise UserError(
            f"sigmas of shape {shape}",
            expected="one row of at least two noise levels, (steps + 1,)",
            mend="make them with a scheduler of at least one step",
        )
    levels = sigmas.detach().to("cpu", torch.float64)
    listed = ", ".join(f"{level:g}" for level in levels[:8].tolist()) + (", ..." if len(levels) > 8 else "")
    if not bool(torch.isfinite(levels).all()) or bool((levels < 0).any()):
        raise UserError(
            f"sigmas {listed}",
            expected="finite noise levels, none below 0",
            mend="check the scheduler that made them",
        )
    if not bool((levels.diff() < 0).all()):
        raise UserError(
            f"sigmas {listed}",
            expected="strictly descending noise levels",
            mend="use fewer steps if levels repeat, and do not flip the schedule",
        )
    limit = denoiser.process.sigma_limit
    if float(levels[0]) > limit + ROUNDING:
        raise UserError(
            f"sigmas that start at {float(levels[0]):g} for a model of the {denoiser.process.name} process",
            expected=f"at most {limit:g}",
            mend="make the sigmas with a scheduler that is given this model",
        )
    levels = levels.clamp(max=limit)
    return for_run(denoiser, sigmas), levels


def batched(sigma: Tensor, x: Tensor) -> Tensor:
    """One noise level () as (B,), on x's device and in its dtype or float32, whichever is wider."""
    return torch.full((x.shape[0],), float(sigma), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def denoise(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """The denoised estimate at one noise level ()."""
    return denoiser(x, batched(sigma, x), cond)


def denoise_both(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """The denoised and the unconditional estimate at one noise level ().

    Raises:
        UserError: a denoiser that knows no unconditional estimate.
    """
    with_uncond = getattr(denoiser, "with_uncond", None)
    if with_uncond is None:
        raise UserError(
            "a CFG++ sampler for a denoiser that knows no unconditional estimate",
            expected="a denoiser with a method with_uncond, such as a Guider with uncond=",
            mend="put the model into a Guider and give it the encoding of an empty prompt as uncond",
        )
    return with_uncond(x, batched(sigma, x), cond)


def draw(noise_sampler: NoiseSampler | None, sigma: Tensor, sigma_next: Tensor, x: Tensor) -> Tensor:
    """Unit Gaussian noise of the shape of x.

    Raises:
        UserError: the noise sampler gave another shape.
    """
    if noise_sampler is None:
        return torch.randn_like(x)
    noise = noise_sampler(float(sigma), float(sigma_next)).to(x)
    if noise.shape != x.shape:
        raise UserError(
            f"noise of shape {tuple(noise.shape)} for x of shape {tuple(x.shape)}",
            expected="the same shape",
            mend="make the noise with the latent's batch size, channels, height and width",
        )
    return noise


def renoise(process: Process, x: Tensor, sigma: Tensor, sigma_to: Tensor, noise: Tensor) -> Tensor:
    """x at noise level sigma () brought up to the noisier level sigma_to () with fresh noise.

    The signal is rescaled from alpha to alpha_to, and so much noise is added that the whole has sigma_to. For
    VE-scaled x that is x + sqrt(sigma_to**2 - sigma**2) * noise.
    """
    signal = process.alpha(sigma_to) / process.alpha(sigma)
    added = (sigma_to**2 - (signal * sigma) ** 2).clamp(min=0).sqrt()
    return signal * x + added * noise


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a UserError unless low <= value <= high."""
    if not low <= value <= high:
        raise UserError(
            f"{name} = {value}",
            expected=f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}",
            mend=f"correct {name}",
        )
