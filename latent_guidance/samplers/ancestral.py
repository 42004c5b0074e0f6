"""Samplers that add fresh noise in every step."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..errors import UserError
from ..noise import NoiseSampler, brownian_noise_sampler
from ..process import Process
from .common import Callback, begin, check_range, denoise, draw, renoise
from .recurrence import ONCE, Recurrence, go_back


@torch.no_grad()
def sample_euler_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    recurrence: Recurrence = ONCE,
) -> Tensor:
    """An Euler step to below the next level, then fresh noise up to it.

    Args:
        eta: in [0, 1]; share of the noise that is fresh, 0 is plain Euler.
        s_noise: standard deviation of the fresh noise; 1 is neutral.
        recurrence: how often each step is taken.

    Reference:
        Song et al., arXiv:2010.02502, eq. 16 with eta = 1, in VE coordinates; the levels between, for eta <
        1, are k-diffusion's (VE-scaled) and ComfyUI's (rectified flow).
    """
    check_range("eta", eta, 0, 1)
    denoiser, sigmas = begin(denoiser, x, sigmas)
    for i, sigma, sigma_next, again in recurrence.visits(denoiser.process, sigmas):
        denoised = denoise(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        sigma_down = _sigma_down(denoiser.process, sigma, sigma_next, eta)
        x = denoised + sigma_down / sigma * (x - denoised)  # Euler, exact at sigma_down = 0
        if sigma_down < sigma_next:
            noise = s_noise * draw(noise_sampler, sigma, sigma_next, x)
            x = renoise(denoiser.process, x, sigma_down, sigma_next, noise)
        if again:
            x = go_back(denoiser.process, x, sigma_next, sigma, noise_sampler)
    return x


def _sigma_down(process: Process, sigma: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """Where a step's Euler part ends: sigma_next at eta = 0, sigma_next**2 / sigma at eta = 1."""
    if math.isinf(process.sigma_limit):
        return sigma_next * (1 - eta**2 * (1 - (sigma_next / sigma) ** 2)).sqrt()
    return sigma_next * (1 - eta * (1 - sigma_next / sigma))


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the reverse SDE, one evaluation a step.

    Without a noise sampler, the noise is one Brownian path for the whole batch, seeded by torch's global
    generator.

    Args:
        eta: >= 0; 0 is the ODE, 1 the reverse SDE.
        s_noise: standard deviation of the noise; 1 is neutral.
        solver_type: "midpoint" or "heun", the form of the second-order term.

    Reference:
        Lu et al., arXiv:2211.01095, appendix B (SDE-DPM-Solver++(2M)); "heun" is the term with phi_2. With
        half the log-SNR lambda = log(alpha / sigma) and h = lambda_next - lambda; exp(-h) is written as
        `decay`, which is 0 for a first step from alpha = 0, where h is infinite.
    """
    check_range("eta", eta, 0, math.inf)
    if solver_type not in ("midpoint", "heun"):
        raise UserError(f"solver_type {solver_type!r}", expected="'midpoint' or 'heun'", mend="correct solver_type")
    denoiser, sigmas = begin(denoiser, x, sigmas)
    noise_sampler = noise_sampler or _brownian(x, sigmas, needed=eta > 0)
    alpha = denoiser.process.alpha
    last_denoised, last_h = None, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        if sigma_next == 0:
            return denoised
        decay = alpha(sigma) / sigma * sigma_next / alpha(sigma_next)
        h = -decay.log()
        gain = 1 - decay ** (1 + eta)
        x = sigma_next / sigma * decay**eta * x + alpha(sigma_next) * gain * denoised
        if last_denoised is not None and last_h is not None:
            second = gain / 2 if solver_type == "midpoint" else 1 - gain / ((1 + eta) * h)
            x = x + alpha(sigma_next) * second * h / last_h * (denoised - last_denoised)
        if eta > 0:
            noise = s_noise * draw(noise_sampler, sigma, sigma_next, x)
            x = x + sigma_next * (1 - decay ** (2 * eta)).sqrt() * noise
        last_denoised, last_h = denoised, h
    return x


def _brownian(x: Tensor, sigmas: Tensor, *, needed: bool) -> NoiseSampler | None:
    positive = sigmas[sigmas > 0]
    if not needed or len(positive) < 2:  # a single step to 0 adds no noise
        return None
    seed = int(torch.randint(0, 2**63 - 1, ()))
    return brownian_noise_sampler(x, float(positive[-1]), float(positive[0]), seed=seed)
