"""Where rules meet: one run of a chain of guidance rules over a grid of noise levels.

Both hosts of the node graph and the library's own :class:`~latent_guidance.guidance.guider.Guider` call this; what differs between
them is only how the branches are evaluated, which is a callable here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import UserError
from ..process import Process
from .base import Branch, Rule, Stage, Step
from .cfg import cfg
from .chains import check_chain
from .gradient import ChangedInPlace
from .idle import idle_at_one, warn_of_closed_windows, warn_of_no_guidance
from .record import HOST, Record
from .recorded import copies_of_what_changes, recorded

Evaluate = Callable[[tuple[str, ...]], Mapping[str, Tensor]]
"""Branch names -> their denoised estimates (B, ...), in one call of each network."""

EvaluateAt = Callable[[tuple[str, ...], Tensor, Tensor], Mapping[str, Tensor]]
"""The same at an x (B, ...) that requires a gradient, and a sigma (B,), outside inference mode; gradients flow back to x."""


def step_index(sigma: Tensor, sigmas: Tensor | None) -> int | None:
    """How many levels of the grid ``sigmas`` (N + 1,) are above ``sigma`` (B,): 0 at the first step; None without a grid.

    Read from the grid and not counted, since some samplers call the denoiser twice a step. (The second call of a Heun
    step is at the next level, and has that level's index.)
    """
    if sigmas is None:
        return None
    largest = sigma.max().to(sigmas)
    return int((sigmas > largest * (1 + 1e-5)).sum())


def rule_names(rules: Sequence[Rule]) -> list[str]:
    """What reports call the rules: their display names, numbered from the second of a kind on."""
    names = [rule.node.name for rule in rules]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} {count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def _differentiating(rules: Sequence[Rule]) -> str:
    """The names of the rules that differentiate through the denoiser."""
    return " and ".join(repr(rule.node.name) for rule in rules if rule.may_differentiate())


def _no_gradient(rules: Sequence[Rule]) -> UserError:
    return UserError(
        f"{_differentiating(rules)} where the estimate comes without its gradient with respect to x",
        expected="a guider that evaluates the model for the rule",
        mend="connect the rule to Guider and sample with SamplerCustomAdvanced",
    )


def no_negative(
    what: str, *, mend: str = "connect one to the guider's negative input, for instance Null Conditioning"
) -> UserError:
    """The error that there is no negative conditioning, which ``what`` needs; for the hosts."""
    return UserError(
        f"{what}, and no negative conditioning",
        expected="a negative conditioning (the encoding of an empty prompt)",
        mend=mend,
    )


class GuidanceRun:
    """A chain of rules bound to one run. Two runs of the same rules share nothing.

    Args:
        rules: in any order; they act by stage (see :mod:`.base`), and within a stage in the order given.
        process: what x is.
        sigmas: the run's noise levels (N + 1,), or None if unknown (then every k-th-step gates always act).
        base_scale: w where no rule of the chain brings its own (a host's cfg input); 1 is plain conditional.
        unscaled: brings estimates (B, ...) to the scale of the model's VAE; None where the host does not know it.
        record: what keeps the run's report; None keeps none, at no cost.

    Raises:
        UserError: from :func:`check_chain`.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        process: Process,
        *,
        sigmas: Tensor | None = None,
        base_scale: float = 1.0,
        unscaled: Callable[[Tensor], Tensor] | None = None,
        record: Record | None = None,
    ) -> None:
        check_chain(rules)
        if sigmas is not None:
            warn_of_closed_windows(rules, process, sigmas)
        self.process = process
        self.sigmas = sigmas
        self._unscaled = unscaled
        self._proved = self._keeps_copies = False
        self._idle = () if sigmas is None else idle_at_one(rules)
        combining = next((rule for rule in rules if rule.stage is Stage.COMBINE), None)
        self.base_scale = float(getattr(combining, "guidance_scale", base_scale))
        self.branches: dict[str, Branch] = {branch.name: branch for rule in rules for branch in rule.branches()}
        """What rules may ask for besides "cond" and "uncond", by name."""
        self.rules, self._combining = tuple(rules), combining
        self.record = record
        if record is not None:
            record.describe(rule_names(rules), self.branch_labels, self.pieces)
        named = list(zip(rule_names(rules), rules, [rule.bind(sigmas) for rule in rules], strict=True))

        def acting(stage: Stage, where: Callable[[Rule], bool] = lambda rule: True) -> list[tuple[str, Callable]]:
            return [(name, apply) for name, rule, apply in named if rule.stage is stage and where(rule)]

        self._open_scale = acting(Stage.SCALE, lambda rule: not rule.needs)
        self._closed_scale = acting(Stage.SCALE, lambda rule: bool(rule.needs or rule.looks_at_branches))
        self._branches = acting(Stage.BRANCHES)
        self._combine = next(iter(acting(Stage.COMBINE)), None)
        self._post = acting(Stage.POST)
        self._gradient = acting(Stage.GRADIENT)

    @property
    def branch_labels(self) -> dict[str, str]:
        """What reports call the estimates: "positive", "negative", and for a rule's own the names of the rules that ask for it."""
        own: dict[str, list[str]] = {}
        for name, rule in zip(rule_names(self.rules), self.rules, strict=True):
            for branch in rule.branches():
                own.setdefault(branch.name, []).append(name)
        labels = {name: f"of {' and '.join(dict.fromkeys(asking))}" for name, asking in own.items()}
        return labels | {"cond": "positive", "uncond": "negative"}

    @property
    def pieces(self) -> dict[str, int]:
        """Of how many passes rules' own estimates are made, for one entry of their conditions."""
        return {name: branch.pieces for name, branch in self.branches.items()}

    @property
    def leaves_combination_alone(self) -> bool:
        """Whether no rule changes how the branches meet, so that a host's own combination can stand."""
        return not (self._open_scale or self._closed_scale or self._branches or self._combine)

    @property
    def may_need_uncond(self) -> bool:
        """Whether any step of the run may ask for the unconditional branch.

        A SCALE rule may lower w to 1 but not raise it from there without saying so in its ``needs``.
        """
        by_host = self._combining is None and self.base_scale != 1
        names = self.may_ask
        by_branch = any(
            isinstance(branch.cond, str) and branch.cond == "uncond"
            for name, branch in self.branches.items()
            if name in names
        )
        return by_host or "uncond" in names or by_branch

    @property
    def may_ask(self) -> frozenset[str]:
        """Names of the estimates, besides "cond", that rules may ask for in some step of the run."""
        return frozenset().union(*(rule.may_ask() for rule in self.rules))

    def _wanted(self, step: Step) -> tuple[str, ...]:
        """Names of the estimates that this step needs, in a fixed order."""
        wanted = frozenset().union(*(rule.asks(step) for rule in self.rules))
        by_host = self._combining is None and bool((step.guidance_scale != 1).any())
        uncond = ("uncond",) if by_host or "uncond" in wanted else ()
        return ("cond", *uncond, *(name for name in self.branches if name in wanted))

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        evaluate: Evaluate,
        *,
        also: tuple[str, ...] = (),
        host_combine: Callable[[Step], Tensor] | None = None,
        differentiable: EvaluateAt | None = None,
        base_scale: float | None = None,
    ) -> Tensor:
        """The guided denoised estimate (B, ...).

        Args:
            x: noisy latent (B, ...) in the coordinates of the process.
            sigma: (B,).
            evaluate: called once, with the names of the branches that this step needs: "cond", "uncond" if it does, and names
                of ``branches``. What it gives beyond these names no rule sees.
            also: names to evaluate whether a rule needs them or not, for a host that has another use for them.
            host_combine: how a host combines the branches where the chain has no COMBINE rule; plain CFG without it.
            differentiable: called in the place of ``evaluate`` at the steps at which a rule differentiates through the denoiser, and
                once more at the first of them whose gradient is taken if the network changes in place what autograd has saved; None if the
                host cannot.
            base_scale: w of this call where no rule of the chain brings its own; None leaves it at the run's.

        Raises:
            UserError: a rule that differentiates, and a host or a model that cannot, or latents of a shape that a rule cannot act on;
                at the first call.
        """
        self._check_shape(tuple(x.shape))
        ways = {"also": also, "host_combine": host_combine, "differentiable": differentiable, "base_scale": base_scale}
        try:
            return self._call(x, sigma, evaluate, **ways)
        except ChangedInPlace:
            if self._keeps_copies:
                raise
        self._keeps_copies = True  # for the rest of the run; the first try's graph is gone with its error
        if self.record is not None:
            self.record.repeat()
        return self._call(x, sigma, evaluate, **ways)

    def _call(
        self,
        x: Tensor,
        sigma: Tensor,
        evaluate: Evaluate,
        *,
        also: tuple[str, ...],
        host_combine: Callable[[Step], Tensor] | None,
        differentiable: EvaluateAt | None,
        base_scale: float | None,
    ) -> Tensor:
        """:meth:`__call__`, once; see there."""
        step = self._before_the_network(x, sigma, base_scale)
        self._look_for_guidance(step.index, self.base_scale if base_scale is None else base_scale)
        wanted = self._wanted(step)
        names = (*wanted, *(name for name in also if name not in wanted))
        if not self._differentiates(step):
            return self._with_gradients(self._guided(step, wanted, evaluate(names), host_combine))
        if differentiable is None:
            raise _no_gradient(self.rules)
        at = differentiable
        with copies_of_what_changes() if self._keeps_copies else nullcontext() as saving:
            step = recorded(
                step,
                lambda live: self._guided(live, wanted, at(names, live.x, live.sigma), host_combine),
                _differentiating(self.rules),
                saving,
            )
            return self._with_gradients(step)

    def _look_for_guidance(self, index: int | None, base_scale: float) -> None:
        """Say at the last step what nothing has guided for, if that is so; a host's scale may be another at each step."""
        if base_scale != 1:
            self._idle = ()
        elif self._idle and self.sigmas is not None and index is not None and index >= len(self.sigmas) - 2:
            warn_of_no_guidance(self._idle)
            self._idle = ()

    def _with_gradients(self, step: Step) -> Tensor:
        """The guided estimate (B, ...) of a step, with what the GRADIENT rules add to it."""
        shifts = []
        for name, shift in self._gradient:
            shifts.append(shift(step))
            if self.record is not None:
                self.record.seen(name, step, step.replace(guided=step.denoised + shifts[-1]))
        guided = sum(shifts, start=step.denoised)
        if self.record is not None:
            with torch.no_grad():
                self.record.end(guided)
        return guided

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Let every rule refuse latents of ``shape`` (B, ...), at the first call."""
        if not self._proved:
            for rule in self.rules:
                rule.check_shape(shape)

    def _differentiates(self, step: Step) -> bool:
        """Whether this step is evaluated under autograd: a rule wants it, or it is the first, at which a model that cannot is refused."""
        first, self._proved = not self._proved, True
        return any(rule.may_differentiate() and (first or rule.differentiates(step)) for rule in self.rules)

    def _guided(
        self,
        step: Step,
        wanted: tuple[str, ...],
        given: Mapping[str, Tensor],
        host_combine: Callable[[Step], Tensor] | None,
    ) -> Step:
        """The step with its guided estimate, before GRADIENT rules; of the estimates ``given`` rules see those ``wanted``."""
        self._seen(None, step, step.replace(estimates=given))
        evaluated = {name: given[name] for name in wanted}
        step = step.replace(estimates=evaluated, evaluated=evaluated)
        for name, change in self._branches:
            step = self._seen(name, step, step.replace(estimates={**step.estimates, **change(step)}))
        for name, rule_scale in self._closed_scale if "uncond" in step.estimates else ():
            step = self._seen(name, step, step.replace(guidance_scale=rule_scale(step)))

        if host_combine is not None and self._combine is None:
            guided = host_combine(step.replace(estimates={**given, **step.estimates}))
        else:
            guided = self._combined(step)
        step = self._seen(self._combine[0] if self._combine else HOST, step, step.replace(guided=guided))
        for name, change in self._post:
            step = self._seen(name, step, step.replace(guided=change(step)))
        return step

    def _before_the_network(self, x: Tensor, sigma: Tensor, base_scale: float | None = None) -> Step:
        """The step as it stands when the network is called, with the scale that the rules have left."""
        if base_scale is None or hasattr(self._combining, "guidance_scale"):
            base_scale = self.base_scale
        scale, index = torch.full_like(sigma, base_scale), step_index(sigma, self.sigmas)
        note = None if self.record is None else self.record.note
        step = Step(self.process, x, sigma, index, scale, {}, unscaled=self._unscaled, note=note)
        if self.record is not None:
            self.record.begin(step)
        for name, rule_scale in self._open_scale:
            step = self._seen(name, step, step.replace(guidance_scale=rule_scale(step)))
        return step

    def _seen(self, name: str | None, before: Step, after: Step) -> Step:
        """``after``, what the rule called ``name`` (None: the network) made of ``before``, shown to the record if there is one."""
        if self.record is not None:
            with torch.no_grad():
                self.record.seen(name, before, after)
        return after

    def wanted_at(self, sigma: Tensor) -> tuple[str, ...]:
        """Names of the estimates that a call at ``sigma`` (B,) would ask for, as far as that is settled before the run.

        A rule that goes by what it has seen (``looks_at_branches``) may ask for fewer in the run itself. For a run made for this
        question alone, since rules may remember that they were asked.
        """
        return self._wanted(self._before_the_network(sigma.new_zeros(len(sigma), 1, 1, 1), sigma))

    def _combined(self, step: Step) -> Tensor:
        if self._combining is not None and self._combine is not None:
            asked = self._combining.asks(step)
            return self._combine[1](step) if asked and asked <= step.estimates.keys() else step.cond_denoised
        if "uncond" not in step.estimates:
            return step.cond_denoised
        return cfg(step.cond_denoised, step.uncond_denoised, step.guidance_scale)
