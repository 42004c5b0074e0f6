"""Losses in a real ComfyUI: at the estimate and through ComfyUI's own UNet, in inference mode, with its own VAE."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import SAME


@pytest.mark.parametrize(("loss", "part"), [("reference", 0.95), ("palette", 0.995)])
@pytest.mark.parametrize("node", ["LGMPGD", "LGDPS", "LGUniversalGuidance"])
def test_a_loss_goes_down_against_unguided(measured: dict[str, Any], node: str, loss: str, part: float) -> None:
    """The tiny VAE is a random one, whose colours hardly move."""
    assert measured[f"{node} {loss}: loss of what it was"] < part
    assert measured[f"{node} {loss}: again"] == 0 and measured[f"{node} {loss}: finite"]


def test_a_leaf_rule_is_the_same_in_a_guider_and_on_a_model(measured: dict[str, Any]) -> None:
    assert measured["a leaf rule: guider and patch"] <= SAME
    assert "connect the rule to Guider" in measured["through the UNet on a model is refused"]


def test_the_gradient_costs_no_further_call_of_the_network(measured: dict[str, Any]) -> None:
    """Two pictures, two branches, in one call a step."""
    assert measured["samples a call, through the UNet"] == [4] * 4


def test_models_that_were_unloaded_and_conditionings_with_areas(measured: dict[str, Any]) -> None:
    assert measured["after the models were unloaded"] == 0 and measured["with an area"]


def test_a_wrong_loss_is_named(measured: dict[str, Any]) -> None:
    assert "Wrong" in measured["a wrong loss is named"] and "2 samples" in measured["a wrong loss is named"]
