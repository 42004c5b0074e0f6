"""Weakened passes in a real ComfyUI: equal to core's own nodes and to the library, on U-Nets and on a transformer."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME

RULES = ["identity", "identity, other layers", "blur", "blur without limit", "skip", "shuffle", "windows"]
SAME_NAMES = [
    "pag: guider is core's node",
    "pag: on a model is core's node",
    "pag: on a model in our guider",
    "pag: without cfg is core's node",
    "pag: again",
    "pag: neutral is cfg",
    "pag: neutral on a model",
    "slg: guider is core's node",
    "slg: on a model is core's node",
    "slg: middle of four",
    *(f"{rule}: {how}" for rule in RULES for how in ("the library's", "wrapped", "on a model")),
    *(f"{rule}: two equal entries" for rule in ("shuffle", "skip", "windows")),
]
OTHER_NAMES = [
    "pag differs: from cfg",
    "pag differs: other layers",
    "slg differs: from cfg",
    "slg differs: other layers",
    "swg differs: on a transformer",
    *(f"{rule} differs: from the model" for rule in RULES),
    *(f"{rule} differs: two entries" for rule in ("shuffle", "skip", "windows")),
]


@pytest.mark.parametrize("name", SAME_NAMES)
def test_the_same_by_two_ways(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= SAME


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_acts_is_seen(measured: dict[str, Any], name: str) -> None:
    assert measured["finite"] is True and measured[name] >= DIFFERENT


def test_one_call_more_a_step_and_none_outside_the_window(measured: dict[str, Any]) -> None:
    assert measured["calls: identity"] == [[2, 4, 8, 12], [4, 4, 8, 12]]
    assert measured["calls: windows"] == [[4, 4, 8, 12], [8, 4, 6, 9]]  # 0.7 of each side, rounded up; four windows
    assert measured["calls: outside its window"] == [[4, 4, 8, 12]]


def test_nothing_stays_behind_on_the_model(measured: dict[str, Any]) -> None:
    assert measured["nothing stays behind"] and measured["nothing stays in the options"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pag on a transformer", ["attention to itself alone", "OpenAISignatureMMDITWrapper", "U-Net"]),
        ("seg on a transformer", ["blurred queries", "U-Net", "Sliding Window Guidance"]),
        ("tpg on a transformer", ["shuffled tokens", "U-Net"]),
        ("attention skip on a transformer", ["attention to itself alone", "U-Net"]),
        ("a transformer's layers", ["'2-9'", "0 to 3"]),
        ("a U-Net's layers", ["'2-9'", "d0, m0, u0 to u1"]),
        ("a U-Net's layers on a model", ["'2-9'", "d0, m0, u0 to u1"]),
        ("wrapped layers", ["'2-9'", "d0, m0, u0 to u1"]),
        ("patches that are not asked for", ["skipped layers", "does not let that be changed"]),
        ("windows and an area", ["area", "whole picture"]),
        ("windows and an area on a model", ["area", "whole picture"]),
    ],
)
def test_what_cannot_be_made_is_refused_with_words(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: ") and all(word in message for word in words), message
