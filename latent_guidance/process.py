r"""The noising process ``x = alpha * x0 + sigma * noise`` and every identity between its quantities.

Two processes cover the models in use; both are described by ``alpha`` as a function of ``sigma`` alone:

* **VE-scaled** (``alpha = 1``, ``sigma`` in (0, inf)): every eps- and v-network, whatever schedule it was trained on,
  after its VP latent has been divided by ``sqrt(alpha_bar)``. This is what k-diffusion and ComfyUI sample in.
* **rectified flow** (``alpha = 1 - sigma``, ``sigma`` in (0, 1]): Stable Diffusion 3, Flux. Sampling starts at exactly
  ``sigma = 1``, where ``alpha = 0`` and ``x`` is pure noise.

Notation: ``denoised`` D is an estimate of E[x0 | x] and the rest follow from it,

    eps      = (x - alpha * D) / sigma                     the noise in x
    velocity = (x - D) / sigma                             d of k-diffusion; for rectified flow the network's own output
    score    = (alpha * D - x) / sigma**2                  grad_x log p(x), Tweedie's formula (arXiv 2011.13456, app. B)
    v        = sqrt(abar) * eps - sqrt(1 - abar) * D       the VP velocity (arXiv 2202.00512, sec. 4)
    flow     = eps - D                                     the flow velocity (arXiv 2209.03003), in either process

with ``abar = alpha**2 / (alpha**2 + sigma**2)`` (alpha-bar of DDPM). *VP coordinates* are ``x / sqrt(alpha**2 + sigma**2)``.

Adding a term ``s * grad_x log p(y | x)`` to the score therefore changes the denoised estimate by

    denoised += s * sigma**2 / alpha * grad_x log p(y | x)

(arXiv 2105.05233, eq. 14, there in eps form). With ``sigma**2`` alone it is wrong wherever ``alpha != 1``.

Shapes: ``x``, ``denoised`` and their kin are (B, ...) with any number of trailing dimensions, ``sigma`` is (B,) or a
scalar tensor. Nothing here divides by ``alpha`` = 0: where ``alpha`` = 0 no information about x0 is in x, and every term
that would be divided by it is zero by definition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .errors import UserError


def expand(values: Tensor, x: Tensor) -> Tensor:
    """Per-sample ``values`` (B,) or () viewed so that they broadcast over ``x`` (B, ...); dtype is kept."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) if values.ndim else values


def _divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)


