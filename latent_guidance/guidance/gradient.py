"""Gradients with respect to a latent, under any autograd mode, and the gates that all gradient rules share.

Node graphs run under ``torch.inference_mode()``, where ``torch.enable_grad()`` does nothing and where tensors, even the
parameters of a network that was moved there, are *inference tensors* that autograd refuses. Leaving inference mode for the one
computation, and working on clones, is sufficient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
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


def normal_model_(denoiser: Any) -> None:
    """:func:`normal_parameters_` of the network behind a denoiser (a NetworkDenoiser, or one that wraps a module), if it has one."""
    for _ in range(3):
        if isinstance(denoiser, nn.Module):
            normal_parameters_(denoiser)
            return
        denoiser = getattr(denoiser, "network", getattr(denoiser, "unet", None))


def normal(value: Any) -> Any:
    """``value`` with every inference tensor in it cloned, outside inference mode; inside it, as it is.

    Autograd does not save inference tensors for a backward pass. Mappings, lists and tuples are rebuilt.
    """
    if torch.is_inference_mode_enabled():
        return value
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {key: normal(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return same_kind(value, [normal(entry) for entry in value])
    return value


def same_kind(like: Any, entries: list[Any]) -> Any:
    """``entries`` as a list, tuple or named tuple: whichever ``like`` is."""
    return type(like)(*entries) if hasattr(like, "_fields") else type(like)(entries)


class ChangedInPlace(UserError):
    """The network has changed something in place that autograd has kept for its backward pass."""


SIGNS = ("nference tensor", "inplace operation", "not require grad", "grad_fn", "derivative for", "a second time")
"""Of what autograd says when something cannot be differentiated."""


@contextmanager
def named_autograd(what: str, *, mend: str, backward: bool = False, network: bool = False) -> Iterator[None]:
    """In this context what autograd cannot do is said by name, as a UserError.

    Args:
        what: what cannot be differentiated, and for whom.
        mend: what mends it.
        backward: this is a backward pass, in which whatever fails is autograd's, save for want of memory (a host knows what to do then).
        network: it is the denoiser's network that is passed through; what it changes in place is a ChangedInPlace.
    """
    try:
        yield
    except RuntimeError as error:
        said, kind = str(error), UserError
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said.lower():
            raise
        if "inplace operation" in said:
            kind = ChangedInPlace if network else UserError
            what += (
                ", whose activations are changed in place" if network else ", in which something is changed in place"
            )
        elif not backward and not any(sign in said for sign in SIGNS):
            raise
        first = said.strip().splitlines()[0] if said.strip() else type(error).__name__
        raise kind(
            f"{what}: {first}",
            expected="operations that autograd can pass through, on tensors that it may keep",
            mend=mend,
        ) from error


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


def finite_or_unguided(gradient: Tensor, *, rule: str, index: int | None, sigma: Tensor, loss: str = "") -> Tensor:
    """``gradient`` (B, ...) with samples that are not finite set to zero, and a warning that names them.

    A sample whose gradient is NaN or infinite goes unguided for this one step; the other samples are untouched.

    Args:
        gradient: (B, ...).
        rule: its name, for the warning.
        index: of the step, if known.
        sigma: (B,).
        loss: name of what the gradient is of, where a rule follows one that somebody else may have written.
    """
    finite = torch.isfinite(gradient).flatten(1).all(dim=1)
    if bool(finite.all()):
        return gradient
    broken = (~finite).nonzero().flatten().tolist()
    step = "" if index is None else f" at step {index + 1}"
    whose = f"the loss {loss} at " if loss else ""
    log.warning(
        "%s: the gradient of %ssample %s is not finite%s (sigma %s); it goes unguided for this step. "
        "A smaller guidance scale may help.",
        rule, whose, ", ".join(map(str, broken)), step, ", ".join(f"{value:.4g}" for value in sigma[~finite].tolist()),
    )  # fmt: skip
    return torch.where(expand(finite, gradient), gradient, torch.zeros_like(gradient))
