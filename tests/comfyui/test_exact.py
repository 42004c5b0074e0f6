"""The identity inside a real ComfyUI: a model and a classifier in closed form, in every one of ComfyUI's parameterisations."""

from __future__ import annotations

from typing import Any

import pytest

KINDS = ["EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "FLOW", "FLUX"]
FLOWS = {"FLOW", "FLUX"}


@pytest.mark.parametrize("kind", KINDS)
def test_at_scale_one_the_guided_model_is_the_conditional_one(measured: dict[str, Any], kind: str) -> None:
    """Without 1/alpha it is not, on a flow; where alpha is 1 the two are one."""
    found = {name: errors for name, errors in measured["errors"].items() if name.startswith(f"{kind}, ")}
    assert len(found) == 2
    for errors in found.values():
        assert errors["ours"] <= 1e-4
        assert errors["unguided"] >= 0.5
        assert errors["naive"] >= 0.5 if kind in FLOWS else errors["naive"] <= 1e-4
