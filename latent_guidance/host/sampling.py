"""From a NOISE, a GUIDER, a SAMPLER and SIGMAS to a LATENT, with ComfyUI's conventions.

x starts as alpha * latent + sigma * noise; a VE-scaled run that starts at the top of the schedule uses sqrt(1 + sigma^2) * noise instead,
so that the VP latent that the network sees has exactly unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..guidance import check_by_uncond
from ..guidance.record import Record
from ..guidance.report import REPORTS
from ..guidance.steps import check_not_twice
from ..samplers import CFG_PP, GO_BY_UNCOND
from . import memory
from .branches import RunDenoiser
from .context import current
from .objects import GuiderNode, LatentSpace, Noise, Sampler


def fit_latent(samples: Tensor, space: LatentSpace) -> Tensor:
    """``samples`` (B, C, h, w) with the model's number of channels; an empty latent of another number is remade.

    Raises:
        UserError: a latent with content, made for other latents.
    """
    if samples.ndim != 4:
        raise UserError(
            f"a latent of shape {tuple(samples.shape)}",
            expected="(batch, channels, height, width)",
            mend="use a latent of pictures",
        )
    if samples.shape[1] == space.channels:
        return samples
    if torch.count_nonzero(samples):
        raise UserError(
            f"a latent of {samples.shape[1]} channels for a model of {space.channels}",
            expected=f"a latent of {space.channels} channels, from {space.name}'s VAE",
            mend="encode the picture with the VAE of the same checkpoint",
        )
    return samples.new_zeros(samples.shape[0], space.channels, *samples.shape[2:])


def starts_at_top(sigmas: Tensor, sigma_max: float) -> bool:
    """Whether a run over ``sigmas`` (N + 1,) starts at (or above) the noisiest level of the schedule."""
    first = float(sigmas[0])
    return math.isclose(sigma_max, first, rel_tol=1e-5) or first > sigma_max


def sample(
    noise: Noise | None, guider: GuiderNode, sampler: Sampler, sigmas: Tensor, latent: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Runs ``sampler``.

    Args:
        noise: None adds none.
        guider: the model with its conditions and rules.
        sampler: the algorithm.
        sigmas: (N + 1,), descending; empty means nothing is done.
        latent: the LATENT to start from; zeros are an empty one.

    Returns:
        The sampled and the last denoised latents, unscaled, fp32, on the CPU.

    Raises:
        UserError: latents of another kind, rules that cannot act together, or a result that is not finite.
    """
    model = guider.model
    if latent.get("noise_mask") is not None:
        raise UserError(
            "a latent with a noise mask", expected="a latent without one", mend="run inpainting workflows in ComfyUI"
        )
    start = fit_latent(latent["samples"].float(), model.latent_space)
    if len(sigmas) == 0:
        return start, start
    check_not_twice(guider.chain, sampler.step_rules)
    for rule in sampler.step_rules:
        rule.check_latents(model.latent_space.latents)
        rule.check_shape(tuple(start.shape))
    factor = model.latent_space.scaling_factor
    clean = (start * factor).to(model.device)
    drawn = torch.zeros_like(start) if noise is None else noise.generate({"samples": start})
    sigmas = sigmas.to(model.device, torch.float32)
    if sampler.function in CFG_PP:
        check_by_uncond(guider.chain)
    denoiser = RunDenoiser(guider, sigmas, by_uncond=sampler.function in GO_BY_UNCOND)
    process = denoiser.process
    for network in denoiser.networks:  # one after the other
        tokens, width = network.tokens
        memory.check_sampling(
            network.seen(tuple(start.shape)),
            network.passes,
            network.model.widest,
            model.device,
            tokens=tokens,
            width=width,
        )

    first = sigmas[0]
    scale = first
    if math.isinf(process.sigma_limit) and starts_at_top(sigmas, float(model.schedule.sigma_max)):
        scale = (1 + first**2).sqrt()
    x = process.alpha(first) * clean + scale * drawn.to(model.device)

    options = dict(sampler.options)
    in_steps = Record("sampler") if sampler.step_rules and denoiser.run.record is not None else None
    if sampler.step_options is not None:
        options.update(sampler.step_options(process, sigmas, in_steps))
    if sampler.noise is not None:
        options["noise_sampler"] = sampler.noise(x, sigmas, noise or Noise(0))
    levels = sigmas if sampler.levels is None else sampler.levels(sigmas, model.schedule)
    last: list[Tensor] = []
    bar, done = current().progress.steps(len(sigmas) - 1), 0

    def callback(index: int, sigma: Any, x: Tensor, denoised: Tensor) -> None:
        nonlocal done
        last[:] = [denoised]
        bar.update(index + 1 - done)  # nothing for a step that is taken again
        done = index + 1

    try:
        x = sampler.function(denoiser, x, levels, callback=callback, **options)
    finally:
        bar.close()
    alpha = process.alpha(sigmas[-1])
    out = x / alpha if bool(alpha > 0) else x
    result = (out / factor).float().cpu()
    if not bool(torch.isfinite(result).all()):
        bad = [i for i, item in enumerate(result) if not bool(torch.isfinite(item).all())]
        raise UserError(
            f"sampling gave numbers that are not finite (items {bad} of the batch)",
            expected="finite latents",
            mend="lower the guidance scales, or use another sampler or more steps",
        )
    if denoiser.run.record is not None:
        REPORTS.keep(result, denoiser.run.record)
    if in_steps is not None:
        REPORTS.keep(result, in_steps)
    return result, (last[0] / factor).float().cpu() if last else result
