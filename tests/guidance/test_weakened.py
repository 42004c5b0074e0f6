"""What all weakened passes share: they add up with other guidance, share its call, cost nothing when idle, and are refused where
a network's attention cannot be reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.attention import AttentionPatch, permutation
from latent_guidance.denoiser import NetworkDenoiser
from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    Autoguidance,
    Branch,
    ClassifierGuidance,
    GuidanceRun,
    Guider,
    LimitedInterval,
    PerturbedAttention,
    Rule,
    SkippedLayers,
    SlidingModeCFG,
    SlidingWindow,
    SmoothedEnergy,
    TokenPerturbation,
    TwoConditions,
    WeakenedPass,
    check_on_model,
)
from latent_guidance.guidance.weakened import away_from
from latent_guidance.process import VE_SCALED
from latent_guidance.samplers import sample_euler

from .conftest import SHAPES, SmallClassifier, drawn
from .networks import SIGMA, noisy, small_denoiser, small_unet, words
from .test_run import Recorder

RULES: list[type[WeakenedPass]] = [PerturbedAttention, SmoothedEnergy, SkippedLayers, TokenPerturbation, SlidingWindow]
ATTENTION = RULES[:-1]
SIGMAS = torch.tensor([8.0, 2.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def denoiser() -> NetworkDenoiser:
    return small_denoiser()


def calls(denoiser: Any) -> list[tuple[int, ...]]:
    found = denoiser.network.calls[:]
    denoiser.network.calls.clear()
    return found


def weak_estimate(denoiser: Any, rule: WeakenedPass, x: Tensor, cond: Tensor, *, step: int = 0) -> Tensor:
    """What the rule is to lead away from, by a call of its own."""
    [branch] = rule.branches()
    if branch.windows is not None:
        parts = [
            denoiser(x[..., t : t + h, s : s + w], SIGMA, cond.expand(2, -1, -1))
            for t, s, h, w in branch.windows.boxes(*x.shape[-2:])
        ]
        return branch.windows.joined(torch.cat(parts), *x.shape[-2:])
    patch = branch.attention
    assert patch is not None
    with denoiser.patched([AttentionPatch(patch.op, patch.layers, patch.blur_sigma, patch.seed, step)]):
        return denoiser(x, SIGMA, cond.expand(2, -1, -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula(shape: tuple[int, ...]) -> None:
    guided, cond, weak = (drawn(3, *shape, seed=i) for i in range(3))
    scale = torch.tensor([0.0, 2.5, -1.0], dtype=torch.float64)
    out = away_from(guided, cond, weak, scale)
    assert torch.equal(out[0], guided[0])
    torch.testing.assert_close(out[1], guided[1] + 2.5 * cond[1] - 2.5 * weak[1])
    torch.testing.assert_close(out[2], guided[2] - cond[2] + weak[2])


@pytest.mark.parametrize("rule_class", RULES)
def test_it_adds_up_with_cfg_and_counts_from_nought_without(rule_class: type[WeakenedPass], denoiser: Any) -> None:
    """diffusers' guiders count from the weak estimate where there is no CFG: their 1 is neutral there."""
    rule, x, cond, uncond = rule_class(scale=2.0), noisy(), words(1), words(2)
    if isinstance(rule, SlidingWindow):
        rule = SlidingWindow(scale=2.0, masked=False)
    own = [denoiser(x, SIGMA, tokens.expand(2, -1, -1)) for tokens in (cond, uncond)]
    weak = weak_estimate(denoiser, rule, x, cond)
    assert (weak - own[0]).abs().max() > 1e-3
    alone = Guider(denoiser, [rule])(x, SIGMA, cond)
    torch.testing.assert_close(alone, own[0] + 2 * (own[0] - weak), rtol=1e-4, atol=1e-5)
    both = Guider(denoiser, [CFG(guidance_scale=3.0), rule], uncond=uncond)(x, SIGMA, cond)
    expected = own[1] + 3 * (own[0] - own[1]) + 2 * (own[0] - weak)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=2e-5)
    first_slg = own[1] + 3 * (own[0] - own[1])  # Stability AI's first code went from the guided estimate
    assert ((first_slg + 2 * (first_slg - weak)) - both).abs().max() > 1e-3


