"""Samplers: flat loops from noise to a picture, one function per algorithm.

    sample_*(denoiser, x, sigmas, cond=None, *, callback=None, noise_sampler=None, ...) -> x

Arguments common to all of them:

* `denoiser`: see `denoiser.Denoiser`. Its `process` says what x is; every sampler serves VE-scaled x and
  rectified flow.
* `x`: (B, ...), noised to sigmas[0] in the coordinates of the process; float32 or float64. It is not
  modified.
* `sigmas`: (N + 1,), strictly descending, in most runs to 0; N steps. For rectified flow at most 1.
* `cond`: handed to the denoiser.
* `callback(i, sigma, x, denoised)`: called in every step i with its noise level (float), x and the denoised
  estimate before x moves on; it may raise to interrupt the run. A step that is taken again (`recurrence`)
  is reported again, with the same i.
* `noise_sampler(sigma, sigma_next) -> noise`: unit Gaussian noise of the shape of x (see `noise`); without
  one, torch's global generator is used. Deterministic samplers never call it.

Samplers of one step's memory take `recurrence` besides (see `recurrence`). CFG++ samplers (`GO_BY_UNCOND`)
need a denoiser that offers `with_uncond`.

They return x at sigmas[-1], like the x given, and raise UserError for sigmas, options or noise that do not
fit. Nothing divides by alpha = 0 (the first step of rectified flow) or by sigma = 0 (after the last step).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .ancestral import sample_dpmpp_2m_sde, sample_euler_ancestral
from .cfg_pp import sample_ddim_cfg_pp, sample_dpmpp_2m_cfg_pp
from .common import Callback
from .diffusion import StepGradient, sample_ddim, sample_ddpm
from .ode import sample_dpmpp_2m, sample_euler, sample_heun
from .rectified_cfg_pp import sample_rectified_cfg_pp
from .recurrence import Recurrence

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "ddim_cfg_pp": sample_ddim_cfg_pp,
    "dpmpp_2m_cfg_pp": sample_dpmpp_2m_cfg_pp,
    "rectified_cfg_pp": sample_rectified_cfg_pp,
}
"""The samplers by name. "ddim" and "ddpm" are the papers': what ComfyUI's KSampler calls "ddim" is Euler."""

CFG_PP: frozenset[Callable[..., Tensor]] = frozenset((sample_ddim_cfg_pp, sample_dpmpp_2m_cfg_pp))
"""Samplers under which the guidance scale is CFG++'s lambda: 0 is no guidance, and 1 all of it."""

GO_BY_UNCOND: frozenset[Callable[..., Tensor]] = CFG_PP | {sample_rectified_cfg_pp}
"""Samplers that need the unconditional estimate beside the guided one, whatever the guidance scale."""

__all__ = [
    "CFG_PP",
    "GO_BY_UNCOND",
    "SAMPLERS",
    "Callback",
    "Recurrence",
    "StepGradient",
    "sample_ddim",
    "sample_ddim_cfg_pp",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_rectified_cfg_pp",
]
