"""The Guider: a denoiser and a chain of guidance rules, together a denoiser again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..attention import AttentionPatch, check_patch, patched
from ..denoiser import Cond, Denoiser, concat_conds, for_run, repeat_cond
from ..errors import UserError
from ..process import Process
from ..windows import Windows
from .base import Branch, Rule
from .gradient import normal
from .guided import GuidedDenoiser
from .passes import Passes, passes
from .record import Record
from .report import Report, last_report
from .run import GuidanceRun


class Guider(GuidedDenoiser):
    """``Guider(denoiser, rules)`` is a Denoiser whose estimates are guided.

    All branches that the rules need of one model on the whole latent go through it in one batched call, those with changed attention among
    them; a branch that is not needed is not paid for.

    Args:
        denoiser: the model.
        rules: any chain of rules that act on the estimate; an empty one leaves the model as it is.
        uncond: the unconditional (or negative) condition, of batch size 1 or x's; None if there is none.
        report: keep what every call did, for :attr:`report`; False costs nothing.

    Raises:
        UserError: rules that cannot act together, or that ask for a branch which this guider cannot evaluate, such as changed attention of
            a model whose attention cannot be reached.
    """

    def __init__(self, denoiser: Denoiser, rules: Sequence[Rule], *, uncond: Cond = None, report: bool = False) -> None:
        self.denoiser = denoiser
        self.rules = tuple(rules)
        self.uncond = uncond
        self.process = denoiser.process
        self._records: list[Record] | None = [] if report else None
        self.run = self._bound(None)
        self._models: dict[int, Denoiser] = {}
        for branch in self.run.branches.values():
            _check(branch, self.process)
            if branch.model is not None:
                self._models[id(branch.model)] = branch.model
            if branch.attention is not None:
                check_patch(denoiser if branch.model is None else branch.model, branch.attention)

    def begin(self, sigmas: Tensor) -> Guider:
        """The guider for one run over ``sigmas`` (N + 1,), with fresh state; samplers call it."""
        fresh = Guider(for_run(self.denoiser, sigmas), self.rules, uncond=self.uncond)
        fresh.run = self._bound(sigmas)
        fresh._models = {key: for_run(model, sigmas) for key, model in self._models.items()}
        return fresh

    def _bound(self, sigmas: Tensor | None) -> GuidanceRun:
        """The rules bound to a run; with a report its record replaces the one of the run before."""
        if self._records is None:
            return GuidanceRun(self.rules, self.process, sigmas=sigmas)
        self._records[:] = [Record()]
        return GuidanceRun(self.rules, self.process, sigmas=sigmas, record=self._records[0])

    @property
    def report(self) -> Report:
        """What happened at every call of the last run.

        Raises:
            UserError: the guider keeps none, or no run has begun.
        """
        return last_report(self._records or [])

    def passes(self, sigmas: Tensor, *, levels: Tensor | None = None, with_uncond: bool = False) -> Passes:
        """What one run over ``sigmas`` (N + 1,), ending in 0 or not, costs in network passes.

        Args:
            sigmas: the run's grid.
            levels: noise levels (M,) at which the sampler calls; by default once a step. ``Recurrence.levels`` gives those of a
                sampler that repeats its steps.
            with_uncond: the sampler is one of CFG++, which has the unconditional estimate made whether a rule asks or not.
        """
        run = GuidanceRun(self.rules, self.process, sigmas=sigmas)
        always = frozenset({"uncond"}) if with_uncond else frozenset[str]()
        return passes(run, sigmas[:-1] if levels is None else levels, always=always)

    def denoisers(self) -> Iterable[Any]:
        return (self.denoiser, *self._models.values())

    def evaluate(
        self, names: tuple[str, ...], x: Tensor, sigma: Tensor, cond: Cond, *, variance: bool = False
    ) -> list[dict[str, Tensor]]:
        """The estimates (B, ...) of the named branches, in one call of each group; with ``variance`` the first group's variances, too."""
        call: Any = getattr(self.denoiser, "with_variance", None) if variance else self.denoiser
        if call is None:
            raise UserError(
                "a model that predicts no variance",
                expected="a learned-range network",
                mend="choose variance 'beta' or 'beta_tilde' in the DDPM sampler",
            )
        own, *others = self._grouped(names)
        batch, patches = self._batched(own, x, sigma, cond)
        with patched(self.denoiser, patches):
            outputs = call(*batch) if variance else (call(*batch),)
        estimates, *more = (_apart(own, output) for output in outputs)
        return [estimates | self._by_others(others, x, sigma, cond), *more]

    def _grouped(self, names: tuple[str, ...]) -> list[list[str]]:
        """The named branches, those together that can share one call: first those of the guider's own model on the whole latent, then those
        of every other model, and of every set of windows."""
        groups: dict[tuple[int | None, Windows | None], list[str]] = {(None, None): []}
        for name in names:
            self._cond(name, None)  # refuses a condition that is not there before any network is called
            branch = self.run.branches.get(name) or Branch(name)
            model = None if branch.model is None else id(branch.model)
            groups.setdefault((model, branch.windows), []).append(name)
        return list(groups.values())

    def _by_others(self, groups: Sequence[list[str]], x: Tensor, sigma: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The estimates (B, ...) of further groups of branches, in one call each."""
        estimates: dict[str, Tensor] = {}
        for names in groups:
            branch = self.run.branches[names[0]]
            denoiser = self.denoiser if branch.model is None else self._models[id(branch.model)]
            windows = branch.windows
            pieces = x if windows is None else windows.crops(x)
            times = len(pieces) // len(x)
            batch, patches = self._batched(names, pieces, sigma.expand(len(x)).repeat(times), cond, times=times)
            with patched(denoiser, patches):
                found = _apart(names, denoiser(*batch))
            if windows is not None:
                found = {name: windows.joined(parts, *x.shape[-2:]) for name, parts in found.items()}
            estimates |= found
        return estimates

    def _batched(
        self, names: Sequence[str], x: Tensor, sigma: Tensor, cond: Cond, *, times: int = 1
    ) -> tuple[tuple[Tensor, Tensor, Cond], list[AttentionPatch | None]]:
        """x, sigma and the conditions of the named branches, each joined along the batch, and the change of attention for each sample.

        ``times`` is how many pieces of every sample there are in x, piece by piece.
        """
        batch = x.shape[0]
        sigma = sigma.expand(batch)
        conds = [repeat_cond(self._cond(name, cond), batch // times) for name in names for _ in range(times)]
        branches = [self.run.branches.get(name) or Branch(name) for name in names]
        patches = [patch for branch in branches for patch in branch.patches(sigma, self.run.sigmas)]
        return (torch.cat([x] * len(names)), sigma.repeat(len(names)), concat_conds(normal(conds))), patches

    def _cond(self, name: str, cond: Cond) -> Cond:
        """The condition of the named branch."""
        branch = self.run.branches.get(name)
        which = name if branch is None else branch.cond
        if not isinstance(which, str):
            return cast(Cond, which)
        if which == "uncond" and self.uncond is None:
            raise UserError(
                "guidance or a sampler that needs an unconditional estimate, and no unconditional condition",
                expected="a condition for the unconditional branch (the encoding of an empty prompt)",
                mend="give uncond= to the Guider, or set the guidance scale to 1 and use a sampler without CFG++",
            )
        return cond if which == "cond" else self.uncond


def _apart(names: Sequence[str], joined: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, joined.chunk(len(names)), strict=True))


def _check(branch: Branch, process: Process) -> None:
    """Refuse a branch that a :class:`Guider` on a model of ``process`` cannot evaluate."""
    if not (branch.cond is None or isinstance(branch.cond, str | Tensor | Mapping)):
        raise UserError(
            f"a condition of type {type(branch.cond).__name__} in a rule of the library's Guider",
            expected="a tensor (B, ...), or a mapping of tensors",
            mend="give the encoding itself, as to the Guider; CONDITIONING is for node graphs",
        )
    if branch.model is not None and not isinstance(branch.model, Denoiser):
        raise UserError(
            f"a {type(branch.model).__name__} as a rule's own model",
            expected="a denoiser: a callable of x, sigma and cond with a process",
            mend="wrap the network in a NetworkDenoiser",
        )
    if branch.model is not None and branch.model.process != process:
        raise UserError(
            f"a rule's own model of {branch.model.process}, for a guider of {process}",
            expected="both models on the same process",
            mend="take two models that were trained with the same kind of noise",
        )
