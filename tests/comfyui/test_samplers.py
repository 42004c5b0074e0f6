"""Every sampler with every scheduler that the running ComfyUI offers: guided by guider and by patch, and not guided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .comfy import HEAVY_SECONDS, run_beside
from .test_guidance import DIFFERENT, SAME

FEW = (["euler", "dpmpp_2m", "dpmpp_sde", "euler_cfg_pp", "uni_pc", "res_multistep"], ["simple", "karras"])
"""Of every kind one: deterministic, multistep, stochastic, one that asks for the negative's estimate, one with its own loop."""


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.heavy)])
def measured(
    request: pytest.FixtureRequest, comfyui: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    samplers, schedulers = FEW if request.param == "few" else (None, None)
    head = f"SAMPLERS, SCHEDULERS = {samplers!r}, {schedulers!r}\n"
    folder = tmp_path_factory.mktemp("samplers")
    found = run_beside(__file__, comfyui, base, folder, head=head, seconds=HEAVY_SECONDS)
    tried = FEW if request.param == "few" else found["offered"]
    assert set(found["runs"]) == {f"{sampler}, {scheduler}" for sampler in tried[0] for scheduler in tried[1]}
    return found


pytestmark = pytest.mark.timeout(HEAVY_SECONDS)


def sampled(measured: dict[str, Any]) -> dict[str, Any]:
    """The runs that came to an end."""
    return {name: run for name, run in measured["runs"].items() if not run["error"]}


def test_all_of_them_sample(measured: dict[str, Any]) -> None:
    errors = {name: run["error"] for name, run in measured["runs"].items() if run["error"]}
    assert not errors
    assert [name for name, run in sampled(measured).items() if not run["finite"]] == []


def test_guider_and_patch_make_the_same_picture(measured: dict[str, Any]) -> None:
    runs = sampled(measured)
    assert {name: run["patch"] for name, run in runs.items() if not run["patch"] <= SAME} == {}
    assert measured["a weaker rule is another picture"] >= DIFFERENT


def test_guidance_is_seen_in_all_of_them(measured: dict[str, Any]) -> None:
    runs = sampled(measured)
    faint = {name: run["guided differs"] for name, run in runs.items() if not run["guided differs"] >= DIFFERENT}
    assert faint == {}


def test_guider_and_patch_call_the_network_equally_often(measured: dict[str, Any]) -> None:
    runs = sampled(measured)
    assert {name: run["calls"] for name, run in runs.items() if len(set(run["calls"])) > 1} == {}