@pytest.mark.parametrize("rule_class", ATTENTION)
def test_it_shares_one_call_and_costs_nothing_when_idle(rule_class: type[WeakenedPass], denoiser: Any) -> None:
    rule, x = rule_class(), noisy()
    calls(denoiser)
    Guider(denoiser, [CFG(guidance_scale=3.0), rule], uncond=words(2, length=5))(x, SIGMA, words(1))
    assert calls(denoiser) == [(6, 6, 8)]
    plain = Guider(denoiser, [])(x, SIGMA, words(1))
    for idle in (rule_class(scale=0.0), rule_class(sigma_lo=3.0), rule_class(sigma_hi=1.9)):
        calls(denoiser)
        assert torch.equal(Guider(denoiser, [idle])(x, SIGMA, words(1)), plain)
        assert calls(denoiser) == [(2, 6, 8)]
    Guider(denoiser, [rule_class(sigma_lo=1.0, sigma_hi=2.0)])(x, SIGMA, words(1))
    assert calls(denoiser) == [(4, 6, 8)]
    assert GuidanceRun([rule_class(scale=0.0)], VE_SCALED).may_ask == frozenset()


def test_several_weakened_passes_share_one_call_and_equal_ones_one_pass(denoiser: Any) -> None:
    x, cond = noisy(), words(1)
    rules: list[Rule] = [PerturbedAttention(scale=1.0), SkippedLayers(scale=2.0, skip="attention"), SmoothedEnergy()]
    calls(denoiser)
    out = Guider(denoiser, rules)(x, SIGMA, cond)
    assert calls(denoiser) == [(6, 6, 8)]
    own = denoiser(x, SIGMA, cond.expand(2, -1, -1))
    weak = [weak_estimate(denoiser, rule, x, cond) for rule in (PerturbedAttention(), SmoothedEnergy())]
    expected = own + 3 * (own - weak[0]) + 3 * (own - weak[1])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


