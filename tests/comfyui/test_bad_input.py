"""Rules on a MODEL that are handed what they cannot take: latents of other channels, and gradients that are no numbers."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT

STEPS, WAYS = 2, ["CFGGuider", "KSampler", "ours"]


@pytest.mark.parametrize("way", ["CFGGuider", "BasicGuider", "behind KSampler", "KSampler"])
def test_a_latent_of_other_channels_is_refused_under_any_guider(measured: dict[str, Any], way: str) -> None:
    said = measured["channels"][way]
    assert said.startswith("UserError: ") and "3 channels" in said and "4 channels" in said
    assert measured["channels, no rule"].startswith("RuntimeError: "), "the network's own words"


@pytest.mark.parametrize(
    ("name", "broken"), [("loss", [0, 1]), ("classifier", [0, 1]), ("half of the loss", [1]), ("none", [])]
)
def test_what_is_no_number_guides_nothing_and_is_said_at_every_step(
    measured: dict[str, Any], name: str, broken: list[int]
) -> None:
    found = measured["not a number"][name]
    for way in WAYS:
        for item, away in enumerate(found["away"][way]):
            assert away == 0 if item in broken else away >= DIFFERENT, (way, item)
    assert len(found["warnings"]) == (STEPS * len(WAYS) if broken else 0)
    assert all("is not finite" in line and ", ".join(map(str, broken)) in line for line in found["warnings"])
