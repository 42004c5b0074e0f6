"""Samplers of the probability-flow ODE.

In both processes it is dx/dsigma = (x - denoised) / sigma, so that one loop serves both. Euler and Heun may
also put noise in (`s_churn`), which makes them stochastic.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..noise import NoiseSampler
from ..process import Process
from .common import Callback, begin, check_range, denoise, draw, renoise
from .recurrence import ONCE, Recurrence, go_back


@torch.no_grad()
def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    recurrence: Recurrence = ONCE,
) -> Tensor:
    """Euler steps along the probability-flow ODE; first order, one evaluation a step.

    Args:
        s_churn: how much noise the run puts back, spread over its steps; 0 is none.
        s_tmin: no noise is put back below this sigma.
        s_tmax: nor above this one.
        s_noise: standard deviation of the noise put back; 1 is neutral.
        recurrence: how often each step is taken.

    Reference:
        Karras et al., arXiv:2206.00364, algorithm 2 without its correction.
    """
    denoiser, sigmas = begin(denoiser, x, sigmas)
    for i, sigma, sigma_next, again in recurrence.visits(denoiser.process, sigmas):
        sigma_hat = _churned(denoiser.process, sigma, len(sigmas) - 1, s_churn, s_tmin, s_tmax)
        if sigma_hat > sigma:
            noise = s_noise * draw(noise_sampler, sigma, sigma_hat, x)
            x = renoise(denoiser.process, x, sigma, sigma_hat, noise)
        denoised = denoise(denoiser, x, sigma_hat, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        d = denoiser.process.velocity(x, denoised, sigma_hat)
        x = x + (sigma_next - sigma_hat) * d
        if again:
            x = go_back(denoiser.process, x, sigma_next, sigma, noise_sampler)
    return x


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    recurrence: Recurrence = ONCE,
) -> Tensor:
    """Heun's method along the probability-flow ODE; second order, two evaluations a step (one to sigma 0).

    Args:
        s_churn, s_tmin, s_tmax, s_noise, recurrence: as in `sample_euler`.

    Reference:
        Karras et al., arXiv:2206.00364, algorithm 2.
    """
    denoiser, sigmas = begin(denoiser, x, sigmas)
    for i, sigma, sigma_next, again in recurrence.visits(denoiser.process, sigmas):
        sigma_hat = _churned(denoiser.process, sigma, len(sigmas) - 1, s_churn, s_tmin, s_tmax)
        if sigma_hat > sigma:
            noise = s_noise * draw(noise_sampler, sigma, sigma_hat, x)
            x = renoise(denoiser.process, x, sigma, sigma_hat, noise)
        denoised = denoise(denoiser, x, sigma_hat, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        d = denoiser.process.velocity(x, denoised, sigma_hat)
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            denoised_next = denoise(denoiser, x_next, sigma_next, cond)
            d_next = denoiser.process.velocity(x_next, denoised_next, sigma_next)
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = x_next
        if again:
            x = go_back(denoiser.process, x, sigma_next, sigma, noise_sampler)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one evaluation a step.

    With t = -log(sigma) the ODE is dx/dt = denoised - x in both processes. Its linear part is solved exactly,
    and denoised is continued on the straight line through this step's value and the last one's. For VE-scaled
    x, t is the paper's lambda; for rectified flow lambda would be infinite where a run begins, and t is what
    ComfyUI uses too.

    Reference:
        Lu et al., arXiv:2211.01095, algorithm 2.
    """
    denoiser, sigmas = begin(denoiser, x, sigmas)
    last_denoised, last_h = None, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        h = (sigma / sigma_next).log()
        midway = denoised
        if last_denoised is not None and last_h is not None and sigma_next > 0:
            midway = denoised + h / (2 * last_h) * (denoised - last_denoised)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * midway
        last_denoised, last_h = denoised, h
    return x


def _churned(process: Process, sigma: Tensor, steps: int, s_churn: float, s_tmin: float, s_tmax: float) -> Tensor:
    """The noise level to go back up to before a step; sigma itself where alpha = 0: none is noisier."""
    check_range("s_churn", s_churn, 0, math.inf)
    if not s_tmin <= sigma <= s_tmax:
        return sigma
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    return (sigma * (1 + gamma)).clamp(max=process.sigma_limit)
