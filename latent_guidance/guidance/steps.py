"""Step rules as options of a sampler: what a host does with the rules that act inside a sampler's step.

A sampler knows no rule; it takes plain callables. Several rules of one kind add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..process import Process, expand
from .base import Stage, network_key
from .gradient import score_form
from .idle import warn_of_closed_windows
from .record import Record, root_mean_square
from .run import rule_names, step_index

Gradient = Callable[[Tensor, Tensor], Tensor]


def check_step_rules(rules: Sequence[Any]) -> None:
    """Refuse rules that do not act inside a sampler's step, and rules whose further options differ.

    Raises:
        UserError: naming the rules.
    """
    options: dict[str, tuple[Any, str]] = {}
    for rule in rules:
        if rule.stage is not Stage.STEP:
            raise UserError(
                f"the rule {rule.node.name!r} in a sampler",
                expected="rules that act inside the sampler's step (their names end in DDPM)",
                mend=f"connect {rule.node.name!r} to the rules input of Guider or Apply Guidance to Model instead",
            )
        for name, value in rule.sampler_options().items():
            before = options.setdefault(name, (value, rule.node.name))
            if before[0] != value:
                raise UserError(
                    f"two rules in one sampler with {name} = {before[0]!r} and {value!r}",
                    expected="the same value in both",
                    mend=f"set the same value in {before[1]!r} and {rule.node.name!r}",
                )


def check_not_twice(guiding: Sequence[Any], step_rules: Sequence[Any]) -> None:
    """Refuse a network that guides in the guider and again inside the sampler's step.

    Args:
        guiding: the rules of the guider and of its model.
        step_rules: those of the sampler.

    Raises:
        UserError: naming both rules.
    """
    for step_rule in step_rules:
        mine = {network_key(handle) for handle in step_rule.networks()}
        for rule in guiding:
            if mine & {network_key(handle) for handle in rule.networks()}:
                raise UserError(
                    f"the same network guides twice: {rule.node.name!r} in the guider and {step_rule.node.name!r} in the sampler",
                    expected="one of the two",
                    mend="take the rule out of the guider's chain (or off its model), or out of the sampler's",
                )


def sampler_options(
    rules: Sequence[Any], process: Process, sigmas: Tensor, record: Record | None = None
) -> dict[str, Any]:
    """The keyword arguments that make a ``sample_*`` function apply step ``rules``; several of one kind add up.

    Args:
        rules: step rules that passed :func:`check_step_rules`.
        process: what x is.
        sigmas: the run's noise levels (N + 1,).
        record: what keeps the run's report, made with ``Record("sampler")``; None keeps none, at no cost.
    """
    warn_of_closed_windows(rules, process, sigmas)
    gradients: dict[str, list[Gradient]] = {}
    options: dict[str, Any] = {}
    names = rule_names(rules)
    if record is not None:
        record.describe(names, {})
    for name, rule in zip(names, rules, strict=True):
        gradient = rule.step_gradient(process, sigmas, None if record is None else record.note)
        recording = gradient if record is None else _recording(gradient, record, name, process, sigmas)
        gradients.setdefault(rule.sampler_option, []).append(recording)
        options.update(rule.sampler_options())
    return {name: _sum(parts) for name, parts in gradients.items()} | options


def _recording(gradient: Gradient, record: Record, name: str, process: Process, sigmas: Tensor) -> Gradient:
    """``gradient`` of the rule called ``name``, with each of its answers in ``record``: what it would add to D in the score form."""

    def recorded(x: Tensor, sigma: Tensor) -> Tensor:
        found = gradient(x, sigma)
        shift = score_form(process, found / expand(process.unit_scale(sigma), x), sigma)
        record.acted(name, step_index(sigma, sigmas), sigma, root_mean_square(shift))
        return found

    return recorded


def _sum(parts: list[Gradient]) -> Gradient:
    def gradient(x: Tensor, sigma: Tensor) -> Tensor:
        total = parts[0](x, sigma)
        for part in parts[1:]:
            total = total + part(x, sigma)
        return total

    return gradient