class Process(ABC):
    """How x0 and noise make x. Stateless: use the instances :data:`VE_SCALED` and :data:`RECTIFIED_FLOW`."""

    name: str
    sigma_limit: float
    """The largest sigma there is: inf, or 1 for rectified flow."""

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """Signal scale at ``sigma`` (same shape), in [0, 1]."""

    @abstractmethod
    def sigma_from_alphas_cumprod(self, alphas_cumprod: Tensor) -> Tensor:
        """The sigma at which ``alpha**2 / (alpha**2 + sigma**2)`` is ``alphas_cumprod`` in [0, 1] (same shape)."""

    def __repr__(self) -> str:
        return self.name

    # --- noise levels -------------------------------------------------------------------------------------------

    def unit_scale(self, sigma: Tensor) -> Tensor:
        """``1 / sqrt(alpha**2 + sigma**2)``: brings x to VP coordinates, unit variance where x0 has it."""
        return (self.alpha(sigma) ** 2 + sigma**2).rsqrt()

    def alphas_cumprod(self, sigma: Tensor) -> Tensor:
        """alpha-bar of the VP process with the same signal-to-noise ratio, in [0, 1]."""
        alpha = self.alpha(sigma)
        return 1 / (1 + (sigma / alpha) ** 2)  # sigma / 0 = inf: alpha-bar is 0 there, exactly

    def log_snr(self, sigma: Tensor) -> Tensor:
        """``log(alpha**2 / sigma**2)``; +inf at sigma = 0 and -inf at alpha = 0."""
        return 2 * (self.alpha(sigma).log() - sigma.log())

    # --- x0 and noise -------------------------------------------------------------------------------------------

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x at noise level ``sigma`` from clean ``x0`` and unit Gaussian ``noise`` (all (B, ...))."""
        return expand(self.alpha(sigma), x0) * x0 + expand(sigma, x0) * noise

    # --- from denoised and back ---------------------------------------------------------------------------------

    def velocity(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """d = (x - denoised) / sigma; dx/dsigma of the probability-flow ODE in both processes."""
        return (x - denoised) / expand(sigma, x)

    def denoised_from_velocity(self, x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        return x - expand(sigma, x) * velocity

    def eps(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The noise that ``denoised`` implies."""
        return (x - expand(self.alpha(sigma), x) * denoised) / expand(sigma, x)

    def denoised_from_eps(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """(x - sigma * eps) / alpha; zero where alpha = 0, since eps says nothing of x0 there."""
        return _divide_or_zero(x - expand(sigma, x) * eps, expand(self.alpha(sigma), x))

    def vp_velocity(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """v = sqrt(abar) * eps - sqrt(1 - abar) * denoised (arXiv 2202.00512)."""
        scale = expand(self.unit_scale(sigma), x)
        alpha = expand(self.alpha(sigma), x)
        return scale * (alpha * self.eps(x, denoised, sigma) - expand(sigma, x) * denoised)

    def denoised_from_vp_velocity(self, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        """sqrt(abar) * x_vp - sqrt(1 - abar) * v; finite at alpha = 0."""
        scale = expand(self.unit_scale(sigma), x)
        return scale * (expand(self.alpha(sigma), x) * scale * x - expand(sigma, x) * v)

    def flow_velocity(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """eps - denoised: what a rectified-flow network of the same estimate would predict; equal to d in rectified flow."""
        return (x - expand(self.alpha(sigma) + sigma, x) * denoised) / expand(sigma, x)

    def denoised_from_flow_velocity(self, x: Tensor, flow_velocity: Tensor, sigma: Tensor) -> Tensor:
        """(x - sigma * flow_velocity) / (alpha + sigma); finite at alpha = 0."""
        return (x - expand(sigma, x) * flow_velocity) / expand(self.alpha(sigma) + sigma, x)

    def score(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p(x) at noise level sigma (Tweedie)."""
        return (expand(self.alpha(sigma), x) * denoised - x) / expand(sigma, x) ** 2

    def denoised_from_score(self, x: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
        """(x + sigma**2 * score) / alpha; zero where alpha = 0."""
        return _divide_or_zero(x + expand(sigma, x) ** 2 * score, expand(self.alpha(sigma), x))

    # --- guidance -----------------------------------------------------------------------------------------------

    def score_to_denoised_shift(self, score: Tensor, sigma: Tensor) -> Tensor:
        """``sigma**2 / alpha * score``: what a term added to the score adds to the denoised estimate; 0 at alpha = 0."""
        return _divide_or_zero(expand(sigma, score) ** 2 * score, expand(self.alpha(sigma), score))

    def step_to_denoised_shift(self, step: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """What moves the denoised estimate so far that an Euler or DDIM (eta = 0) step to ``sigma_next`` ends ``step`` further on.

        In both processes that step is x_next = r x + (1 - r) denoised with r = sigma_next / sigma, so this is step / (1 - r). Rules
        whose papers add something to x_{t-1} go through here. A DDPM or ancestral step (eta = 1) ends 1 + s' / s times as far, with
        s = sigma / alpha before and s' after it (almost twice in a run of many steps; about 1 + eta**2 times at an eta between), and a
        CFG++ step, in which eps does not follow the estimate, alpha_next / (1 - r) times as far.

        Args:
            step: (B, ...), what is to be added to the next x.
            sigma: (B,).
            sigma_next: (B,), below sigma.
        """
        return step / expand(1 - sigma_next / sigma, step)

    def add_score(self, denoised: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
        """The denoised estimate after ``score`` (B, ...), e.g. s * grad_x log p(y | x), joined the model's own score."""
        return denoised + self.score_to_denoised_shift(score, sigma)


class _VEScaled(Process):
    name = "VE-scaled"
    sigma_limit = float("inf")

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def sigma_from_alphas_cumprod(self, alphas_cumprod: Tensor) -> Tensor:
        return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


class _RectifiedFlow(Process):
    name = "rectified flow"
    sigma_limit = 1.0

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def sigma_from_alphas_cumprod(self, alphas_cumprod: Tensor) -> Tensor:
        signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return noise / (signal + noise)


VE_SCALED: Process = _VEScaled()
RECTIFIED_FLOW: Process = _RectifiedFlow()


def process_from_alpha(alpha_at_half: float) -> Process:
    """The process whose signal scale at ``sigma = 0.5`` is ``alpha_at_half``.

    Raises:
        UserError: neither 1 (VE-scaled) nor 0.5 (rectified flow).
    """
    for process in (VE_SCALED, RECTIFIED_FLOW):
        if abs(process.alpha(torch.tensor(0.5)).item() - alpha_at_half) < 1e-3:
            return process
    raise UserError(
        f"a model whose signal scale at sigma = 0.5 is {alpha_at_half:.4g}",
        expected="1 (eps, v and EDM models) or 0.5 (rectified flow: SD3, Flux)",
        mend="use a model of one of these kinds; guidance is not defined for this noising process",
    )
