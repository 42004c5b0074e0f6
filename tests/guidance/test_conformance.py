"""What every rule must keep to, whatever it does. A new rule is covered by being listed in RULES."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, RULES, GuidanceCurve, GuidanceRun, Rule, Stage
from latent_guidance.guidance.knobs import Choice, Number, Socket, Switch, Text, Whole, default, knobs
from latent_guidance.guidance.steps import sampler_options
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand
from latent_guidance.samplers import sample_ddpm

from .conftest import SmallClassifier, SmallCLIP, drawn, latents, prompt

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
SIGMAS = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
ON_ESTIMATES = [rule for rule in RULES if rule.stage is not Stage.STEP]
IN_A_STEP = [rule for rule in RULES if rule.stage is Stage.STEP]


class Towards:
    """A loss as anyone may write it: half the squared distance to one value."""

    space = "latent"

    def __call__(self, estimate: Tensor) -> Tensor:
        return (estimate - 0.7).square().flatten(1).sum(dim=1) / 2

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -(x - 0.7).square().flatten(1).sum(dim=1) / (1 + sigma) ** 2


FAKES: dict[str, Any] = {"CONDITIONING": prompt(), "MODEL": object()}
"""What stands in sockets whose objects hardly any rule looks into."""
MADE: dict[str, Callable[[], Any]] = {"LG_CLASSIFIER": SmallClassifier, "LG_NOISY_CLIP": SmallCLIP, "LG_LOSS": Towards}
"""What stands in sockets whose objects rules call."""


def make(rule_class: type[Rule], **values: Any) -> Rule:
    """The rule at its defaults, with what sockets and texts need."""
    given: dict[str, Any] = {}
    for name, knob in knobs(rule_class).items():
        if isinstance(knob, Socket) and knob.type in MADE:
            given[name] = MADE[knob.type]()
        elif isinstance(knob, Socket) and knob.type in FAKES and not knob.optional:
            given[name] = FAKES[knob.type]
        elif isinstance(knob, Text) and not default(rule_class, name):
            given[name] = "cat"
    return rule_class(**{**given, **values})


def neutral(rule_class: type[Rule]) -> Rule:
    values = {
        name: knob.neutral for name, knob in knobs(rule_class).items() if getattr(knob, "neutral", None) is not None
    }
    return make(rule_class, **values)


def estimates_of(names: tuple[str, ...], x: Tensor, apart: float = 1.0) -> dict[str, Tensor]:
    """Different estimates for "cond", "uncond" and whatever else is asked for; ``apart`` scales how far they are from "cond"."""
    cond = torch.tanh(x)
    own = {"cond": cond, "uncond": torch.sin(2 * x) / 2}
    further = [name for name in names if name not in own]
    own |= {name: torch.cos((i + 1) * x + 0.3) / 2 for i, name in enumerate(sorted(further))}
    return {name: own[name] if apart == 1 else cond + apart * (own[name] - cond) for name in names}


def called(run: GuidanceRun, x: Tensor, sigma: Tensor, apart: float = 1.0) -> Tensor:
    """One call, in which the estimates of :func:`estimates_of` are the model's, differentiable if a rule asks for it."""
    return run(
        x,
        sigma,
        lambda names: estimates_of(names, x, apart),
        differentiable=lambda names, at, level: estimates_of(names, at, apart),
    )


def guided(rules: list[Rule], process: Process, x: Tensor, sigma: Tensor = SIGMAS) -> Tensor:
    return called(GuidanceRun(rules, process), x, sigma)


def along(rules: list[Rule], process: Process, levels: list[Tensor]) -> list[Tensor]:
    """The guided estimates of one run that comes down through ``levels``; x shrinks with them."""
    run, out = GuidanceRun(rules, process), []
    for i, sigma in enumerate(levels):
        x = latents() / (1 + i)
        out.append(called(run, x, sigma))
    return out


def two_calls(rules: list[Rule], process: Process, x: Tensor, sigma: Tensor, apart: float) -> Tensor:
    """Two calls of one run, at falling levels, for rules that remember; the branches are ``apart`` times as far apart as those of
    :func:`guided`."""
    run = GuidanceRun(rules, process)
    return torch.stack([called(run, x, level, apart) for level in (sigma, 0.9 * sigma)])