def test_samples_inside_and_outside_the_window_are_told_apart(denoiser: Any) -> None:
    rule = PerturbedAttention(sigma_hi=2.0)
    levels = torch.tensor([2.0, 4.0])
    out = Guider(denoiser, [rule])(noisy(), levels, words(1))
    plain = Guider(denoiser, [])(noisy(), levels, words(1))
    # its batch holds one more pass, so the network rounds otherwise: equal to rounding, not bit by bit
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=1e-5)
    assert (out[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("rule_class", RULES)
def test_two_runs_are_the_same_whatever_else_is_in_the_batch(rule_class: type[WeakenedPass], denoiser: Any) -> None:
    """The token shuffle of the authors' code is drawn from torch's global generator."""
    guider = Guider(denoiser, [rule_class()])
    x = noisy() * 3
    first = sample_euler(guider, x, SIGMAS, words(1))
    torch.manual_seed(1)
    assert torch.isfinite(first).all() and torch.equal(first, sample_euler(guider, x, SIGMAS, words(1)))
    torch.testing.assert_close(sample_euler(guider, x[1:], SIGMAS, words(1)), first[1:], rtol=1e-3, atol=1e-4)


def test_the_difference_is_that_of_the_networks_estimates_even_where_a_rule_changes_the_conditional_one(
    denoiser: Any,
) -> None:
    chain = [CFG(guidance_scale=3.0), SlidingModeCFG(), PerturbedAttention(scale=2.0)]
    x, cond = noisy(), words(1)
    both, without = (Guider(denoiser, rules, uncond=words(2))(x, SIGMA, cond) for rules in (chain, chain[:2]))
    own = denoiser(x, SIGMA, cond.expand(2, -1, -1))
    expected = without + 2 * (own - weak_estimate(denoiser, PerturbedAttention(), x, cond))
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rule_class", ATTENTION)
def test_networks_without_such_layers_are_refused_before_the_first_step(rule_class: type[WeakenedPass]) -> None:
    for model in (Recorder(), NetworkDenoiser(lambda x, t, c: x, *_schedule())):
        with pytest.raises(UserError, match="which does not let that be changed"):
            Guider(model, [rule_class()])
        Guider(model, [SlidingWindow()])
    with pytest.raises(UserError, match="d0 to d1, m0, u0 to u3"):
        Guider(small_denoiser(), [rule_class(layers="d0-d7")])
    with pytest.raises(UserError, match="without transformer blocks"):
        Guider(small_denoiser(small_unet(attention=(False, False))), [rule_class()])
    with pytest.raises(UserError, match="middle, down, up or all"):
        rule_class(layers="left")


def _schedule() -> tuple[Any, Any]:
    denoiser = small_denoiser()
    return denoiser.parameterization, denoiser.schedule


def test_they_act_on_a_model_and_rules_with_conditions_of_their_own_do_not() -> None:
    check_on_model([CFG(), *(rule() for rule in RULES)])
    for rule in (TwoConditions(condition=words(1)), Autoguidance(weak_model=Recorder())):
        with pytest.raises(UserError, match="on a model"):
            check_on_model([PerturbedAttention(), rule])


def test_a_weak_model_may_be_weakened_further_and_patches_are_asked_of_it(denoiser: Any) -> None:
    class Both(PerturbedAttention):
        def branches(self) -> tuple[Branch, ...]:
            return (Branch("cond", denoiser, self.patch()),)

    main = small_denoiser()
    out = Guider(main, [Both(scale=2.0)])(noisy(), SIGMA, words(1))
    torch.testing.assert_close(out, Guider(main, [PerturbedAttention(scale=2.0)])(noisy(), SIGMA, words(1)))
    assert calls(main) == [(2, 6, 8), (4, 6, 8)]


def test_beside_a_limited_interval_and_a_classifier(denoiser: Any) -> None:
    """The interval is that of the guidance scale; a weakened pass has a window of its own."""
    calls(denoiser)
    chain = [CFG(guidance_scale=3.0), LimitedInterval(sigma_hi=1.0), PerturbedAttention()]
    Guider(denoiser, chain, uncond=words(2))(noisy(), SIGMA, words(1))
    assert calls(denoiser) == [(4, 6, 8)]
    classifier = ClassifierGuidance(scaling="raw", classifier=SmallClassifier(dtype=torch.float32), label="cat")
    out = Guider(denoiser, [classifier, PerturbedAttention()])(noisy(), SIGMA, words(1))
    shift = out - Guider(denoiser, [PerturbedAttention()])(noisy(), SIGMA, words(1))
    plain = Guider(denoiser, [])(noisy(), SIGMA, words(1))
    torch.testing.assert_close(
        shift, Guider(denoiser, [classifier])(noisy(), SIGMA, words(1)) - plain, rtol=1e-3, atol=1e-5
    )


def test_a_shuffle_is_drawn_anew_at_every_step_of_a_run_and_for_each_sample() -> None:
    [branch] = TokenPerturbation(seed=5).branches()
    levels = torch.tensor([8.0, 0.5])
    steps = [patch and patch.step for patch in branch.patches(levels, SIGMAS)]
    assert steps == [0, 2] and [patch and patch.step for patch in branch.patches(levels, None)] == [0, 0]
    patches = [patch for patch in branch.patches(levels, SIGMAS) if patch]
    assert not torch.equal(permutation(12, patches[0], "m0"), permutation(12, patches[1], "m0"))
    [other] = PerturbedAttention().branches()
    assert other.patches(levels, SIGMAS) == [AttentionPatch("identity")] * 2


def test_the_passes_of_a_chain_are_counted_before_it_runs_and_as_they_are_made(denoiser: Any) -> None:
    """Every window is a pass; a closed window of noise levels and a neutral rule cost none."""
    rules = [
        CFG(guidance_scale=3.0),
        PerturbedAttention(sigma_hi=2.0),
        SkippedLayers(scale=1.0, skip="attention", sigma_hi=1.0),  # the pass of perturbed attention
        TokenPerturbation(scale=0.0),
        SlidingWindow(windows=3, sigma_lo=1.0),
    ]
    guider = Guider(denoiser, rules, uncond=words(2), report=True)
    counted = guider.passes(SIGMAS)
    assert counted.counts == (2 + 9, 3 + 9, 3)
    assert counted.branches[2] == ("positive", "negative", "of Perturbed Attention (PAG) and Skipped Layers (SLG)")
    sample_euler(guider, noisy(height=8) * 3, SIGMAS, words(1))
    assert guider.report is not None and guider.report.chains[0].passes == 26
