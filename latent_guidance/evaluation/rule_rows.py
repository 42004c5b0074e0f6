"""The rows of the table over rules: how each rule is set up to be measured, and with which settings.

A rule is measured with the defaults of its knobs, which are its recommended settings; where a row has ``settings`` of its own it says
why. The values of ``knob`` that are tried beside the recommended one show what it was taken against. A rule without a row stands in
:data:`WITHOUT` with the reason; a test holds that every rule is in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..guidance import (
    CFG,
    DPS,
    MPGD,
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    AngleDomainGuidance,
    Autoguidance,
    CFGZeroStar,
    ClassifierGuidance,
    ClassifierMeanShift,
    ClassifierPostStep,
    DynamicThresholding,
    FreeDoM,
    FrequencyDecoupledGuidance,
    GuidanceCurve,
    GuidanceSchedule,
    LimitedInterval,
    LogProbGuidance,
    LossGuidedDiffusion,
    MagnitudeAwareGuidance,
    MomentumGuidance,
    NoisyCLIPGuidance,
    PerpNeg,
    PerturbedAttention,
    RescaleGuidance,
    Rule,
    SkippedLayers,
    SlidingModeCFG,
    SlidingWindow,
    SmoothedEnergy,
    TangentialCFG,
    TokenPerturbation,
    TrainingFreeGuidance,
    TwoConditions,
    UniversalGuidance,
)
from ..guidance.classifier_step import ClassifierStepRule
from ..guidance.knobs import default, knobs
from ..samplers import (
    Recurrence,
    sample_ddim,
    sample_ddim_cfg_pp,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_cfg_pp,
    sample_rectified_cfg_pp,
)
from .bench import FROM_NOTHING

if TYPE_CHECKING:
    from .rule_shop import Ask, Shop

STRONG = 8.0
"""A scale at which plain guidance is too strong: what the rules against that are put beside."""
CFG_PP = 0.6
"""lambda of CFG++: the middle of what its paper shows, in 0 (no guidance) to 1."""

PROMPT, TEXT, GROUP, PICTURE = "prompt", "text", "group", "picture"
TASKS = (PROMPT, TEXT, GROUP, PICTURE)
"""What pictures are asked for by: a prompt; a text that the rule alone is told; a group; a reference picture."""


def _none(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        key: of its files, and for ``--only``.
        task: one of :data:`TASKS`.
        rule: what is measured; None for a baseline.
        title: what the table calls it; by default the rule's display name.
        settings: of its knobs, where they are not the defaults.
        why: the reason for them, and for ``beside`` where that is not CFG at its default.
        beside: rules that come before it in the chain.
        sockets: what it is connected to for one set of pictures.
        sampler: by which it is sampled; a rule for the inside of a step hands itself to it.
        recurrence: how often each step is taken.
        needs: what the checkpoint must have: "" or "noisy_clip".
        knob: whose ``values`` are tried in a sweep: of the rule, or "recurrence".
        values: those, the recommended one among them.
    """

    key: str
    task: str = PROMPT
    rule: type[Rule] | None = None
    title: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    beside: tuple[Rule, ...] = ()
    sockets: Callable[[Shop, Ask], dict[str, Any]] = _none
    sampler: Callable[..., Tensor] = sample_dpmpp_2m
    recurrence: int = 1
    needs: str = ""
    knob: str = ""
    values: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return self.title or (self.rule.node.name if self.rule else self.key)

    @property
    def recommended(self) -> Any:
        """The value of ``knob`` that the row is measured with."""
        if self.knob == "recurrence":
            return self.recurrence
        return self.settings.get(self.knob, default(self.rule, self.knob)) if self.rule and self.knob else None

    def own(self, shop: Shop, ask: Ask) -> Rule | None:
        """The rule itself, connected for one set of pictures; None in a baseline."""
        return self.rule(**{**self.sockets(shop, ask), **self.settings}) if self.rule else None

    def run(self, shop: Shop, ask: Ask) -> tuple[list[Rule], Callable[..., Tensor]]:
        """The chain for the guider, and the sampler with its options."""
        rule, options = self.own(shop, ask), dict[str, Any]()
        if self.recurrence > 1:
            options["recurrence"] = Recurrence(self.recurrence)
        if isinstance(rule, ClassifierStepRule):
            gradient = rule.step_gradient(shop.bench.denoiser.process, shop.bench.sigmas)
            options |= {rule.sampler_option: gradient, **rule.sampler_options()}
            rule = None
        chain = [*self.beside, *([rule] if rule else [])]
        return chain, partial(self.sampler, **options) if options else self.sampler