def chain(rule: Rule) -> list[Rule]:
    """The rule with what it needs around it to have an effect: strong guidance, for those that tame it."""
    return [rule] if rule.stage in (Stage.COMBINE, Stage.GRADIENT) else [CFG(guidance_scale=9.0), rule]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("rule_class", ON_ESTIMATES)
class TestEveryRuleOnEstimates:
    def test_its_neutral_values_are_an_exact_no_op(self, rule_class: type[Rule], process: Process) -> None:
        x = latents()
        rule = neutral(rule_class)
        without = [other for other in chain(rule) if other is not rule]
        for apart in (1.0, 0.01):
            neutrally = two_calls(chain(rule), process, x, SIGMAS, apart)
            assert torch.equal(neutrally, two_calls(without, process, x, SIGMAS, apart))

    def test_its_defaults_do_something_somewhere(self, rule_class: type[Rule], process: Process) -> None:
        rule = make(rule_class)
        without = [other for other in chain(rule) if other is not rule]
        levels = [SIGMAS, SIGMAS / 10] if process is RECTIFIED_FLOW else [SIGMAS * 20, SIGMAS, SIGMAS / 10]
        by_rule, by_none = (along(rules, process, levels) for rules in (chain(rule), without))
        by_rule += [two_calls(chain(rule), process, latents(), SIGMAS, 0.01)]
        by_none += [two_calls(without, process, latents(), SIGMAS, 0.01)]
        assert any(not torch.equal(*pair) for pair in zip(by_rule, by_none, strict=True)), (
            "at its defaults the rule changes nothing; one that combines is not even asked unless it has a field (or property) "
            "guidance_scale other than 1"
        )

    @pytest.mark.parametrize("shape", [(6, 5), (24, 40), (1, 1)])
    def test_each_sample_is_by_itself(self, rule_class: type[Rule], process: Process, shape: tuple[int, int]) -> None:
        x = latents(height=shape[0], width=shape[1])
        for apart in (1.0, 0.01):
            together = two_calls(chain(make(rule_class)), process, x, SIGMAS, apart)
            for i in range(3):
                alone = two_calls(chain(make(rule_class)), process, x[i : i + 1], SIGMAS[i : i + 1], apart)
                torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_and_shape_are_kept_and_inputs_unchanged(
        self, rule_class: type[Rule], process: Process, dtype: torch.dtype
    ) -> None:
        x, sigma = latents().to(dtype), SIGMAS.to(dtype)
        x_before, sigma_before = x.clone(), sigma.clone()
        out = guided(chain(make(rule_class)), process, x, sigma)
        assert out.dtype == dtype and out.shape == x.shape
        assert torch.equal(x, x_before) and torch.equal(sigma, sigma_before)

    def test_finite_towards_both_ends(self, rule_class: type[Rule], process: Process) -> None:
        for sigma in (1e-8, 1.0 if process is RECTIFIED_FLOW else 1e5):
            levels = torch.full((3,), sigma, dtype=torch.float64)
            assert torch.isfinite(guided(chain(make(rule_class)), process, latents(), levels)).all()

    def test_equal_branches_need_no_combining(self, rule_class: type[Rule], process: Process) -> None:
        """Where cond and uncond agree (zero difference) a rule that combines them changes nothing, and nothing is NaN."""
        x = latents()
        same = torch.tanh(x)
        run = GuidanceRun(chain(make(rule_class)), process)
        out = run(
            x,
            SIGMAS,
            lambda names: dict.fromkeys(names, same),
            differentiable=lambda names, at, level: dict.fromkeys(names, torch.tanh(at)),
        )
        assert torch.isfinite(out).all()
        if rule_class.stage is not Stage.GRADIENT:
            torch.testing.assert_close(out, same, rtol=1e-12, atol=1e-12)


