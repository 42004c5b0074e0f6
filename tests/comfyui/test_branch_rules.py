"""The rules for scale and branches inside a real ComfyUI: one picture by every way, the passes that are saved, and core's own TCFG."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME

NODES = ["LGTangentialCFG", "LGFrequencyDecoupled", "LGMagnitudeAware", "LGAdaptiveGuidance", "LGSlidingModeCFG"]


@pytest.mark.parametrize("node", NODES)
def test_one_picture_as_guider_on_the_model_and_again(measured: dict[str, Any], node: str) -> None:
    found = dict(measured[node])
    assert found.pop("finite") and found.pop("differs from plain") >= DIFFERENT
    assert {way: distance for way, distance in found.items() if distance > SAME} == {}


def test_adaptive_guidance_saves_the_negatives_passes(measured: dict[str, Any]) -> None:
    """Two pictures, two branches: calls of 4 samples, and of 2 once both pictures have agreed."""
    assert measured["calls without"] == [4] * 8
    saved = measured["calls with adaptive guidance"]
    assert saved[0] == 4 and saved[-1] == 2 and saved == sorted(saved, reverse=True) and len(saved) == 8


def test_tangential_damping_is_cores_own(measured: dict[str, Any]) -> None:
    assert measured["tangential is core's"] <= SAME