def _first_condition(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"condition": shop.encoded(shop.group_of(ask).lower())}


def _negative(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"negative": shop.encoded(shop.after(ask).name)}


def _weak(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"weak_model": shop.weak}


def _classifier(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"classifier": shop.bench.classifier, "label": f'"{ask.name}"'}


def _log_prob(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"loss": shop.log_prob(ask)}


def _noisy_clip(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"noisy_clip": shop.bench.checkpoint.noisy_clip, "target": shop.encoded(ask.name)}


def _reference(shop: Shop, ask: Ask) -> dict[str, Any]:
    return {"loss": shop.reference(ask), "vae": shop.bench.checkpoint.vae}


_PLAIN, _STRONG = (CFG(),), (CFG(guidance_scale=STRONG),)
_AGAINST_STRONG = f"it is against too strong guidance: beside CFG at {STRONG:g}"
_LAMBDA = "under CFG++ the scale is the paper's lambda, from 0 to 1"
_group = partial(
    Row, task=GROUP, sockets=_classifier, sampler=FROM_NOTHING, knob="guidance_scale", values=(5.0, 10.0, 15.0, 30.0)
)
_loss = partial(Row, task=PICTURE, sockets=_reference, knob="guidance_scale", values=(0.05, 0.1, 0.2, 0.5))