class Squashing:
    """A denoiser that knows nothing of places."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return torch.tanh(x / (1 + expand(sigma, x)))


def stepped(rules: list[Rule], process: Process, x: Tensor, pictures: slice = slice(None)) -> Tensor:
    """A run of DDPM with rules that act inside its steps, from x (B, ...) on; ``pictures`` of the batch of noise belong to x."""
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return drawn(3, *x.shape[1:], seed=round(100 * sigma))[pictures]

    options = sampler_options(rules, process, sigmas)
    return sample_ddpm(Squashing(process), x[pictures], sigmas, noise_sampler=noise, **options)


def test_there_are_rules_that_act_inside_a_step() -> None:
    assert {rule_class.__name__ for rule_class in IN_A_STEP} == {"ClassifierMeanShift", "ClassifierPostStep"}


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("rule_class", IN_A_STEP)
class TestEveryRuleInsideAStep:
    """The same for the rules that act in DDPM's own step, through the sampler."""

    def test_its_neutral_values_are_plain_ddpm(self, rule_class: type[Rule], process: Process) -> None:
        plain, rule = stepped([], process, latents()), neutral(rule_class)
        assert rule.guidance_scale == 0  # type: ignore[attr-defined]
        torch.testing.assert_close(stepped([rule], process, latents()), plain, rtol=0, atol=1e-10)
        nearly = stepped([make(rule_class, guidance_scale=1e-5)], process, latents())
        assert (nearly - plain).abs().max() > 1e-9, "the tolerance has teeth"

    def test_its_defaults_do_something(self, rule_class: type[Rule], process: Process) -> None:
        out, plain = (stepped(rules, process, latents()) for rules in ([make(rule_class)], []))
        assert torch.isfinite(out).all() and all((out - plain).abs().flatten(1).amax(dim=1) > 1e-3)

    def test_two_of_a_kind_add_up(self, rule_class: type[Rule], process: Process) -> None:
        halves = [make(rule_class, guidance_scale=w) for w in (1.5, -0.5)]
        torch.testing.assert_close(
            stepped(halves, process, latents()),
            stepped([make(rule_class, guidance_scale=1.0)], process, latents()),
            rtol=0,
            atol=1e-10,
        )

    @pytest.mark.parametrize("shape", [(6, 5), (24, 40), (1, 1)])
    def test_each_sample_is_by_itself(self, rule_class: type[Rule], process: Process, shape: tuple[int, int]) -> None:
        x = latents(height=shape[0], width=shape[1])
        together = stepped([make(rule_class)], process, x)
        assert together.shape == x.shape
        for i in range(3):
            alone = stepped([make(rule_class)], process, x, slice(i, i + 1))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_is_kept_and_x_unchanged(self, rule_class: type[Rule], process: Process, dtype: torch.dtype) -> None:
        x = latents().to(dtype)
        before = x.clone()
        assert stepped([make(rule_class)], process, x).dtype == dtype
        assert torch.equal(x, before)


@pytest.mark.parametrize("rule_class", RULES)
class TestEveryRulesWords:
    def test_every_field_has_a_knob_with_help_in_both_languages(self, rule_class: type[Rule]) -> None:
        assert rule_class.node.id.startswith("LG") and rule_class.node.description and rule_class.node.description_zh
        for name, knob in knobs(rule_class).items():
            assert knob.help and knob.help_zh and knob.label_zh, name
            assert knob.help.rstrip().endswith("."), name

    def test_defaults_and_neutral_values_are_in_range(self, rule_class: type[Rule]) -> None:
        for name, knob in knobs(rule_class).items():
            if not isinstance(knob, Socket):
                knob.check(default(rule_class, name), name)
            if getattr(knob, "neutral", None) is not None:
                knob.check(knob.neutral, name)  # type: ignore[attr-defined]

    def test_values_out_of_range_are_refused_with_the_range(self, rule_class: type[Rule]) -> None:
        wrong: list[Any]
        for name, knob in knobs(rule_class).items():
            match knob:
                case Number() | Whole():
                    wrong = [knob.min - 1, knob.max + 1, math.nan, math.inf, "1", None, True]
                case Choice():
                    wrong = ["nonsense", None]
                case Switch():
                    wrong = [1, None]
                case _:
                    continue
            for value in wrong:
                with pytest.raises(UserError, match=f"{name} of {rule_class.node.name.split('(')[0].strip()}"):
                    make(rule_class, **{name: value})

    def test_it_is_frozen_and_its_module_names_its_source(self, rule_class: type[Rule]) -> None:
        rule = make(rule_class)
        with pytest.raises(AttributeError):
            rule.guidance_scale = 2.0  # type: ignore[attr-defined]
        import sys

        words = sys.modules[rule_class.__module__].__doc__ or ""
        assert "Reference:" in words and "Space:" in words


