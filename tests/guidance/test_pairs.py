"""Every pair of rules on one chain: compatible ones run together and both act, in any order; others are refused by name.

Made from RULES: a new rule joins by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, RULES, GuidanceRun, Rule, Stage, check_chain
from latent_guidance.guidance.steps import sampler_options
from latent_guidance.process import VE_SCALED
from latent_guidance.samplers import sample_ddpm

from .conftest import latents
from .test_conformance import estimates_of, make

LEVELS = torch.tensor([12.0, 3.0, 0.9, 0.3, 0.1, 0.0], dtype=torch.float64)
PAIRS = list(itertools.combinations(RULES, 2))
ACTS = 1e-9
STRONGER: dict[str, dict[str, object]] = {
    "LGAdaptiveGuidance": {"threshold": 0.0},
    "LGDynamicThresholding": {"plain_scale": 1.0, "percentile": 0.8},
}
"""Where the defaults have no effect on these estimates."""


def name_of(rule_class: type[Rule]) -> str:
    return rule_class.node.id


@functools.cache
def the(rule_class: type[Rule]) -> Rule:
    return make(rule_class, **STRONGER.get(rule_class.node.id, {}))


def with_cfg(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules with a strong CFG before them, if none of them combines the branches."""
    combines = any(rule.stage is Stage.COMBINE for rule in rules)
    return tuple(rules) if combines else (CFG(guidance_scale=9.0), *rules)


class Guided:
    """The estimates that a chain guides, as the denoiser of a run."""

    process = VE_SCALED

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.run = GuidanceRun(rules, VE_SCALED, sigmas=LEVELS)

    def __call__(self, x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        def evaluate(names: tuple[str, ...], at: Tensor, _sigma: Tensor) -> Mapping[str, Tensor]:
            return estimates_of(names, at / 3)

        return self.run(x, sigma, lambda names: evaluate(names, x, sigma), differentiable=evaluate)


def sampled(*rules: Rule) -> Tensor:
    """The end of a short run of the chain, with CFG if nothing combines; deterministic, noise of the steps included."""
    at_step = [rule for rule in rules if rule.stage is Stage.STEP]
    denoiser = Guided(with_cfg([rule for rule in rules if rule.stage is not Stage.STEP]))
    still = sampler_options(at_step, VE_SCALED, LEVELS)
    return sample_ddpm(denoiser, latents() * LEVELS[0], LEVELS, noise_sampler=lambda *_: latents(seed=1), **still)


@functools.cache
def alone(rule_class: type[Rule] | None) -> Tensor:
    return sampled() if rule_class is None else sampled(the(rule_class))


def refusal(first: type[Rule], second: type[Rule]) -> UserError | None:
    """Why the two cannot be in one chain."""
    try:
        check_chain([rule for rule in (the(first), the(second)) if rule.stage is not Stage.STEP])
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("rule_class", RULES, ids=name_of)
def test_each_rule_alone_acts_on_this_run(rule_class: type[Rule]) -> None:
    """Else a pair with it would show nothing."""
    out = alone(rule_class)
    assert torch.isfinite(out).all()
    if rule_class is not CFG:
        assert (out - alone(None)).abs().max() > ACTS
    else:
        assert (out - sampled(CFG(guidance_scale=1.0))).abs().max() > ACTS


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{name_of(a)}-{name_of(b)}" for a, b in PAIRS])
def test_a_pair_acts_together_or_is_refused_by_name(first: type[Rule], second: type[Rule]) -> None:
    error = refusal(first, second)
    if error is not None:
        assert first.node.name in str(error) and second.node.name in str(error)
        return
    both, swapped = sampled(the(first), the(second)), sampled(the(second), the(first))
    assert torch.isfinite(both).all()
    if first.stage is not second.stage:
        torch.testing.assert_close(both, swapped, rtol=0, atol=1e-9)
    else:
        assert torch.isfinite(swapped).all()
    for other in (first, second):
        seen = (both - alone(other)).abs().max() > ACTS
        assert seen or CFG in (first, second), (
            f"{other.node.name} alone gives the same: the other one has no effect beside it"
        )


def test_some_pairs_are_refused_and_most_are_not() -> None:
    refused = [pair for pair in PAIRS if refusal(*pair) is not None]
    assert 0 < len(refused) < len(PAIRS) / 2
    combining = [rule_class for rule_class in RULES if rule_class.stage is Stage.COMBINE]
    assert all(pair in refused for pair in itertools.combinations(combining, 2))
