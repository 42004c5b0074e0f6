"""The unconditional estimate beside the guided one, for samplers that go by it (CFG++): from the library's Guider and the embedded host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    AdaptiveGuidance,
    Autoguidance,
    GuidanceCurve,
    GuidanceSchedule,
    Guider,
    LimitedInterval,
    MagnitudeAwareGuidance,
    SlidingModeCFG,
    TangentialCFG,
    check_by_uncond,
)
from latent_guidance.guidance.base import Rule

from .conftest import latents
from .test_run import SIGMA, Recorder, cond_of


def guider(model: Recorder, *rules: Rule) -> Guider:
    return Guider(model, rules, uncond=cond_of(0.5))


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 4.0])
def test_both_estimates_in_one_call_whatever_the_scale(scale: float) -> None:
    model = Recorder()
    denoised, uncond = guider(model, CFG(guidance_scale=scale)).with_uncond(latents(), SIGMA, cond_of(2.0))
    assert model.batches == [6]
    assert torch.equal(uncond, 0.5 * latents())
    assert torch.equal(denoised, guider(Recorder(), CFG(guidance_scale=scale))(latents(), SIGMA, cond_of(2.0)))


def test_it_is_the_models_own_and_not_what_rules_make_of_it() -> None:
    """Tangential damping changes the negative that CFG goes from; noise is taken from the model's."""

    class Curved(Recorder):
        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return torch.sin(super().__call__(x, sigma, cond))

    rules = (CFG(guidance_scale=3.0), TangentialCFG(damping=1.0))
    denoised, uncond = guider(Curved(), *rules).with_uncond(latents(), SIGMA, cond_of(2.0))
    assert torch.equal(uncond, Curved()(latents(), SIGMA, cond_of(0.5, 3)))
    plain, _ = guider(Curved(), rules[0]).with_uncond(latents(), SIGMA, cond_of(2.0))
    assert (denoised - plain).abs().max() > 1e-2


def test_a_rule_that_goes_by_another_model_leaves_the_negative_as_it_is() -> None:
    model, weak = Recorder(), Recorder()
    rule = Autoguidance(weak_model=weak, guidance_scale=3.0)
    denoised, uncond = guider(model, rule).with_uncond(latents(), SIGMA, cond_of(2.0))
    assert torch.equal(uncond, 0.5 * latents()) and model.batches == [6] and weak.batches == [3]
    assert torch.equal(denoised, guider(Recorder(), rule)(latents(), SIGMA, cond_of(2.0)))


def test_rules_do_not_see_what_they_did_not_ask_for() -> None:
    """Outside its interval sliding-mode control must not move, though the branch is evaluated there for the sampler."""
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    rules = (
        CFG(guidance_scale=3.0),
        LimitedInterval(sigma_lo=0.1, sigma_hi=1.5),
        SlidingModeCFG(gain=0.2, slope=5.0, switching="sign"),
    )
    asked, alone = guider(Recorder(), *rules).begin(sigmas), guider(Recorder(), *rules).begin(sigmas)
    for sigma in sigmas[:-1]:
        x = latents() * sigma
        both = asked.with_uncond(x, sigma.expand(3), cond_of(2.0))[0]
        assert torch.equal(both, alone(x, sigma.expand(3), cond_of(2.0)))


def test_without_an_unconditional_condition_the_network_is_not_called() -> None:
    model = Recorder()
    with pytest.raises(UserError, match=r"a sampler that needs an unconditional estimate.*sampler without CFG"):
        Guider(model, []).with_uncond(latents(), SIGMA, cond_of(2.0))
    assert model.batches == []


@pytest.mark.parametrize(
    "rule",
    [LimitedInterval(), AdaptiveGuidance(), MagnitudeAwareGuidance(), GuidanceSchedule()],
    ids=lambda rule: rule.node.id,
)
def test_rules_whose_rest_is_scale_1_are_refused_with_cfg_pp(rule: Rule) -> None:
    """There scale 1 is strong guidance: outside its interval Limited Interval would guide most."""
    with pytest.raises(UserError, match=f"{rule.node.name}.*Guidance Curve"):
        check_by_uncond([CFG(), rule])
    check_by_uncond([CFG(), GuidanceCurve(), TangentialCFG()])
