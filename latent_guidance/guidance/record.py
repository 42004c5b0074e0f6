"""What happens at each call of a run, kept for its report: see :mod:`.report`.

Numbers stay tensors where they were computed, so that keeping a record never waits for a device, until the run is over
(:meth:`Record.settle`).

Every size is the root mean square over one sample's latent, in the denoised estimate D. A rule's *contribution* is what D would
have been without its act, taken at the place in the chain where it acts:

- COMBINE: the guided estimate less the conditional one, so (w - 1) Δ for CFG;
- POST and GRADIENT: the estimate after the rule less the one before it;
- STEP, inside a sampler's step: what its gradient would add to D in the score form, at the noise level at which it is taken;
- SCALE: (w after - w before) Δ, and BRANCHES: the change of D_u + w (D_c - D_u). Both are read through plain CFG, whatever
  combines the branches later. Where a rule saved the unconditional pass Δ is unknown, and so is its contribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Step
from .cfg import cfg

HOST = "guider's own"
"""What combines the branches where no rule does: the scale that a host's guider or sampler brings."""


def root_mean_square(x: Tensor) -> Tensor:
    """The root mean square (B,) over each sample of x (B, ...), in at least fp32."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.flatten(1).square().mean(dim=1).sqrt()


@dataclass
class Call:
    """One call of the guider: one row of a report. Tensors are (B,).

    Attributes:
        index: of the step, from 0; None if the run's levels are unknown.
        sigma: noise level.
        guidance_scale: w in force when the branches met.
        branches: names of the estimates that were made.
        evaluations: how often each of them was made: twice where the network changed in place what a gradient needs.
        delta: size of D_c - D_u as the network gave them; None where one of them was not made.
        contributions: size of what each rule changed; NaN where that cannot be known.
        notes: what rules noted themselves, such as a probability, by rule and by name.
        denoised: size of the guided estimate.
    """

    index: int | None
    sigma: Tensor
    guidance_scale: Tensor
    branches: tuple[str, ...] = ()
    evaluations: int = 1
    delta: Tensor | None = None
    contributions: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    denoised: Tensor | None = None


class Record:
    """The calls of one run, in order; a :class:`~.run.GuidanceRun` fills it.

    Args:
        on: what the chain guides: "guider"; "model" (a patch under a guider that evaluates the branches itself, whose passes
            the record cannot know); or "sampler", whose rules act inside its step (:meth:`acted` fills that one).
        entries: number of network passes that a branch is made of, where it is not one.
    """

    def __init__(self, on: str = "guider", entries: Mapping[str, int] | None = None) -> None:
        self.on, self.entries = on, dict(entries or {})
        self.rules: tuple[str, ...] = ()
        self.labels: dict[str, str] = {}
        self._pieces: dict[str, int] = {}
        self.calls: list[Call] = []
        self._evaluations = 1
        self._noted: dict[str, Tensor] = {}
        self._scale_changes: dict[str, Tensor] = {}
        self._met: Step | None = None

    def settle(self) -> None:
        """Bring every number to the CPU: the run is over, and what is kept of it holds no memory of a device."""
        self._noted, self._scale_changes, self._met = {}, {}, None
        for call in self.calls:
            call.sigma, call.guidance_scale = call.sigma.cpu(), call.guidance_scale.cpu()
            call.delta = None if call.delta is None else call.delta.cpu()
            call.denoised = None if call.denoised is None else call.denoised.cpu()
            for numbers in (call.contributions, *call.notes.values()):
                numbers.update({name: value.cpu() for name, value in numbers.items()})

    def describe(
        self, rules: Sequence[str], labels: Mapping[str, str], pieces: Mapping[str, int] | None = None
    ) -> None:
        """Name the chain's rules in order, and its branches; ``pieces`` says of how many passes a branch is made for one entry."""
        self.rules, self.labels, self._pieces = tuple(rules), dict(labels), dict(pieces or {})

    def passes(self, call: Call) -> int | None:
        """Network passes that ``call`` was made of; None for a chain on a model."""
        if self.on != "guider":
            return None
        return call.evaluations * sum(self.entries.get(name, 1) * self._pieces.get(name, 1) for name in call.branches)

    def begin(self, step: Step) -> None:
        """A call begins."""
        self.calls.append(
            Call(step.index, step.sigma.detach().clone(), step.guidance_scale, evaluations=self._evaluations)
        )
        self._evaluations = 1
        self._noted, self._scale_changes, self._met = {}, {}, None

    def repeat(self) -> None:
        """The call that is under way is made again, and counts for both."""
        self._evaluations += self.calls.pop().evaluations

    def note(self, name: str, value: Tensor) -> None:
        """A number (B,) of the rule that is acting; its act, which :meth:`seen` shows next, says which rule that is."""
        self._noted[name] = value.detach().clone()

    def seen(self, name: str | None, before: Step, after: Step) -> None:
        """The rule called ``name``, or the network, made ``after`` of ``before``."""
        call = self.calls[-1]
        if name is not None and self._noted:
            call.notes.setdefault(name, {}).update(self._noted)
            self._noted = {}
        if name is None:
            call.branches = tuple(after.estimates)
            call.delta = _delta(after)
        elif after.guided is not None:
            start = before.cond_denoised if before.guided is None else before.guided
            call.contributions[name] = root_mean_square(after.guided - start)
        elif after.estimates is not before.estimates:
            call.contributions[name] = _through_cfg(before, after)
        else:
            change = after.guidance_scale - before.guidance_scale
            self._scale_changes[name] = self._scale_changes.get(name, 0) + change
        if after.guided is None:
            self._met = after

    def acted(self, name: str, index: int | None, sigma: Tensor, size: Tensor) -> None:
        """The rule called ``name`` acted inside a sampler's step at ``sigma`` (B,), by ``size`` (B,); rules at one level share a call."""
        last = self.calls[-1] if self.calls else None
        if last is None or index is None or last.index != index or name in last.contributions:
            self.calls.append(Call(index, sigma.detach().clone(), torch.full_like(sigma, torch.nan)))
        call = self.calls[-1]
        call.contributions[name] = size.detach()
        if self._noted:
            call.notes[name] = self._noted
            self._noted = {}

    def end(self, guided: Tensor) -> None:
        """The call is done and answers ``guided`` (B, ...)."""
        call, met, self._met = self.calls[-1], self._met, None
        call.denoised = root_mean_square(guided)
        if met is None:
            return
        call.guidance_scale = met.guidance_scale.detach().clone()
        delta = _delta(met)
        for name, change in self._scale_changes.items():
            size = torch.full_like(change, torch.nan) if delta is None else delta.to(change)
            changed = torch.where(change == 0, torch.zeros_like(change), change.abs() * size)
            call.contributions[name] = changed


def _delta(step: Step) -> Tensor | None:
    """Size (B,) of D_c - D_u; None where one of them was not made."""
    both = "cond" in step.estimates and "uncond" in step.estimates
    return root_mean_square(step.cond_denoised - step.uncond_denoised) if both else None


def _through_cfg(before: Step, after: Step) -> Tensor:
    """How far plain CFG goes apart (B,) over a change of the branches; without an unconditional one, the conditional alone."""
    ends = [
        cfg(step.cond_denoised, step.uncond_denoised, step.guidance_scale)
        if "uncond" in step.estimates
        else step.cond_denoised
        for step in (before, after)
    ]
    return root_mean_square(ends[1] - ends[0])
