"""LoRA and ControlNet in a real ComfyUI, on the MODEL and CLIP of a checkpoint folder, with guidance and without."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME


@pytest.mark.parametrize("kind", ["lora", "control"])
def test_core_applies_it_and_guidance_acts_beside_it(measured: dict[str, Any], kind: str) -> None:
    found = measured[kind]
    assert found["finite"]
    for name in ("acts", "acts beside guidance", "guidance acts"):
        assert found[name] >= DIFFERENT, name
    assert found["guider and patch"] <= SAME


def test_every_matrix_of_the_native_networks_has_a_name_for_loras(measured: dict[str, Any]) -> None:
    unet, text = measured["lora matrices"]
    assert unet >= 8 and text >= 4


def test_at_strength_0_and_afterwards_nothing_is_left(measured: dict[str, Any]) -> None:
    assert measured["lora at strength 0"] <= SAME
    assert measured["the model is left alone"] <= SAME
    assert measured["lora of the text encoder"] >= DIFFERENT


def test_a_controls_range_is_kept(measured: dict[str, Any]) -> None:
    assert measured["control that begins at the end"] <= SAME
