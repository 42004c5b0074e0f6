"""Every rule in a real ComfyUI: alone, beside each of core's own guidance nodes, and in a covering sample of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latent_guidance.guidance import RULES

from .comfy import run_inside

ACTS = 1e-4
"""Smallest difference, relative to the spread of the latents, that counts as an effect; rounding is about 1e-6 here."""
BY_BRANCHES = {"CFGZeroStar", "CFGNorm", "TCFG", "APG", "Mahiro", "EpsilonScaling", "PerturbedAttentionGuidance"}
"""Core's nodes that act before or after the combination, and so beside a rule that combines."""


@pytest.fixture(scope="module")
def measured(comfyui: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("scripts_pairs.py").read_text("utf-8")
    return run_inside(comfyui, base, script, tmp_path_factory.mktemp("pairs"))


def wrong(found: dict[str, dict[str, Any]], *differences: str) -> dict[str, dict[str, Any]]:
    """The results that are not finite, or do not differ as they should."""
    return {
        name: values
        for name, values in found.items()
        if not (values["finite"] and all(values[each] > ACTS for each in differences))
    }


def test_every_rule_acts_and_stays_finite(measured: dict[str, Any]) -> None:
    assert measured["not made"] == []
    assert set(measured["alone"]) == {rule.node.id for rule in RULES}
    assert wrong(measured["alone"], "from unguided") == {}
    acting = {name: values for name, values in measured["alone"].items() if name != "LGCFG"}
    assert wrong(acting, "from cfg") == {}


def test_every_rule_runs_beside_each_of_cores_nodes(measured: dict[str, Any]) -> None:
    ran = {name for name, refused in measured["core"].items() if not refused}
    assert ran >= BY_BRANCHES | {"RescaleCFG", "FreeU_V2"}, measured["core"]
    in_place = measured["core refused"]  # FreeU writes into activations that autograd has kept
    assert set(in_place) == {f"FreeU_V2 + {rule.node.id}" for rule in RULES if getattr(rule, "through_denoiser", False)}
    assert all(error.startswith("UserError") and "in place" in error for error in in_place.values()), in_place
    assert len(measured["core beside"]) + len(in_place) == len(ran) * len(RULES)
    assert wrong(measured["core beside"], "from unguided") == {}


def test_cores_nodes_act_beside_our_cfg(measured: dict[str, Any]) -> None:
    beside = {node: measured["core beside"][f"{node} + LGCFG"] for node in BY_BRANCHES}
    assert wrong(beside, "from the rule") == {}


def test_a_sample_of_pairs_acts_and_stays_finite_or_is_refused_by_name(measured: dict[str, Any]) -> None:
    pairs = measured["pairs"]
    seen = {name for pair in pairs for name in pair.split(" + ")}
    assert seen == {rule.node.id for rule in RULES} and len(pairs) > len(RULES)
    assert wrong(pairs, "from unguided") == {}
    for error, *names in measured["refused"].values():
        assert error.startswith("UserError") and all(name in error for name in names), error
