"""Noisy-latent CLIP guidance inside a real ComfyUI: one picture by every way, ComfyUI's memory management, wrong text encoders."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME


@pytest.mark.parametrize("name", ["again", "on the model", "on the model, under KSampler", "after unloading"])
def test_one_picture_by_every_way(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= SAME


@pytest.mark.parametrize("name", ["acts", "another text", "away acts"])
def test_what_acts_is_seen(measured: dict[str, Any], name: str) -> None:
    assert measured["finite"] and measured[name] >= DIFFERENT


def test_it_is_managed_by_comfyui_and_survives_inference_tensors(measured: dict[str, Any]) -> None:
    assert measured["managed"] is True and measured["inference tensors"] is True


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wide", ["(1, 77, 768)", "64 numbers", "text encoder"]),
        ("another encoder", ["start token", "text encoder", "that of tiny"]),
        ("nothing", ["target", "Text Encode"]),
    ],
)
def test_wrong_texts_are_refused_with_words(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: ") and all(word in message for word in words), message
