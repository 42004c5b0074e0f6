"""Rules on a MODEL under core's guiders of three conditions or two models, and under one that listens to nobody."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME


@pytest.mark.parametrize("name", ["dual", "dual nested", "perp-neg"])
def test_a_gradient_is_added_to_what_the_guider_shows(measured: dict[str, Any], name: str) -> None:
    """Once; inside Dual CFG's nested style, the shown estimate and what was added are multiplied by its second scale."""
    assert measured["added"] >= DIFFERENT
    assert measured[f"{name}: adds"] <= SAME
    assert measured["dual nested: is not once"] >= DIFFERENT


@pytest.mark.parametrize("name", ["dual", "perp-neg"])
def test_it_is_the_rule_of_our_guider(measured: dict[str, Any], name: str) -> None:
    assert measured[f"{name}: the guider's rule"] <= SAME


def test_a_relative_strength_goes_by_the_estimate_that_is_shown(measured: dict[str, Any]) -> None:
    """Dual CFG shows what it has before its first condition is added; Perp-Neg shows the whole."""
    assert measured["relative: dual"] >= 10 * SAME
    assert measured["relative: perp-neg"] <= SAME


def test_what_goes_by_prompt_and_negative_is_refused_under_a_third_condition(measured: dict[str, Any]) -> None:
    names = {"cfg": "Classifier-Free Guidance", "rescale": "Rescale Guidance", "interval": "Limited Interval"}
    third = {"dual": ("DualCFG", "middle"), "perp-neg": ("PerpNeg", "empty_negative_prompt")}
    assert len(measured["refused"]) == len(names) * len(third)
    for case, message in measured["refused"].items():
        rule, guider = case.split(" under ")
        assert message.startswith("UserError: ") and "Two-Condition Guidance or Perp-Neg" in message, message
        assert all(word in message for word in (names[rule], *third[guider])), message
    assert measured["our guider's conditions are no third"] == ""


def test_a_guider_of_two_models_asks_as_cfgguider_does_or_is_refused(measured: dict[str, Any]) -> None:
    found = measured["two models"]
    if found is None:
        pytest.skip("this ComfyUI has no guider of two models")
    assert found["gradient"] <= SAME and found["cfg and gradient"] <= SAME
    assert found["at cfg 1"].startswith("UserError: ") and "at cfg 1" in found["at cfg 1"]
    assert "Autoguidance" in found["at cfg 1"]


def test_a_guider_that_never_asks_is_named(measured: dict[str, Any]) -> None:
    assert measured["deaf: unguided"] == 0
    [message] = measured["deaf"]
    assert "Classifier Guidance on this MODEL did nothing" in message and "Deaf" in message
    assert measured["not deaf"] == []


def test_under_another_packs_guider_rules_act_on_the_pair_that_it_shows_and_that_is_said(
    measured: dict[str, Any],
) -> None:
    assert measured["styled: adds"] <= SAME and measured["styled: gradient"] == []
    assert measured["styled: rescale"] <= SAME
    [message] = measured["styled"]
    assert "Rescale Guidance on a MODEL" in message and "Styled" in message and "(style)" in message


def test_a_node_that_sets_cfg_acts_on_the_model_and_is_named_in_our_guider(measured: dict[str, Any]) -> None:
    found = measured["overridden"]
    if found is None:
        pytest.skip("this ComfyUI has no CFG Override")
    [message] = found["warnings"]
    assert "CFG Override" in message and "sets cfg to 2" in message and "(4)" in message
    assert found["our scale"] <= SAME and found["a gradient on the model"] <= SAME


def test_another_packs_node_that_failed_changes_nothing_afterwards(measured: dict[str, Any]) -> None:
    """Neither a hook of its own that raised in the middle of our run, nor functions of ComfyUI's that it wrapped and left so."""
    assert measured["foreign: failed"] == ["RuntimeError: another pack's node failed"] * 2
    assert measured["foreign: after it"] == {"guider": 0, "patch": 0}
