"""Losses as objects: what x0-space guidance pulls the denoised estimate towards. Anyone can write one in five lines:

    class Warm:
        space = "picture"

        def __call__(self, picture):  # (B, 3, H, W), about [-1, 1]: red, green, blue
            return (picture[:, 2] - picture[:, 0]).sum(dim=(1, 2))  # blue minus red, (B,)

``MPGD(loss=Warm(), vae=vae)`` then makes pictures warmer. A loss is any object with

* ``space``: what it is given, one of

  | space     | estimate                                                                              |
  |-----------|---------------------------------------------------------------------------------------|
  | "picture" | (B, 3, H, W), RGB in about [-1, 1]: what the VAE makes of the estimate, not clamped    |
  | "latent"  | (B, ...), the estimate as the model has it, scaled to about unit variance              |
  | "vae"     | (B, ...), the same unscaled, as the VAE gives it and as LATENT carries it              |

* ``__call__(estimate) -> (B,)``: one number per sample, which depends on that sample alone, lower where the sample is better, and
  differentiable. With guidance in the score (DPS, LGD) it plays the part of -log p(y | x0), so ready losses are sums over pixels
  and not means.

A function of the *noisy* latent is another thing: an object with ``log_prob(x, sigma) -> (B,)``, followed by
:class:`~latent_guidance.guidance.log_prob.LogProbGuidance`.

A loss that is another at each step (random cutouts, a schedule) has ``at_step(index) -> loss`` too: what is asked in its place at the
step ``index`` (from 0; None if unknown) of a run, with a ``space`` and ``__call__`` as above. Everything a rule asks within one step it
asks of the same one.

It may have ``check_latents(latents)`` and ``check_shape(shape)``, which raise UserError before the first step: for another model's latents,
or for latents of a shape (B, ...) that it cannot look at. It may have a ``name`` for messages, ``networks() -> tuple`` of handles with a
``.network`` (and in ComfyUI a ``.patcher``, so that the network is loaded and freed with the model), ``graph_used() -> float`` with the
bytes that its graph of one picture takes, which ComfyUI then reserves beside the VAE's, and ``parts() -> [(weight, loss), ...]`` if it is a
sum of others, each in its own space. Whatever is wrong with what it answers is said by name: another shape than (B,), or a tensor that
autograd knows nothing of.
Where its value or its gradient is not finite, that sample goes unguided for that step, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...errors import UserError
from ..base import NodeText
from ..knobs import check_fields

SPACES = ("picture", "latent", "vae")


class Loss(Protocol):
    """What a rule needs of a loss; see the module's text."""

    space: str

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,), lower where the sample is better, of ``estimate`` (B, ...) in the loss's own space."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReadyLoss:
    """Base of the losses that come as nodes: a frozen dataclass whose fields are annotated with knobs, as a rule's are.

    Tensors in its sockets are as the library has them: pictures (B, 3, H, W) in [-1, 1], latents (B, C, h, w) unscaled.

    Raises:
        UserError: a field out of its range.
    """

    space: ClassVar[str]
    node: ClassVar[NodeText]

    def __post_init__(self) -> None:
        check_fields(self, self.node.name)

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,), lower where the sample is better."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.node.name


def name_of(loss: Any) -> str:
    """What messages call a loss."""
    return str(getattr(loss, "name", type(loss).__name__))


def parts_of(loss: Any, weight: float = 1.0) -> Iterator[tuple[float, Any]]:
    """(weight, loss) of every simple loss that ``loss`` is the sum of; itself if it is no sum.

    Raises:
        UserError: something that is no loss, or one in a space that there is not.
    """
    parts: Callable[[], Any] | None = getattr(loss, "parts", None)
    if parts is not None:
        for factor, part in parts():
            yield from parts_of(part, weight * factor)
        return
    space = getattr(loss, "space", None)
    if not callable(loss) or space not in SPACES:
        found = "without a space" if space is None else f"in the space {space!r}"
        raise UserError(
            f"the loss {name_of(loss)} {found if callable(loss) else 'that cannot be called'}",
            expected="an object with __call__(estimate) and a space, one of " + ", ".join(SPACES),
            mend="give it a class attribute space, such as space = 'picture', and a method __call__",
        )
    yield weight, loss


def networks_of(loss: Any) -> tuple[Any, ...]:
    """The networks that a loss calls, those of its parts included."""
    found: list[Any] = []
    for _, part in parts_of(loss):
        networks: Callable[[], Any] | None = getattr(part, "networks", None)
        found += [handle for handle in (() if networks is None else networks()) if all(handle is not h for h in found)]
    return tuple(found)


def check_shape(loss: Any, shape: tuple[int, ...]) -> None:
    """Let a simple loss refuse latents of ``shape`` (B, ...), if it has a ``check_shape`` of its own."""
    check: Callable[[tuple[int, ...]], None] | None = getattr(loss, "check_shape", None)
    if check is not None:
        check(shape)


def at_step(loss: Any, index: int | None) -> Any:
    """A simple loss as it is at the step ``index`` of a run: itself, unless it has an ``at_step`` of its own."""
    changes: Callable[[int | None], Any] | None = getattr(loss, "at_step", None)
    return loss if changes is None else changes(index)


def loss_values(loss: Any, estimate_in: Callable[[str], Tensor], index: int | None = None) -> Tensor:
    """The loss (B,), summed over its parts.

    Args:
        loss: a :class:`Loss`.
        estimate_in: space -> the estimate (B, ...) there, attached to the graph.
        index: of the step; None if unknown.

    Raises:
        UserError: a part whose answer has another shape than (B,), or no gradient.
    """
    total: Tensor | None = None
    for weight, part in parts_of(loss):
        estimate = estimate_in(part.space)
        with named_errors(part):
            values = at_step(part, index)(estimate)
        check_values(values, estimate, name_of(part))
        total = weight * values if total is None else total + weight * values.to(total)
    if total is None:
        raise UserError(
            f"the loss {name_of(loss)}, a sum of nothing", expected="at least one loss", mend="connect a loss"
        )
    return total


def check_values(values: Any, estimate: Tensor, name: str) -> None:
    """Raise UserError unless ``values`` are one number for each sample of ``estimate`` (B, ...), with a gradient."""
    batch = estimate.shape[0]
    if not isinstance(values, Tensor) or values.shape != (batch,):
        found = f"of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"of type {type(values).__name__}"
        raise UserError(
            f"the loss {name}, which answered {found} for {batch} samples",
            expected=f"one number for each sample: a tensor of shape ({batch},)",
            mend="sum over every dimension but the first, for instance .flatten(1).sum(dim=1)",
        )
    if not values.requires_grad:
        raise UserError(
            f"the loss {name}, whose answer has no gradient: it does not depend on the estimate, or it was detached",
            expected="a value computed from the estimate by differentiable operations",
            mend="leave out .detach(), .item(), rounding, comparisons and torch.no_grad() in the loss",
        )


@contextmanager
def named_errors(loss: Any) -> Iterator[None]:
    """In this context what autograd says of tensors that ``loss`` kept from a node is said by name, as a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensors" not in str(error):
            raise
        raise UserError(
            f"the loss {name_of(loss)}, which keeps a tensor that was made in a node (an inference tensor)",
            expected="tensors that autograd can use",
            mend="use tensor.clone() where the loss computes its answer",
        ) from error


def sum_over(values: Tensor) -> Tensor:
    """The sum of each sample of (B, ...), as (B,)."""
    return torch.flatten(values, 1).sum(dim=1)
