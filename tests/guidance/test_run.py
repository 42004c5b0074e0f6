"""Where rules meet: which branches are asked for, in which order rules act, what is refused, and that runs share nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from latent_guidance.denoiser import Cond
from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    ClassifierGuidance,
    ClassifierMeanShift,
    Guider,
    LimitedInterval,
    RescaleGuidance,
    SlidingModeCFG,
    TwoConditions,
)
from latent_guidance.guidance.base import Branch, NodeText, Rule, Stage, Step
from latent_guidance.guidance.chains import check_on_model
from latent_guidance.guidance.run import GuidanceRun, step_index
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import SmallClassifier, latents

SIGMA = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)


class Recorder:
    """A denoiser that answers cond * x and remembers how it was called."""

    process: Process = VE_SCALED

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        assert isinstance(cond, Tensor) and sigma.shape == (x.shape[0],)
        self.batches.append(x.shape[0])
        return cond.reshape(-1, 1, 1, 1) * x


def cond_of(value: float, batch: int = 1) -> Tensor:
    return torch.full((batch, 1), value, dtype=torch.float64)


def test_cfg_at_a_fifth_of_the_way_is_thirteen() -> None:
    x = torch.ones(1, 1, 1, 1)
    guider = Guider(Recorder(), [CFG(guidance_scale=0.2)], uncond=torch.tensor([[12.0]]))
    assert guider(x, torch.ones(1), torch.tensor([[17.0]])).item() == pytest.approx(13.0)


def test_both_branches_go_through_the_network_in_one_call() -> None:
    model = Recorder()
    Guider(model, [CFG(guidance_scale=3.0)], uncond=cond_of(0.5))(latents(), SIGMA, cond_of(2.0, 3))
    assert model.batches == [6]


def test_no_second_branch_is_paid_for_at_scale_one_or_outside_the_interval() -> None:
    model = Recorder()
    Guider(model, [CFG(guidance_scale=1.0)], uncond=cond_of(0.5))(latents(), SIGMA, cond_of(2.0))
    interval = Guider(
        model, [CFG(guidance_scale=3.0), LimitedInterval(sigma_lo=0.1, sigma_hi=1.0)], uncond=cond_of(0.5)
    )
    outside = interval(latents(), SIGMA, cond_of(2.0))
    assert model.batches == [3, 3]
    assert torch.equal(outside, 2 * latents())
    interval(latents(), SIGMA / 2, cond_of(2.0))  # sigma = sigma_hi is inside: (lo, hi]
    interval(latents(), SIGMA / 20, cond_of(2.0))  # sigma = sigma_lo is outside
    assert model.batches == [3, 3, 6, 3]


def test_samples_at_different_noise_levels_are_gated_each_by_itself() -> None:
    rules = [CFG(guidance_scale=3.0), LimitedInterval(sigma_lo=0.1, sigma_hi=1.0)]
    guider = Guider(Recorder(), rules, uncond=cond_of(0.5))
    out = guider(latents(), torch.tensor([2.0, 0.5, 0.05], dtype=torch.float64), cond_of(2.0))
    assert torch.equal(out[0], 2 * latents()[0]) and torch.equal(out[2], 2 * latents()[2])
    torch.testing.assert_close(out[1], (0.5 + 3 * 1.5) * latents()[1])


def test_two_consecutive_runs_are_identical_and_state_dies_with_its_run() -> None:
    @dataclass(frozen=True, kw_only=True)
    class CountsCalls(Rule):
        stage: ClassVar[Stage] = Stage.POST
        node: ClassVar[NodeText] = NodeText("LGTest", "Test", "", "", "")

        def bind(self, sigmas: Tensor | None) -> Callable[[Step], Any]:
            calls = 0

            def apply(step: Step) -> Tensor:
                nonlocal calls
                calls += 1
                return step.denoised + calls

            return apply

    guider = Guider(Recorder(), [CountsCalls()])
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    runs = []
    for _ in range(2):
        run = guider.begin(sigmas)
        runs.append([run(latents(), SIGMA, cond_of(2.0)) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1]), "within a run the rule's state does move"


class Looks(Rule):
    """A rule for the scale that looks at the branches: lowers w to 1 for good once it has seen them ``patience`` times."""

    stage: ClassVar[Stage] = Stage.SCALE
    node: ClassVar[NodeText] = NodeText("LGLooks", "Looks", "", "", "")
    looks_at_branches: ClassVar[bool] = True
    patience: ClassVar[int] = 2

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Tensor]:
        seen = 0

        def apply(step: Step) -> Tensor:
            nonlocal seen
            self.asked.append(tuple(step.estimates))
            seen += bool(step.estimates)
            done = seen >= self.patience and not step.estimates
            return torch.ones_like(step.guidance_scale) if done else step.guidance_scale

        return apply


def test_a_rule_that_looks_at_the_branches_is_asked_before_and_after_and_saves_the_pass_it_gives_up() -> None:
    model, rule = Recorder(), Looks()
    guider = Guider(model, [CFG(guidance_scale=3.0), rule], uncond=cond_of(0.5))
    for _ in range(2):  # two runs: what was seen dies with the first
        run = guider.begin(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))
        outs = [run(latents(), SIGMA, cond_of(2.0)) for _ in range(4)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[2], 2 * latents()) and torch.equal(outs[3], outs[2])
    assert model.batches == [6, 6, 3, 3] * 2
    assert rule.asked == [(), ("cond", "uncond"), (), ("cond", "uncond"), (), ()] * 2


def test_a_rule_that_looks_pays_for_no_branch_that_is_not_there_and_one_that_needs_it_does() -> None:
    class Needs(Looks):
        needs: ClassVar[frozenset[str]] = frozenset({"uncond"})

    window = LimitedInterval(sigma_lo=0.1, sigma_hi=1.0)
    for kind, batch, asked in ((Looks, 3, [()]), (Needs, 6, [("cond", "uncond")])):
        model, rule = Recorder(), kind()
        Guider(model, [CFG(guidance_scale=3.0), window, rule], uncond=cond_of(0.5))(latents(), SIGMA, cond_of(2.0))
        assert model.batches == [batch] and rule.asked == asked
    assert not GuidanceRun([Looks()], VE_SCALED).may_need_uncond and GuidanceRun([Needs()], VE_SCALED).may_need_uncond


def test_rules_act_by_stage_whatever_order_they_are_given_in(classifier: SmallClassifier) -> None:
    rules = [
        CFG(guidance_scale=3.0),
        LimitedInterval(),
        ClassifierGuidance(scaling="raw", classifier=classifier, label="cat"),
    ]
    outs = [
        Guider(Recorder(), order, uncond=cond_of(0.5))(latents(), SIGMA, cond_of(2.0)) for order in (rules, rules[::-1])
    ]
    assert torch.equal(*outs)


def test_two_gradient_rules_in_one_chain_both_act_and_add_up(classifier: SmallClassifier) -> None:
    x, model = latents(), Recorder()
    cat, bird = (ClassifierGuidance(scaling="raw", classifier=classifier, label=label) for label in ("cat", "bird"))
    plain, with_cat, with_bird, both = (
        Guider(model, rules)(x, SIGMA, cond_of(2.0)) for rules in ([], [cat], [bird], [cat, bird])
    )
    torch.testing.assert_close(both - plain, (with_cat - plain) + (with_bird - plain), rtol=0, atol=1e-12)
    assert (with_cat - plain).abs().max() > 1e-3 and (with_bird - plain).abs().max() > 1e-3


def test_what_cannot_act_together_is_refused_by_name(classifier: SmallClassifier) -> None:
    with pytest.raises(UserError, match=r"Classifier-Free Guidance \(CFG\) and Classifier-Free Guidance \(CFG\)"):
        Guider(Recorder(), [CFG(), CFG()])
    with pytest.raises(UserError, match="DDPM sampler node"):
        Guider(Recorder(), [ClassifierMeanShift(classifier=classifier, label="cat")])


def test_one_rule_twice_is_refused_and_two_of_a_kind_are_not(classifier: SmallClassifier) -> None:
    cat = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")
    with pytest.raises(UserError, match="'Classifier Guidance' twice"):
        Guider(Recorder(), [cat, ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")])
    other = SmallClassifier()
    mask = torch.ones(4, 4)
    for changes in ({"label": "dog"}, {"guidance_scale": 1.0}, {"classifier": other}, {"mask": mask}):
        Guider(
            Recorder(),
            [cat, ClassifierGuidance(scaling="raw", **{"classifier": classifier, "label": "cat", **changes})],
        )
    masked = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", mask=mask)
    with pytest.raises(UserError, match="twice"):
        Guider(Recorder(), [masked, ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", mask=mask)])


def test_a_guider_inside_a_guider_is_made_for_the_run_too(classifier: SmallClassifier) -> None:
    inner = Guider(Recorder(), [ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", every_k=2)])
    sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    run = Guider(inner, []).begin(sigmas)
    for sigma in sigmas[:-1]:
        run(latents(), sigma.expand(3), cond_of(2.0))
    assert len(classifier.calls) == 2


def test_guidance_without_an_unconditional_condition_is_refused() -> None:
    with pytest.raises(UserError, match="unconditional"):
        Guider(Recorder(), [CFG(guidance_scale=2.0)])(latents(), SIGMA, cond_of(2.0))
    Guider(Recorder(), [CFG(guidance_scale=1.0)])(latents(), SIGMA, cond_of(2.0))


def test_a_hosts_own_scale_is_used_where_no_rule_brings_one() -> None:
    estimates = {"cond": torch.full((3, 1), 17.0).double(), "uncond": torch.full((3, 1), 12.0).double()}
    run = GuidanceRun([LimitedInterval(sigma_lo=0.0, sigma_hi=3.0)], VE_SCALED, base_scale=0.2)
    assert torch.allclose(
        run(torch.zeros(3, 1), SIGMA, lambda names: estimates), torch.tensor(13.0, dtype=torch.float64)
    )
    own = GuidanceRun([CFG(guidance_scale=1.0)], VE_SCALED, base_scale=0.2)
    assert torch.allclose(
        own(torch.zeros(3, 1), SIGMA, lambda names: estimates), torch.tensor(17.0, dtype=torch.float64)
    )


def test_the_step_index_is_read_from_the_grid() -> None:
    sigmas = torch.tensor([10.0, 5.0, 1.0, 0.0])
    assert [step_index(torch.tensor([s]), sigmas) for s in (10.0, 7.0, 5.0, 1.0, 0.0)] == [0, 1, 1, 2, 3]
    assert step_index(torch.tensor([1.0]), None) is None


def test_a_condition_of_another_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 2 for a batch of 3"):
        Guider(Recorder(), [])(latents(), SIGMA, cond_of(2.0, 2))


class LearnsItsVariance(Recorder):
    def with_variance(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        denoised = self(x, sigma, cond)
        return denoised, cond.reshape(-1, 1, 1, 1).expand_as(x)  # type: ignore[union-attr]


def test_a_learned_variance_is_the_conditional_branchs() -> None:
    model = LearnsItsVariance()
    guider = Guider(model, [CFG(guidance_scale=3.0)], uncond=cond_of(0.5))
    denoised, variance = guider.with_variance(latents(), SIGMA, cond_of(0.25))
    assert torch.equal(denoised, guider(latents(), SIGMA, cond_of(0.25)))
    assert torch.equal(variance, torch.full_like(variance, 0.25)) and model.batches == [6, 6]
    with pytest.raises(UserError, match="predicts no variance"):
        Guider(Recorder(), []).with_variance(latents(), SIGMA, cond_of(0.25))


class Adds(Rule):
    """A rule after COMBINE that adds the estimates of its own branches, at noise levels up to 1."""

    stage: ClassVar[Stage] = Stage.POST
    node: ClassVar[NodeText] = NodeText("LGAdds", "Adds", "", "", "")

    def __init__(self, *own: Branch) -> None:
        self.own = own

    def branches(self) -> tuple[Branch, ...]:
        return self.own

    def does_the_same_as(self, other: Rule) -> bool:
        return False

    def asks(self, step: Step) -> frozenset[str]:
        return super().asks(step) if bool((step.sigma <= 1).any()) else frozenset()

    def apply(self, step: Step) -> Tensor:
        found = [step.estimates[branch.name] for branch in self.own if branch.name in step.estimates]
        return sum(found, start=step.denoised)


def test_further_branches_cost_one_call_of_each_model_and_only_when_asked_for() -> None:
    model, other = Recorder(), Recorder()
    middle = cond_of(0.25)
    rule = Adds(Branch(middle), Branch("cond", other), Branch("uncond", other), Branch(middle, other))
    guider = Guider(model, [CFG(guidance_scale=3.0), rule], uncond=cond_of(0.5))
    out = guider(latents(), SIGMA / 2, cond_of(2.0))
    torch.testing.assert_close(out, (5.0 + 0.25 + 2.0 + 0.5 + 0.25) * latents())
    assert model.batches == [9] and other.batches == [9]
    outside = guider(latents(), SIGMA, cond_of(2.0))
    torch.testing.assert_close(outside, 5.0 * latents())
    assert model.batches == [9, 6] and other.batches == [9]


def test_equal_requests_of_two_rules_are_one_evaluation_and_others_are_not() -> None:
    model, middle = Recorder(), cond_of(0.25)
    Guider(model, [Adds(Branch(middle)), Adds(Branch(middle))])(latents(), SIGMA / 2, cond_of(2.0))
    Guider(model, [Adds(Branch(middle)), Adds(Branch(cond_of(0.25)))])(latents(), SIGMA / 2, cond_of(2.0))
    assert model.batches == [6, 9]


def test_a_rules_own_model_is_made_for_the_run_too(classifier: SmallClassifier) -> None:
    weak = Guider(Recorder(), [ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", every_k=2)])
    sigmas = torch.tensor([0.9, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
    run = Guider(Recorder(), [Adds(Branch("cond", weak))]).begin(sigmas)
    for sigma in sigmas[:-1]:
        run(latents(), sigma.expand(3), cond_of(2.0))
    assert len(classifier.calls) == 2


def test_a_branch_that_cannot_be_evaluated_is_refused_before_the_first_step() -> None:
    class Flow(Recorder):
        process: Process = RECTIFIED_FLOW

    for branch, words in (
        (Branch("cond", Flow()), "rectified flow"),
        (Branch("cond", object()), "object as a rule's own model"),
        (Branch([["tokens", {}]]), "of type list"),
    ):
        with pytest.raises(UserError, match=words):
            Guider(Recorder(), [Adds(branch)])
    model = Recorder()
    with pytest.raises(UserError, match="unconditional"):
        Guider(model, [Adds(Branch("uncond", Recorder()))])(latents(), SIGMA / 2, cond_of(2.0))
    assert model.batches == [] and GuidanceRun([Adds(Branch("uncond", Recorder()))], VE_SCALED).may_need_uncond


def test_rules_that_change_the_two_branches_are_refused_beside_one_that_goes_by_others() -> None:
    two = TwoConditions(condition=cond_of(0.9))
    with pytest.raises(
        UserError, match=r"'Sliding.*', which goes by prompt and negative, beside 'Two-Condition Guidance'"
    ):
        Guider(Recorder(), [two, SlidingModeCFG()], uncond=cond_of(0.5))
    Guider(Recorder(), [two, RescaleGuidance(), LimitedInterval()], uncond=cond_of(0.5))
    with pytest.raises(UserError, match="at most one"):
        Guider(Recorder(), [two, CFG()])


def test_rules_with_branches_of_their_own_are_refused_on_a_model() -> None:
    with pytest.raises(UserError, match=r"'Two-Condition Guidance' on a model"):
        check_on_model([CFG(), TwoConditions(condition=cond_of(0.9))])
    check_on_model([CFG()])


def test_a_variance_is_the_conditional_branchs_among_further_ones_too() -> None:
    model = LearnsItsVariance()
    guider = Guider(
        model, [Adds(Branch(cond_of(0.75)), Branch("cond", Recorder())), CFG(guidance_scale=3.0)], uncond=cond_of(0.5)
    )
    _, variance = guider.with_variance(latents(), SIGMA / 2, cond_of(0.25))
    assert torch.equal(variance, torch.full_like(variance, 0.25)) and model.batches == [9]