def test_node_ids_are_unique() -> None:
    ids = [rule_class.node.id for rule_class in RULES]
    assert len(set(ids)) == len(ids)


SCALES = [-3.0, -1.0, 0.0, 0.5, 1.0]
BY_SCALE = [rule_class for rule_class in RULES if "guidance_scale" in knobs(rule_class)]


def allowed(rule_class: type[Rule], w: float) -> bool:
    knob = knobs(rule_class)["guidance_scale"]
    assert isinstance(knob, Number)
    return knob.min <= w <= knob.max


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("w", SCALES)
class TestScalesBelowOne:
    """w < 1, w = 0 and negative scales: what they mean where they are allowed, refused with words where they are not."""

    @pytest.mark.parametrize(
        "rule_class", [rule_class for rule_class in BY_SCALE if rule_class.stage is not Stage.STEP]
    )
    def test_every_rule_with_a_scale(self, rule_class: type[Rule], w: float, process: Process) -> None:
        if not allowed(rule_class, w):
            with pytest.raises(UserError, match=r"guidance_scale of .*Expected: a number from"):
                make(rule_class, guidance_scale=w)
            return
        x, rule = latents(), make(rule_class, guidance_scale=w)
        out = guided([rule], process, x)
        assert torch.isfinite(out).all() and out.shape == x.shape
        if rule_class.stage is Stage.GRADIENT:  # an odd function of its scale: below 0 it pushes the other way, as far
            others = {
                name: 0 for name in ("mean_scale", "step_size") if name in knobs(rule_class)
            }  # strengths besides it
            forth, back = (
                guided([make(rule_class, guidance_scale=s, **others)], process, x) - torch.tanh(x) for s in (w, -w)
            )
            torch.testing.assert_close(forth, -back, rtol=1e-9, atol=1e-12)
            assert (w == 0) == bool((forth == 0).all())

    @pytest.mark.parametrize(
        "rule_class", [r for r in ON_ESTIMATES if r.stage in (Stage.BRANCHES, Stage.POST, Stage.SCALE)]
    )
    def test_every_rule_beside_cfg(self, rule_class: type[Rule], w: float, process: Process) -> None:
        rules = [CFG(guidance_scale=w), make(rule_class)]
        for apart in (1.0, 0.01):
            assert torch.isfinite(two_calls(rules, process, latents(), SIGMAS, apart)).all()
            plain = two_calls([CFG(guidance_scale=w)], process, latents(), SIGMAS, apart)
            assert torch.equal(
                plain, two_calls([CFG(guidance_scale=w), neutral(rule_class)], process, latents(), SIGMAS, apart)
            )


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("rule_class", [rule for rule in RULES if rule.stage is Stage.COMBINE])
def test_a_rule_that_combines_goes_by_the_scale_in_force(rule_class: type[Rule], process: Process) -> None:
    """Rules for the scale change ``step.guidance_scale``: at 1 the prompt alone is left, and elsewhere it is what counts."""
    x, rule = latents(), make(rule_class)

    def out(*rules: Rule) -> Tensor:
        return called(GuidanceRun([rule, *rules], process), x, SIGMAS, apart=0.1)

    at_one, weaker = (out(GuidanceCurve(curve=f"1:{w}, 0.1:{w}")) for w in (1.0, 1.2))
    assert torch.equal(at_one, torch.tanh(x))
    assert not torch.allclose(weaker, out()), "apply must go by step.guidance_scale, not by the rule's own field"


@pytest.mark.parametrize("w", [-3.0, 0.0, 0.5])
def test_cfg_below_one_is_the_straight_line_through_both_estimates(w: float) -> None:
    """0 is the unconditional estimate itself; below 0 the way away from the prompt."""
    x = latents()
    cond, uncond = torch.tanh(x), torch.sin(2 * x) / 2
    out = guided([CFG(guidance_scale=w)], VE_SCALED, x)
    torch.testing.assert_close(out, uncond + w * (cond - uncond), rtol=0, atol=1e-14)
    assert w != 0 or torch.equal(out, uncond)
