"""The report and the cost in passes of a run in the embedded host: found by the latent, of the right run, and as counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    Autoguidance,
    ClassifierMeanShift,
    LimitedInterval,
    RescaleGuidance,
    Rule,
    TwoConditions,
)
from latent_guidance.guidance.report import REPORTS
from latent_guidance.host.branches import guider_passes
from latent_guidance.host.objects import GuiderNode, Noise
from latent_guidance.host.sampling import sample

from .test_sampling import EULER, calls, latent, model, tokens

SIGMAS = torch.tensor([8.0, 2.0, 0.4, 0.0])


def run(guider: GuiderNode) -> torch.Tensor:
    return sample(Noise(3), guider, EULER, SIGMAS, latent())[0]


def guider(*rules: Rule, **more: Any) -> GuiderNode:
    return GuiderNode(model(), tokens(1.0), tokens(0.25), rules, **more)


def test_a_run_is_found_by_its_latent_and_by_no_other() -> None:
    weak, strong = (run(guider(CFG(guidance_scale=w), report=True)) for w in (2.0, 3.0))
    unseen = run(guider(CFG(guidance_scale=4.0)))
    for samples, w in ((weak, 2.0), (strong, 3.0)):
        [chain] = REPORTS.find(samples).chains
        assert [row["guidance_scale"] for row in chain.rows] == [[w, w]] * 3
        assert chain.rules == ("Classifier-Free Guidance (CFG)",) and chain.passes == 6
    with pytest.raises(UserError, match="report"):
        REPORTS.find(unseen)


def test_rules_inside_the_samplers_steps_have_a_chain_of_their_own() -> None:
    """Where the guider keeps a report; without one, nothing is kept."""

    class Nothing(ClassifierMeanShift):
        def __init__(self) -> None:
            pass

        def networks(self) -> tuple[()]:
            return ()

        def check_latents(self, latents: object) -> None:
            pass

        def check_shape(self, shape: object) -> None:
            pass

    kept: list[object] = []

    def step_options(process: object, sigmas: torch.Tensor, record: object) -> dict[str, object]:
        kept.append(record)
        if record is not None:
            record.describe(["in the steps"], {})
            record.acted("in the steps", 0, sigmas[:1], torch.ones(1))
        return {}

    sampler = replace(EULER, step_rules=(Nothing(),), step_options=step_options)
    for report in (False, True):
        samples = sample(Noise(3), guider(CFG(guidance_scale=2.0), report=report), sampler, SIGMAS, latent())[0]
    assert kept[0] is None
    chains = REPORTS.find(samples).chains
    assert [chain.on for chain in chains] == ["guider", "sampler"]
    assert chains[1].rows[0]["contributions"] == {"in the steps": [1.0]}


def test_rules_on_the_model_are_in_the_chain_and_may_ask_for_the_report() -> None:
    patched = model().with_rules([RescaleGuidance()], report=True)
    for node in (
        GuiderNode(patched, tokens(1.0), tokens(0.25), (CFG(guidance_scale=3.0),)),
        GuiderNode(patched, tokens(1.0), tokens(0.25), cfg=3.0),
    ):
        [chain] = REPORTS.find(run(node)).chains
        assert chain.on == "guider" and min(chain.rows[0]["contributions"]["Rescale Guidance"]) > 0
        assert json.loads(REPORTS.find(run(node)).to_json())["chains"][0]["passes"] == 6


CHAINS: dict[str, tuple[Callable[[], list[Rule]], int]] = {
    "nothing": (lambda: [], 3),
    "cfg": (lambda: [CFG(guidance_scale=3.0)], 6),
    "interval": (lambda: [CFG(guidance_scale=3.0), LimitedInterval(sigma_lo=0.5, sigma_hi=5.0)], 4),
    "two conditions": (lambda: [TwoConditions(condition=tokens(0.5))], 9),
    "two conditions of two parts": (lambda: [TwoConditions(condition=[*tokens(0.5), *tokens(0.6)])], 12),
    "autoguidance": (lambda: [Autoguidance(weak_model=model())], 6),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_passes_that_are_said_are_those_that_are_made(name: str) -> None:
    make, expected = CHAINS[name]
    node = guider(*make(), report=True)
    samples = run(node)
    others = [branch.model for rule in node.rules for branch in rule.branches() if branch.model is not None]
    made = sum(len(x) for x, _, _ in calls(node))
    made += sum(len(x) for other in others for x, _, _ in calls(GuiderNode(other, tokens(1.0))))
    assert guider_passes(node, SIGMAS).total == made // 2 == REPORTS.find(samples).chains[0].passes == expected


def test_the_parts_of_a_prompt_are_passes_each_and_so_is_the_scale_of_a_stock_guider() -> None:
    node = GuiderNode(model(), [*tokens(1.0), *tokens(0.5)], tokens(0.25), cfg=3.0)
    run(node)
    assert guider_passes(node, SIGMAS).total == sum(len(x) for x, _, _ in calls(node)) // 2 == 9
    assert guider_passes(node).text == "3 network passes a step: positive, negative"
