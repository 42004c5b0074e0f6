"""A step whose estimate is evaluated under autograd once, so that rules can differentiate through the denoiser.

The gradient of a loss at the guided estimate D with respect to x is J^T g: g is the loss's gradient at D as a leaf, and J the Jacobian
of D with respect to x. So a rule works out g by itself (cheap, without the network), and only J^T passes through it; a chain of
rules shares the one graph, and steps at which no rule wants it are evaluated without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..process import expand
from .base import Step
from .gradient import named_autograd

MEND = (
    "use a rule at the estimate itself, such as MPGD; or a model that is not compiled or quantised for inference, without nodes that "
    "change its activations"
)


class Saved:
    """A tensor that autograd has saved; a copy of it once somebody writes to its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class CopyBeforeWriting(TorchDispatchMode):
    """Sees every operation, and copies what it is about to write to if autograd has saved that.

    (torch.autograd.graph.allow_mutation_on_saved_tensors does the same for one context at a time in the whole process, and knows what
    was saved by numbers that a later tensor may have again.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, WeakSet[Saved]] = {}

    def pack(self, tensor: Tensor) -> Saved:
        """A handle on what autograd saves."""
        saved, storage = Saved(tensor), _storage(tensor)
        if storage is not None:
            self.saved.setdefault(storage, WeakSet()).add(saved)
        return saved

    def saving(self) -> AbstractContextManager[Any]:
        """A context whose graphs are those that are kept whole."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in written if isinstance(written, list | tuple) else [written]:
                    if isinstance(tensor, Tensor):
                        self._copy(_storage(tensor))
        return func(*args, **kwargs)

    def _copy(self, storage: int | None) -> None:
        copies: dict[tuple[Any, ...], Tensor] = {}  # one for all who saved the same part of it
        for saved in () if storage is None else self.saved.pop(storage, ()):
            tensor = saved.tensor
            if tensor is not None:
                part = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
                if part not in copies:
                    copies[part] = tensor.clone()
                saved.tensor = copies[part]

    def let_go(self) -> None:
        """The graph is not needed any more; its tensors may hold it in a circle."""
        for handles in self.saved.values():
            for saved in handles:
                saved.tensor = None


def _storage(tensor: Tensor) -> int | None:
    """What is equal for tensors that share their memory, while one of them lives; None for one without (a sparse one)."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return None


@contextmanager
def copies_of_what_changes() -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """In this context autograd keeps a copy of what it has saved of the network, and the network then changes in place.

    Flux's layers do so, and nodes such as FreeU. Every operation on a tensor passes through Python for it, so that a network that changes
    nothing is better off without.

    Yields:
        what makes the inner context for the network's call; a graph made in that is good until this one ends.
    """
    mode = CopyBeforeWriting()
    try:
        with torch.inference_mode(False), torch.no_grad(), mode:
            yield mode.saving
    finally:
        mode.let_go()


def recorded(
    step: Step,
    guide: Callable[[Step], Step],
    rules: str,
    saving: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Step:
    """``guide(step)``, which evaluates the network and combines the branches, with a ``pull_back`` and nothing else attached to a graph.

    Args:
        step: with an x (B, ...) of any autograd mode.
        guide: is given the step with an x that requires a gradient, outside inference mode; answers it with ``guided``.
        rules: the names of those for which this is done, for errors.
        saving: makes the context of ``guide``'s call; that of :func:`copies_of_what_changes`, if this is inside one.

    Raises:
        ChangedInPlace: from ``guide`` or from the ``pull_back``: the network changes in place what autograd has saved.
        UserError: an estimate that does not depend on x as far as autograd knows.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = step.x.detach().clone().requires_grad_()
        fresh = {"sigma": step.sigma.clone(), "guidance_scale": step.guidance_scale.clone()}
        with (
            named_autograd(f"the model, evaluated with its gradient for {rules}", mend=MEND, network=True),
            saving() if saving else nullcontext(),
        ):
            live = guide(step.replace(x=leaf, **fresh))
        guided = live.denoised
    if not guided.requires_grad:
        raise UserError(
            f"a model whose estimate has no gradient with respect to x, for {rules}",
            expected="a model that autograd can pass through",
            mend=MEND,
        )

    def pull_back(gradient: Tensor) -> Tensor:
        return _pulled(gradient, guided, leaf, rules)

    plain = {name: estimate.detach() for name, estimate in live.estimates.items()}
    evaluated = {name: estimate.detach() for name, estimate in live.evaluated.items()}
    fields = {"x": step.x, "sigma": step.sigma, "guidance_scale": live.guidance_scale.detach()}
    return live.replace(**fields, estimates=plain, evaluated=evaluated, guided=guided.detach(), pull_back=pull_back)


def _pulled(gradient: Tensor, guided: Tensor, leaf: Tensor, rules: str) -> Tensor:
    """J^T gradient (B, ...), with each sample's gradient brought to a largest value of 1 on its way, so that half precision holds it."""
    with torch.inference_mode(False):
        gradient = gradient.detach().clone().to(guided.dtype)
        peak = gradient.flatten(1).abs().amax(dim=1)
        usable = (peak > 0) & torch.isfinite(peak)
        peak = torch.where(usable, peak, torch.ones_like(peak))
        with named_autograd(
            f"the backward pass through the model, for {rules}", mend=MEND, backward=True, network=True
        ):
            (pulled,) = torch.autograd.grad(guided, leaf, gradient / expand(peak, gradient), retain_graph=True)
        return pulled.detach() * expand(peak, pulled).to(pulled)
