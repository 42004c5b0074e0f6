"""Gradients with respect to a latent, under any autograd mode, and the gates that all gradient rules share.

Node graphs run under ``torch.inference_mode()``, where ``torch.enable_grad()`` does nothing and where tensors, even the
parameters of a network that was moved there, are *inference tensors* that autograd refuses. Leaving inference mode for the one
computation, and working on clones, is sufficient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..process import Process, expand
from .knobs import UNLIMITED

log = logging.getLogger("latent_guidance")


def normal_parameters_(module: nn.Module) -> None:
    """Replace every parameter and buffer of ``module`` that is an inference tensor by a normal clone, in place.

    Moving a module inside inference mode makes its parameters inference tensors, which autograd cannot pass through. Does
    nothing where there is none. The parameters' ``requires_grad`` is kept; gradients are taken with respect to x only.
    """
    with torch.inference_mode(False):
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.is_inference():
                    child._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
            for name, buffer in child._buffers.items():
                if buffer is not None and buffer.is_inference():
                    child._buffers[name] = buffer.clone()


def input_gradient(log_prob: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """``grad_x sum(log_prob(x))``, whatever autograd mode the caller is in.

    Args:
        log_prob: maps x (B, ...) to the values to differentiate (B,), one per sample and independent of the other
            samples, and anything (B, ...) that the caller wants back (logits).
        x: (B, ...), any floating dtype; not changed.

    Returns:
        The gradient (B, ...) in x's dtype, and ``log_prob``'s second answer, both detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        values, extra = log_prob(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return gradient.detach(), extra.detach()


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample of x (B, ...), as (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def clip_norm(gradient: Tensor, largest: float) -> Tensor:
    """``gradient`` (B, ...) with each sample's norm at most ``largest``; 1000 clips nothing."""
    if largest >= UNLIMITED:
        return gradient
    norm = sample_norm(gradient)
    factor = torch.where(norm > largest, largest / norm, torch.ones_like(norm))
    return gradient * expand(factor, gradient)


def score_form(process: Process, unit_gradient: Tensor, sigma: Tensor) -> Tensor:
    """What w grad_u log p (B, ...) adds to the denoised estimate: sigma^2 / alpha * grad_x; zero at alpha = 0.

    ``unit_gradient`` is with respect to u = x / sqrt(alpha^2 + sigma^2), so that grad_x = unit_scale * grad_u.
    """
    return process.score_to_denoised_shift(expand(process.unit_scale(sigma), unit_gradient) * unit_gradient, sigma)


def relative_scale(shift: Tensor, x: Tensor, denoised: Tensor, fraction: float) -> Tensor:
    """``shift`` (B, ...) made ``|fraction|`` times as long as x - denoised, per sample; a zero shift stays zero."""
    norm = sample_norm(shift)
    wanted = abs(fraction) * sample_norm(x - denoised)
    factor = torch.where(norm > 0, wanted / norm, torch.zeros_like(norm))
    return shift * expand(factor, shift)


def finite_or_unguided(gradient: Tensor, *, rule: str, index: int | None, sigma: Tensor) -> Tensor:
    """``gradient`` (B, ...) with samples that are not finite set to zero, and a warning that names them.

    A sample whose gradient is NaN or infinite goes unguided for this one step; the other samples are untouched.
    """
    finite = torch.isfinite(gradient).flatten(1).all(dim=1)
    if bool(finite.all()):
        return gradient
    broken = (~finite).nonzero().flatten().tolist()
    step = "" if index is None else f" at step {index + 1}"
    log.warning(
        "%s: the gradient of sample %s is not finite%s (sigma %s); it goes unguided for this step. "
        "A smaller guidance scale or another classifier may help.",
        rule, ", ".join(map(str, broken)), step, ", ".join(f"{value:.4g}" for value in sigma[~finite].tolist()),
    )  # fmt: skip
    return torch.where(expand(finite, gradient), gradient, torch.zeros_like(gradient))
