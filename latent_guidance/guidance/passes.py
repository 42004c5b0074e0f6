"""How many network passes a chain of rules costs, known before it runs.

A pass is one sample's estimate by a model: a step that evaluates prompt and negative makes two for every picture, whether in one
batched call or not. Every window of sliding windows is a pass, if a small one. What a rule calls besides (a classifier, and its
gradient) is named, not counted. So is the one call that is made again where a model changes in place what a gradient needs, which
shows only when it runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .run import GuidanceRun, rule_names

SEGMENTS = 6
"""Ranges of sigma that a text lists at most; of more it gives the extremes."""


@dataclass(frozen=True)
class Passes:
    """The passes of a chain at each of some noise levels.

    Attributes:
        sigmas: the levels (N,), descending.
        branches: for every level the labels of the estimates that are made.
        counts: for every level the number of passes, for one picture.
        sparing: names of rules that may save some of them in the run itself, by what they see.
        besides: names of rules that call a network of their own.
        through: names of rules that differentiate through the network. One that changes its activations in place is evaluated twice
            at the first call at which they act, which is not counted here.
    """

    sigmas: tuple[float, ...]
    branches: tuple[tuple[str, ...], ...]
    counts: tuple[int, ...]
    sparing: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    through: tuple[str, ...] = ()

    @property
    def most(self) -> int:
        """Passes of the most expensive step."""
        return max(self.counts)

    @property
    def total(self) -> int:
        """Passes of one call at each level: what a run costs whose sampler calls once a step."""
        return sum(self.counts)

    @property
    def text(self) -> str:
        """For people: passes a step, by what, and at which noise levels if not everywhere the same."""
        ranges = self._ranges()
        if len(ranges) == 1:
            lines = [f"{_passes(self.most)} a step: {', '.join(self.branches[0])}"]
        elif len(ranges) > SEGMENTS:
            lines = [f"{min(self.counts)} to {_passes(self.most)} a step"]
        else:
            lines = [f"at most {_passes(self.most)} a step"]
            lines += [f"sigma {where}: {count} ({', '.join(names)})" for where, count, names in ranges]
        if self.sparing:
            lines.append(f"fewer once {' or '.join(self.sparing)} finds that it can")
        if self.besides:
            lines.append(f"besides, a network of their own is called by: {', '.join(self.besides)}")
        if self.through:
            lines.append(
                "one step twice if the model changes its activations in place, as Flux and FreeU do: the first at which this rule acts: "
                f"{', '.join(self.through)}"
            )
        return "\n".join(lines)

    def _ranges(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """Where neighbouring levels cost the same: (range of sigma in words, passes, branches)."""
        rows = zip(self.sigmas, self.counts, self.branches, strict=True)
        groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[1:])]
        between = [
            f"{(above[-1][0] * below[0][0]) ** 0.5:.2g}" for above, below in itertools.pairwise(groups)
        ]  # the middle of two levels, in the logarithm
        words = [
            " to ".join(ends) if len(ends) == 2 else f"{'above' if i == 0 else 'below'} {ends[0]}" if ends else ""
            for i in range(len(groups))
            for ends in [between[max(i - 1, 0) : i + 1]]
        ]
        return [(where, group[0][1], group[0][2]) for where, group in zip(words, groups, strict=True)]


def _passes(count: int) -> str:
    return f"{count} network pass{'es' if count != 1 else ''}"


def passes(
    run: GuidanceRun, sigmas: Tensor, *, entries: Mapping[str, int] | None = None, always: frozenset[str] = frozenset()
) -> Passes:
    """What the chain of ``run`` costs in passes at each of ``sigmas``.

    Args:
        run: made for this question alone; with the run's own ``sigmas`` for a count of that run, or without any.
        sigmas: noise levels (N,) at which the network is called, descending and above 0.
        entries: how many passes a branch is made of, where it is not one (a prompt of several parts).
        always: names of branches that the host evaluates even if no rule asks for them.
    """
    entries, labels, pieces = entries or {}, run.branch_labels, run.pieces
    asked = [run.wanted_at(sigma.reshape(1)) for sigma in sigmas]
    wanted = [(*names, *sorted(always - set(names))) for names in asked]
    named = list(zip(rule_names(run.rules), run.rules, strict=True))
    guided = any(len(names) > 1 for names in wanted)
    return Passes(
        tuple(sigmas.tolist()),
        tuple(tuple(labels.get(name, name) for name in names) for names in wanted),
        tuple(sum(entries.get(name, 1) * pieces.get(name, 1) for name in names) for names in wanted),
        sparing=tuple(name for name, rule in named if guided and rule.may_spare),
        besides=tuple(name for name, rule in named if rule.networks()),
        through=tuple(name for name, rule in named if rule.may_differentiate()),
    )


def noise_range(run: GuidanceRun, sigma_max: float, sigma_min: float, levels: int = 128) -> Tensor:
    """Noise levels from ``sigma_max`` down to ``sigma_min`` at which to ask :func:`passes` about a model without a grid.

    At least ``levels`` of them, in equal ratios, and closer to one another where what ``run`` asks for changes.
    """
    high, low = math.log(max(sigma_max, sigma_min)), math.log(max(sigma_min, 1e-4))
    coarse = torch.linspace(high, low, levels, dtype=torch.float64).exp()
    asked = [run.wanted_at(sigma.reshape(1)) for sigma in coarse]
    found = coarse.tolist()
    for (above, names), (below, others) in itertools.pairwise(zip(coarse.tolist(), asked, strict=True)):
        for _ in range(6 if names != others else 0):
            middle = (above * below) ** 0.5
            if run.wanted_at(torch.tensor([middle], dtype=torch.float64)) == names:
                above = middle
            else:
                below = middle
            found.append(middle)
    return torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
