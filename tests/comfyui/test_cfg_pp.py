"""CFG++ and recurrence inside a real ComfyUI: equal to core's samplers where these are right, in every guider, and refused with words."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME

KINDS = ["euler", "ancestral", "2m"]
CORE = [
    "euler_cfg_pp",
    "euler_ancestral_cfg_pp",
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation_cfg_pp",
]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_cores_sampler_and_in_every_guider(measured: dict[str, Any], kind: str) -> None:
    for way in ("core's sampler", "in our guider", "rule on the model"):
        assert measured[f"{kind}: {way}"] <= SAME, way
    assert measured[f"{kind} at scale 1"] <= SAME
    assert measured[f"{kind} is not plain"] >= DIFFERENT and measured["at scale 1, not plain"] >= DIFFERENT


@pytest.mark.parametrize("name", CORE)
def test_cores_own_cfg_pp_samplers_in_our_guider(measured: dict[str, Any], name: str) -> None:
    assert measured[f"core's {name} in our guider"] <= SAME
    message = measured[f"refused: core's {name} without a negative"]
    assert message.startswith("UserError: ") and "no negative conditioning" in message


def test_core_itself_takes_zeros_for_a_missing_negative(measured: dict[str, Any]) -> None:
    """The fault that our guider and samplers lack: under BasicGuider core's run goes through, on an estimate of zeros."""
    assert measured["core takes zeros for a missing negative"] == ""


def test_a_rule_that_changes_the_negative_leaves_the_noise_to_the_models_own(measured: dict[str, Any]) -> None:
    assert measured["a rule that changes the negative acts"] >= DIFFERENT
    assert measured["a rule that changes the negative: on the model"] <= SAME
    assert measured["a rule that changes the negative: core's sampler"] <= SAME


def test_with_a_mask(measured: dict[str, Any]) -> None:
    assert measured["masked"] <= SAME


def test_both_branches_in_one_call_at_scale_1(measured: dict[str, Any]) -> None:
    assert measured["batches"] == [4] * 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("our guider without a negative", ["CFG++", "Null Conditioning"]),
        ("basic", ["CFG++", "CFGGuider", "BasicGuider"]),
        ("interval", ["Limited Interval", "Guidance Curve"]),
        ("interval on the model", ["Limited Interval", "Guidance Curve"]),
        ("rectified on eps", ["VE-scaled", "flow model", "CFG++ sampler"]),
    ],
)
def test_refused_before_the_first_step(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: ") and all(word in message for word in words), message
    assert measured["batches of what was refused"] == []


def test_rules_that_rest_at_one_are_refused_under_cores_cfg_pp_too(measured: dict[str, Any]) -> None:
    messages = {name: message for name, message in measured.items() if name.startswith("refused: interval")}
    assert len(messages) >= 2 + 2 * 6
    for name, message in messages.items():
        assert message.startswith("UserError: ") and "Limited Interval" in message, (name, message)
    assert measured["interval, no cfg++"] == ""


def test_rectified_is_refused_under_a_guider_that_guides_by_itself(measured: dict[str, Any]) -> None:
    for message, scale in zip(measured["flow: rectified under cfg"], ("8", "4"), strict=True):
        assert message.startswith("UserError: ") and f"scale is {scale}," in message, message


def test_recurrence_reports_a_step_every_time_and_ends_with_the_steps(measured: dict[str, Any]) -> None:
    assert measured["steps reported"] == [[step, 5] for step in range(5) for _ in range(2)]


def test_recurrence_once_is_the_sampler_and_twice_is_not(measured: dict[str, Any]) -> None:
    assert measured["recurrence once"] == 0 and measured["recurrence acts"] >= DIFFERENT


@pytest.mark.parametrize("name", ["ddim", "cfg++"])
def test_recurrence_draws_each_pictures_own_noise(measured: dict[str, Any], name: str) -> None:
    assert measured[f"recurrence, {name}: item 1 of a batch, alone"] <= SAME
    assert measured[f"recurrence, {name}: items differ"] >= DIFFERENT


@pytest.mark.parametrize("start", ["from 1", "from below 1"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_flow(measured: dict[str, Any], start: str, kind: str) -> None:
    assert measured[f"flow {start}, {kind}: finite"]
    if kind != "2m":
        assert measured[f"flow {start}, {kind}: core's sampler"] <= SAME


def test_cores_2m_noises_flow_models_with_the_velocity(measured: dict[str, Any]) -> None:
    """The fault: one step of "dpmpp_2m_cfg_pp" is none of "euler_cfg_pp", though a first step has no second order. Ours is."""
    assert measured["flow: one step of 2m is one of euler"] <= SAME
    assert measured["flow: core's one step of 2m is one of euler"] >= DIFFERENT


def test_rectified_on_flow(measured: dict[str, Any]) -> None:
    assert measured["flow: batches of rectified"] == [2, 4] * 5
    assert measured["flow: rectified acts"] >= DIFFERENT
    assert measured["flow: rectified in our guider"] <= SAME and measured["flow: rectified at scale 0"] <= SAME