ROWS: tuple[Row, ...] = (
    Row(key="plain", title="No guidance (w = 1)"),
    Row(
        key="cfg", rule=CFG, settings={"guidance_scale": 1.5}, knob="guidance_scale", values=(1.5, 2.5, 4.0, 6.0, 8.0),
        why="what the curves of docs/EMOJI.md recommend for names; other words want more, and other models too",
    ),
    Row(
        key="cfg-strong", rule=CFG, title=f"CFG, strong (w = {STRONG:g})", settings={"guidance_scale": STRONG},
        why="what the rules against too strong guidance are compared with",
    ),
    Row(key="cfg-zero-star", rule=CFGZeroStar, knob="guidance_scale", values=(2.5, 4.0, 6.0)),
    Row(key="angle-domain", rule=AngleDomainGuidance, knob="guidance_scale", values=(4.0, 6.0, 10.0)),
    Row(key="frequency", rule=FrequencyDecoupledGuidance, knob="scale_high", values=(3.0, 5.0, 7.0, 10.0)),
    Row(key="two-conditions", rule=TwoConditions, sockets=_first_condition, knob="second_scale", values=(3.0, 5.0, 7.5)),
    Row(
        key="perp-neg", rule=PerpNeg, sockets=_negative, settings={"guidance_scale": 4.0}, knob="guidance_scale",
        values=(2.5, 4.0, 6.0, 7.5), why="clearly more come out as named than at 7.5, the default, which is the authors'",
    ),
    Row(key="autoguidance", rule=Autoguidance, sockets=_weak, knob="guidance_scale", values=(1.5, 2.0, 3.0)),
    Row(key="pag", rule=PerturbedAttention, beside=_PLAIN, knob="scale", values=(1.0, 3.0, 5.0)),
    Row(key="seg", rule=SmoothedEnergy, beside=_PLAIN, knob="scale", values=(1.0, 3.0, 5.0)),
    Row(key="slg", rule=SkippedLayers, beside=_PLAIN, knob="scale", values=(1.0, 2.5, 4.0)),
    Row(key="tpg", rule=TokenPerturbation, beside=_PLAIN, knob="scale", values=(1.0, 3.0, 5.0)),
    Row(key="swg", rule=SlidingWindow, beside=_PLAIN, knob="scale", values=(0.2, 0.5, 1.0)),
    Row(key="interval", rule=LimitedInterval, beside=_PLAIN, knob="sigma_hi", values=(2.0, 5.42, 10.0)),
    Row(key="schedule", rule=GuidanceSchedule, beside=_PLAIN, knob="shape", values=("linear", "cosine", "power law")),
    Row(key="curve", rule=GuidanceCurve, beside=_PLAIN),
    Row(key="adaptive", rule=AdaptiveGuidance, beside=_PLAIN, knob="threshold", values=(0.99, 0.999, 0.9999)),
    Row(key="magnitude", rule=MagnitudeAwareGuidance, beside=_STRONG, why=_AGAINST_STRONG, knob="alpha", values=(2.0, 8.0, 12.0)),
    Row(key="apg", rule=AdaptiveProjectedGuidance, beside=_STRONG, why=_AGAINST_STRONG, knob="eta", values=(0.0, 0.25, 0.5)),
    Row(key="tangential", rule=TangentialCFG, beside=_PLAIN, knob="damping", values=(0.25, 0.5, 1.0)),
    Row(key="sliding-mode", rule=SlidingModeCFG, beside=_PLAIN, knob="gain", values=(0.05, 0.1, 0.3)),
    Row(key="rescale", rule=RescaleGuidance, beside=_STRONG, why=_AGAINST_STRONG, knob="phi", values=(0.3, 0.5, 0.7, 1.0)),
    Row(
        key="threshold", rule=DynamicThresholding, beside=_STRONG, settings={"plain_scale": CFG.guidance_scale},
        why=f"{_AGAINST_STRONG}, with the range of CFG's own default, the scale that gives good colours on this model",
        knob="plain_scale", values=(2.5, 4.0, 6.0),
    ),
    Row(key="momentum", rule=MomentumGuidance, beside=_PLAIN, knob="alpha", values=(0.25, 0.5, 1.0)),
    Row(key="ddim", rule=CFG, title="CFG under DDIM", sampler=sample_ddim),
    Row(
        key="ddim-cfg-pp", rule=CFG, title="CFG++ (DDIM)", sampler=sample_ddim_cfg_pp, settings={"guidance_scale": CFG_PP},
        why=_LAMBDA, knob="guidance_scale", values=(0.3, 0.6, 1.0),
    ),
    Row(
        key="dpmpp-2m-cfg-pp", rule=CFG, title="CFG++ (DPM++ 2M)", sampler=sample_dpmpp_2m_cfg_pp,
        settings={"guidance_scale": CFG_PP}, why=_LAMBDA, knob="guidance_scale", values=(0.3, 0.6, 1.0),
    ),
    Row(
        key="recurrence", rule=CFG, title="CFG under DDIM, recurrence", sampler=sample_ddim, recurrence=2,
        why="each step taken twice; at the sampler's default of once it is the row above", knob="recurrence", values=(2, 4),
    ),
    Row(
        key="noisy-clip", task=TEXT, rule=NoisyCLIPGuidance, sockets=_noisy_clip, needs="noisy_clip", settings={"guidance_scale": 20.0},
        knob="guidance_scale", values=(2.0, 5.0, 10.0, 20.0), why="clearly more come out as named than at 5, the default",
    ),
    Row(key="plain-group", task=GROUP, title="No guidance, empty prompt", sampler=FROM_NOTHING),
    _group(key="classifier", rule=ClassifierGuidance, values=(0.1, 0.2, 0.3, 0.5)),
    _group(key="mean-shift", rule=ClassifierMeanShift, sampler=sample_ddpm),
    _group(
        key="post-step", rule=ClassifierPostStep, sampler=sample_ddpm, settings={"guidance_scale": 0.2},
        why="twice its default; its scale compares with no other form's", values=(0.05, 0.1, 0.2, 0.5),
    ),
    Row(
        key="log-prob", task=GROUP, rule=LogProbGuidance, sockets=_log_prob, sampler=FROM_NOTHING, knob="guidance_scale",
        values=(0.1, 0.2, 0.5),
    ),
    Row(key="plain-picture", task=PICTURE, title="No guidance, empty prompt"),
    _loss(key="mpgd", rule=MPGD),
    _loss(key="dps", rule=DPS),
    _loss(key="lgd", rule=LossGuidedDiffusion),
    _loss(key="freedom", rule=FreeDoM),
    _loss(key="universal", rule=UniversalGuidance),
    _loss(key="tfg", rule=TrainingFreeGuidance),
)  # fmt: skip
"""Every row, in the order of the table."""

BASELINES = {PROMPT: "plain", TEXT: "plain-picture", GROUP: "plain-group", PICTURE: "plain-picture"}
"""The row without guidance, by task."""

WITHOUT: dict[type[Rule], str] = {}
"""Rules without a row, and why."""

SAMPLERS_WITHOUT: dict[Callable[..., Tensor], str] = {
    sample_rectified_cfg_pp: "Rectified-CFG++: for flow models, and the bundled model is none",
}
"""CFG++ samplers without a row, and why."""


def shown_settings(rule: Rule) -> str:
    """The numbers and choices of a rule that are not neutral, in the order of its knobs; seed, label and sockets left out."""
    words = []
    for name, knob in knobs(type(rule)).items():
        value = getattr(rule, name)
        if (
            name in ("seed", "label")
            or type(value) not in (int, float, str, bool)
            or value in ("", getattr(knob, "neutral", None))
        ):
            continue
        words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)
