"""What a chain costs in network passes, said before the run, against the calls that a run really makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from latent_guidance.guidance import (
    CFG,
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    Autoguidance,
    ClassifierGuidance,
    GuidanceCurve,
    GuidanceRun,
    GuidanceSchedule,
    Guider,
    LimitedInterval,
    PerpNeg,
    RescaleGuidance,
    Rule,
    TwoConditions,
)
from latent_guidance.guidance.passes import noise_range, passes
from latent_guidance.process import VE_SCALED
from latent_guidance.samplers import Recurrence, sample_ddim_cfg_pp, sample_euler

from .conftest import SmallClassifier, latents
from .test_run import Recorder, cond_of

SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
WEAK = Recorder()


def window(lo: float = 0.4, hi: float = 3.0) -> LimitedInterval:
    return LimitedInterval(sigma_lo=lo, sigma_hi=hi)


CHAINS: dict[str, tuple[Callable[[], list[Rule]], list[int]]] = {
    "nothing": (lambda: [], [1] * 6),
    "cfg": (lambda: [CFG(guidance_scale=4.0)], [2] * 6),
    "cfg at 1": (lambda: [CFG(guidance_scale=1.0)], [1] * 6),
    "cfg at 0": (lambda: [CFG(guidance_scale=0.0)], [2] * 6),
    "interval": (lambda: [CFG(guidance_scale=4.0), window()], [1, 1, 2, 2, 2, 1]),
    "two intervals": (lambda: [CFG(guidance_scale=4.0), window(), window(0.4, 1.5)], [1, 1, 1, 2, 2, 1]),
    "post rules cost nothing": (lambda: [CFG(guidance_scale=4.0), RescaleGuidance(), AdaptiveProjectedGuidance()], [2] * 6),
    "a classifier makes no pass": (
        lambda: [ClassifierGuidance(scaling="raw", classifier=SmallClassifier(), label="cat")], [1] * 6,
    ),
    "a curve that ends at 1": (
        lambda: [CFG(guidance_scale=4.0), GuidanceCurve(curve="8: 4, 1: 1")], [2, 2, 2, 1, 1, 1],
    ),
    "a schedule over steps": (
        lambda: [CFG(guidance_scale=4.0), GuidanceSchedule(shape="linear", over="steps", floor=1.0)], [1, 2, 2, 2, 2, 2],
    ),
    "two conditions": (lambda: [TwoConditions(condition=cond_of(0.9))], [3] * 6),
    "two conditions in a window": (lambda: [TwoConditions(condition=cond_of(0.9)), window()], [1, 1, 3, 3, 3, 1]),
    "perp-neg": (lambda: [PerpNeg(negative=cond_of(0.1))], [3] * 6),
    "autoguidance": (lambda: [Autoguidance(weak_model=WEAK), window()], [1, 1, 2, 2, 2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_the_count_is_what_a_run_makes(name: str) -> None:
    make, expected = CHAINS[name]
    model = Recorder()
    WEAK.batches.clear()
    guider = Guider(model, make(), uncond=cond_of(0.5), report=True)
    said = guider.passes(SIGMAS)
    sample_euler(guider, 8 * latents(), SIGMAS, cond=cond_of(2.0))
    [chain] = guider.report.chains
    assert list(said.counts) == expected == [row["passes"] for row in chain.rows]
    assert said.total == (sum(model.batches) + sum(WEAK.batches)) // 3 == chain.passes
    assert [list(names) for names in said.branches] == [row["branches"] for row in chain.rows]


def test_samplers_that_call_more_often_or_ask_for_more() -> None:
    model = Recorder()
    guider = Guider(model, [CFG(guidance_scale=4.0), window()], uncond=cond_of(0.5))
    twice = Recurrence(2, sigma_lo=0.7)
    sample_euler(
        guider, 8 * latents(), SIGMAS, cond=cond_of(2.0), recurrence=twice, noise_sampler=lambda a, b: 8 * latents()
    )
    said = guider.passes(SIGMAS, levels=twice.levels(model.process, SIGMAS))
    assert list(said.counts) == [1, 1, 1, 1, 2, 2, 2, 2, 2, 1]
    assert said.total == sum(model.batches) // 3
    model.batches.clear()
    sample_ddim_cfg_pp(guider, 8 * latents(), SIGMAS, cond=cond_of(2.0))
    said = guider.passes(SIGMAS, with_uncond=True)
    assert list(said.counts) == [2] * 6 and said.total == sum(model.batches) // 3 > guider.passes(SIGMAS).total


def test_what_a_rule_may_spare_is_a_bound_and_said_to_be() -> None:
    model = Recorder()
    guider = Guider(model, [CFG(guidance_scale=4.0), AdaptiveGuidance(threshold=0.5)], uncond=cond_of(0.5))
    sample_euler(guider, 8 * latents(), SIGMAS, cond=cond_of(2.0))
    said = guider.passes(SIGMAS)
    assert said.total == 12 and sum(model.batches) // 3 == 7
    assert said.sparing == ("Adaptive Guidance",) and "fewer once Adaptive Guidance" in said.text
    assert Guider(model, [AdaptiveGuidance()]).passes(SIGMAS).sparing == (), (
        "there is nothing to spare without guidance"
    )


def asked(rules: list[Rule], **more) -> str:  # noqa: ANN003
    run = GuidanceRun(rules, VE_SCALED)
    return passes(run, noise_range(run, 14.6, 0.03), **more).text


def test_the_text_names_branches_and_where_they_are_made() -> None:
    assert asked([]) == "1 network pass a step: positive"
    assert asked([CFG(guidance_scale=4.0)]) == "2 network passes a step: positive, negative"
    assert asked([CFG(guidance_scale=4.0), LimitedInterval(sigma_lo=0.28, sigma_hi=5.42)]).splitlines() == [
        "at most 2 network passes a step",
        "sigma above 5.4: 1 (positive)",
        "sigma 5.4 to 0.28: 2 (positive, negative)",
        "sigma below 0.28: 1 (positive)",
    ]
    text = asked(
        [CFG(guidance_scale=4.0), ClassifierGuidance(scaling="raw", classifier=SmallClassifier(), label="cat")]
    )
    assert text.splitlines()[1] == "besides, a network of their own is called by: Classifier Guidance"


def test_conditions_of_several_parts_cost_each_of_them_and_a_host_may_add_a_branch() -> None:
    both = {"cond": 2, "uncond": 3}
    assert asked([CFG(guidance_scale=4.0)], entries=both).startswith("5 network passes")
    assert asked([], entries=both).startswith("2 network passes a step: positive")
    assert asked([], entries=both, always=frozenset({"uncond"})).startswith("5 network passes")


def test_many_ranges_are_summed_up() -> None:
    curve = ", ".join(
        f"{sigma}: {1 + i % 2}, {sigma / 1.01}: {1 + i % 2}" for i, sigma in enumerate([14, 9, 5, 3, 2, 1, 0.5, 0.2])
    )
    text = asked([CFG(guidance_scale=4.0), GuidanceCurve(curve=curve, interpolation="steps")])
    assert text == "1 to 2 network passes a step"
