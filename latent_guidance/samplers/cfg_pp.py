r"""CFG++: the guided estimate is noised again with the *unconditional* model's noise, so that x stays where the model knows it.

    x' = alpha' * D + sigma' * eps_u,      D = D_u + lambda * (D_c - D_u),  eps_u = (x - alpha * D_u) / sigma

where plain guidance would take the noise of D itself. D is what the denoiser gives, guided in whatever way: with the rule CFG its
``guidance_scale`` is the paper's lambda, there from 0 (the unconditional model) to 1; in ComfyUI's ``*_cfg_pp`` samplers it is the
``cfg`` input. One step with lambda is one step of plain CFG with

    w = lambda / (1 - r),      r = (sigma' / alpha') / (sigma / alpha)

(in VE coordinates r = sigma' / sigma): lambda = 0.6 in 20 even steps in log sigma from 14.6 to 0.03, where r = 0.73, is a w of 2.3, and in
40 such steps one of 4.2. A larger number of steps therefore guides more strongly, and no finite w is approached.
What gradient rules add to D counts 1 / (1 - r) times as much as under Euler, since eps_u does not follow it.
The plain conditional model is not among the CFG++ runs (lambda = 1 is not neutral): lambda = 0 is the plain sampler of the
unconditional model, exactly.

Reference: Chung et al., arXiv:2406.08070, algorithm 2 (VP coordinates), and its authors' code for the solvers in VE coordinates. On
rectified flow the paper's appendix noises with the velocity in the place of eps, x' = D + sigma' (x - D_u) / sigma; its authors
have since proposed the eps form, which is this one (their repository, issue 12).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..noise import NoiseSampler
from .common import Callback, begin, check_range, denoise_both, draw
from .recurrence import ONCE, Recurrence, go_back


@torch.no_grad()
def sample_ddim_cfg_pp(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    eta: float = 0.0,
    recurrence: Recurrence = ONCE,
) -> Tensor:
    """DDIM with CFG++. ComfyUI's "euler_cfg_pp" is this at eta = 0, its "euler_ancestral_cfg_pp" at eta = 1.

    Args:
        denoiser: one that offers ``with_uncond`` (see `denoiser.Denoiser`).
        eta: in [0, 1]; 0 is deterministic, 1 has the variance beta-tilde of DDPM (in VE coordinates k-diffusion's ancestral step).
        recurrence: how often each step is taken.

    Raises:
        UserError: also for a denoiser that knows no unconditional estimate.

    Reference:
        Chung et al., arXiv:2406.08070, algorithm 2; Song et al., arXiv:2010.02502, eq. 12 and 16 for eta.
    """
    check_range("eta", eta, 0, 1)
    denoiser, sigmas = begin(denoiser, x, sigmas)
    process = denoiser.process
    for i, sigma, sigma_next, again in recurrence.visits(process, sigmas):
        denoised, uncond_denoised = denoise_both(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        abar, abar_next = process.alphas_cumprod(sigma), process.alphas_cumprod(sigma_next)
        fresh = eta * sigma_next * ((1 - abar / abar_next) / (1 - abar)).sqrt()
        eps = process.eps(x, uncond_denoised, sigma)
        x = process.alpha(sigma_next) * denoised + (sigma_next**2 - fresh**2).clamp(min=0).sqrt() * eps
        if fresh > 0:
            x = x + fresh * draw(noise_sampler, sigma, sigma_next, x)
        if again:
            x = go_back(process, x, sigma_next, sigma, noise_sampler)
    return x


@torch.no_grad()
def sample_dpmpp_2m_cfg_pp(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2M) with CFG++, as its authors' code has it.

    The first and the last step are DDIM's. In the others the multistep term goes from the last *unconditional* estimate to this guided
    one: it is second order for lambda = 0, and a further push along the guidance otherwise. The authors' code is in VE coordinates;
    on rectified flow the same is done to x / alpha, whose noise level is sigma / alpha. (ComfyUI's "dpmpp_2m_cfg_pp" is equal for VE-scaled
    x; on flow models it noises with the velocity, unlike its own "euler_cfg_pp".)

    Args:
        denoiser: one that offers ``with_uncond`` (see `denoiser.Denoiser`).

    Raises:
        UserError: also for a denoiser that knows no unconditional estimate.

    Reference:
        Chung et al., arXiv:2406.08070, and the solver dpm++_2m_cfg++ of their code; Lu et al., arXiv:2211.01095, algorithm 2. h is the step
        in half the log-SNR; exp(-h) is written as `decay`, 0 for a first step from alpha = 0.
    """
    denoiser, sigmas = begin(denoiser, x, sigmas)
    process = denoiser.process
    last_uncond, last_h = None, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond_denoised = denoise_both(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        alpha_next = process.alpha(sigma_next)
        x = alpha_next * denoised + sigma_next * process.eps(x, uncond_denoised, sigma)
        if sigma_next == 0:
            return x
        decay = process.alpha(sigma) / sigma * sigma_next / alpha_next
        h = -decay.log()
        if last_uncond is not None and last_h is not None:
            x = x + alpha_next * (1 - decay) * h / (2 * last_h) * (denoised - last_uncond)
        last_uncond, last_h = uncond_denoised, h
    return x
