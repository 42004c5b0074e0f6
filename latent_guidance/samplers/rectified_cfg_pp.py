r"""Rectified-CFG++: guidance for flow models that steps along the conditional velocity and corrects it half a step ahead.

    x_mid = x + (sigma_mid - sigma) * v_c(x, sigma),      sigma_mid = (sigma + sigma') / 2
    v = v_c(x, sigma) + s(sigma) * (v_c(x_mid, sigma_mid) - v_u(x_mid, sigma_mid)),      s(sigma) = scale * (1 - sigma)**gamma
    x' = x + (sigma' - sigma) * v

Reference: Saini et al., arXiv:2510.07631, algorithm 1 (their lambda_max is our scale, their t our sigma).
Deviations: none from the algorithm. Its authors' pipeline for Stable Diffusion 3 differs from it: there the predictor goes the whole step
and the scale is constant (gamma = 0).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..errors import UserError
from ..noise import NoiseSampler
from .common import Callback, begin, check_range, denoise, denoise_both, draw


@torch.no_grad()
def sample_rectified_cfg_pp(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    scale: float = 3.0,
    gamma: float = 0.0,
    predictor_noise: float = 0.0,
) -> Tensor:
    """Rectified-CFG++ for flow models; an evaluation of the conditional model and one of both a step.

    The denoiser itself is to be the conditional model, that is one whose own guidance_scale is 1: what it guides besides multiplies.

    Args:
        denoiser: one that offers ``with_uncond`` (see `denoiser.Denoiser`).
        scale: the paper's lambda_max, at least 0; comparable to w - 1 of plain CFG. 0 is `sample_euler`, and then costs no more.
        gamma: at least 0; how late in the run the correction grows to its full strength. 0 is a constant one.
        predictor_noise: standard deviation of noise added to the predicted x, the paper's optional epsilon; 0 is none.

    Raises:
        UserError: also for x that is not of a flow model, and for a denoiser that knows no unconditional estimate.

    Reference:
        Saini et al., arXiv:2510.07631, algorithm 1.
    """
    for name, value in (("scale", scale), ("gamma", gamma), ("predictor_noise", predictor_noise)):
        check_range(name, value, 0, math.inf)
    denoiser, sigmas = begin(denoiser, x, sigmas)
    process = denoiser.process
    if math.isinf(process.sigma_limit):
        raise UserError(
            f"Rectified-CFG++ on a model of {process} latents",
            expected="a flow model, such as Stable Diffusion 3 or Flux",
            mend="use a CFG++ sampler (DDIM or DPM++ 2M) for eps- and v-models",
        )
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        velocity = process.velocity(x, denoised, sigma)
        strength = scale * (1 - sigma).clamp(min=0) ** gamma
        if strength > 0:
            sigma_mid = (sigma + sigma_next) / 2
            x_mid = x + (sigma_mid - sigma) * velocity
            if predictor_noise > 0:
                x_mid = x_mid + predictor_noise * draw(noise_sampler, sigma, sigma_mid, x)
            ahead, uncond_ahead = denoise_both(denoiser, x_mid, sigma_mid, cond)
            apart = process.velocity(x_mid, ahead, sigma_mid) - process.velocity(x_mid, uncond_ahead, sigma_mid)
            velocity = velocity + strength * apart
        x = x + (sigma_next - sigma) * velocity
    return x
