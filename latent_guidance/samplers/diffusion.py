"""DDIM and DDPM, as their papers write them.

Both are defined in VP coordinates, x_vp = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise, which every
process here is brought to by x_vp = x / sqrt(alpha**2 + sigma**2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..errors import UserError
from ..noise import NoiseSampler
from .common import Callback, batched, begin, check_range, denoise, draw
from .recurrence import ONCE, Recurrence, go_back

StepGradient = Callable[[Tensor, Tensor], "Tensor | None"]
"""step_gradient(x, sigma) -> scale * grad_x log p(y | x), or None for no term.

x (B, ...) in the coordinates of the process, not scaled; sigma (B,); the gradient is with respect to that x
and has its
shape."""

VARIANCES = ("beta", "beta_tilde", "learned_range")


@torch.no_grad()
def sample_ddim(
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
    """DDIM.

    Written for x = alpha * x0 + sigma * noise, of which VP coordinates are one case; with eta = 0 it is
    `sample_euler`.

    Args:
        eta: in [0, 1]; 0 is deterministic, 1 has the variance beta-tilde of DDPM.
        recurrence: how often each step is taken.

    Reference:
        Song et al., arXiv:2010.02502, eq. 12 and 16.
    """
    check_range("eta", eta, 0, 1)
    denoiser, sigmas = begin(denoiser, x, sigmas)
    process = denoiser.process
    for i, sigma, sigma_next, again in recurrence.visits(process, sigmas):
        denoised = denoise(denoiser, x, sigma, cond)
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        abar, abar_next = process.alphas_cumprod(sigma), process.alphas_cumprod(sigma_next)
        fresh = eta * sigma_next * ((1 - abar / abar_next) / (1 - abar)).sqrt()
        eps = process.eps(x, denoised, sigma)
        x = process.alpha(sigma_next) * denoised + (sigma_next**2 - fresh**2).clamp(min=0).sqrt() * eps
        if fresh > 0:
            x = x + fresh * draw(noise_sampler, sigma, sigma_next, x)
        if again:
            x = go_back(process, x, sigma_next, sigma, noise_sampler)
    return x


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond = None,
    *,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    variance: str = "beta_tilde",
    mean_shift: StepGradient | None = None,
    mean_shift_at: str = "x_t",
    post_step: StepGradient | None = None,
    recurrence: Recurrence = ONCE,
) -> Tensor:
    """DDPM's ancestral sampling, also respaced, with the places where classifier guidance enters a step.

    A step from alpha_bar to alpha_bar' has beta = 1 - alpha_bar / alpha_bar' and
    beta-tilde = (1 - alpha_bar') / (1 - alpha_bar) * beta. A step to sigma = 0 adds no noise.

    Args:
        variance: Sigma of a step: "beta"; "beta_tilde"; or "learned_range", interpolated between the
            logarithms of the two by the network (the denoiser needs `with_variance`).
        mean_shift: its gradient g joins the mean, mu += Sigma * g, in VP coordinates. With Sigma = beta that
            equals guidance of eps, or of denoised, at sqrt(1 - beta) times the scale; with the other
            variances it is a method of its own.
        mean_shift_at: "x_t" evaluates it at x and sigma, as Algorithm 1 of arXiv:2105.05233 and its code; "mu" at
            the mean and sigma_next, as the derivation there.
        post_step: its gradient, evaluated at the new x and sigma_next, joins the new x, x += g, in VP
            coordinates. Its scale has no fixed relation to any other form's.
        recurrence: how often each step is taken.

    At sigma_next = 0 neither "mu" nor post_step is evaluated: there a classifier of noisy x says nothing.

    Raises:
        UserError: also for a denoiser that predicts no variance with "learned_range".

    Reference:
        Ho et al., arXiv:2006.11239, eq. 7 and algorithm 2; Nichol and Dhariwal, arXiv:2102.09672, eq. 15 and
        section 4 (respacing); Dhariwal and Nichol, arXiv:2105.05233, algorithm 1 (mean shift).
    """
    _check_choice("variance", variance, VARIANCES)
    _check_choice("mean_shift_at", mean_shift_at, ("x_t", "mu"))
    denoiser, sigmas = begin(denoiser, x, sigmas)
    process = denoiser.process
    for i, sigma, sigma_next, again in recurrence.visits(process, sigmas):
        denoised, fraction = _denoise_with_variance(denoiser, x, sigma, cond, learned=variance == "learned_range")
        if callback is not None:
            callback(i, float(sigma), x, denoised)
        abar, abar_next = process.alphas_cumprod(sigma), process.alphas_cumprod(sigma_next)
        alpha_step = abar / abar_next
        beta = 1 - alpha_step
        x_vp = process.unit_scale(sigma) * x
        mean = (abar_next.sqrt() * beta * denoised + alpha_step.sqrt() * (1 - abar_next) * x_vp) / (1 - abar)

        beta_tilde = (1 - abar_next) / (1 - abar) * beta
        if fraction is not None:
            posterior_variance = (fraction * beta.log() + (1 - fraction) * beta_tilde.clamp(min=1e-20).log()).exp()
        else:
            posterior_variance = beta if variance == "beta" else beta_tilde

        scale_next = process.unit_scale(sigma_next)
        if mean_shift is not None and mean_shift_at == "x_t":
            mean = mean + posterior_variance * _vp_gradient(mean_shift, x, sigma, process.unit_scale(sigma))
        elif mean_shift is not None and sigma_next > 0:
            mean = mean + posterior_variance * _vp_gradient(mean_shift, mean / scale_next, sigma_next, scale_next)

        x = mean / scale_next
        if sigma_next > 0:
            noise = draw(noise_sampler, sigma, sigma_next, x)
            x = x + (posterior_variance.sqrt() * noise) / scale_next
            if post_step is not None:
                x = x + _vp_gradient(post_step, x, sigma_next, scale_next) / scale_next
        if again:
            x = go_back(process, x, sigma_next, sigma, noise_sampler)
    return x


def _denoise_with_variance(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, *, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Denoised, and for a learned range the share of log beta in the log variance, in [0, 1]."""
    if not learned:
        return denoise(denoiser, x, sigma, cond), None
    with_variance = getattr(denoiser, "with_variance", None)
    if with_variance is None:
        raise UserError(
            "variance 'learned_range' for a denoiser that predicts no variance",
            expected="a network of 2 x C output channels",
            mend="choose variance 'beta' or 'beta_tilde' in the DDPM sampler",
        )
    denoised, v = with_variance(x, batched(sigma, x), cond)
    return denoised, (v + 1) / 2


def _vp_gradient(step_gradient: StepGradient, x: Tensor, sigma: Tensor, unit_scale: Tensor) -> Tensor:
    """The gradient with respect to x_vp = unit_scale * x; zeros where there is no term.

    Raises:
        UserError: the gradient has another shape than x.
    """
    gradient = step_gradient(x, batched(sigma, x))
    if gradient is None:
        return torch.zeros_like(x)
    if gradient.shape != x.shape:
        raise UserError(
            f"a step gradient of shape {tuple(gradient.shape)} for x of shape {tuple(x.shape)}",
            expected="the same shape",
            mend="return the gradient with respect to x, for every sample of the batch",
        )
    return gradient / unit_scale


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} {value!r}",
            expected=f"one of {', '.join(choices)}",
            mend=f"correct {name} in the DDPM sampler",
        )
