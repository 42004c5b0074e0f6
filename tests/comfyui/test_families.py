"""Stable Diffusion 1.5 at full size, SDXL, SD3 and Flux at reduced depth, with random weights, through ComfyUI's stock loaders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .comfy import HEAVY_SECONDS, run_beside
from .test_guidance import DIFFERENT, SAME

pytestmark = pytest.mark.timeout(HEAVY_SECONDS)
HEAVY = pytest.mark.heavy
FAMILIES = ["sd3", *(pytest.param(name, marks=HEAVY) for name in ("sd15", "sdxl", "flux", "schnell"))]
WEIGHTS = {
    "sd3": ["fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"],
    "sd15": ["fp8_e4m3fn"],
    "flux": ["bf16"],
    "sdxl": ["fp16"],
    "schnell": [],
}
STORED = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
LOWER = 0.98
"""What is left at most of a loss that is followed; of one that is not it is 1, and more of one that is fled from."""
LATENTS = {"sd15": "SD15", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux", "schnell": "Flux"}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The families' files, made when first wanted, by whichever ComfyUI; some gigabytes, gone after the tests."""
    folder = tmp_path_factory.mktemp("families")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def measured(
    request: pytest.FixtureRequest, comfyui: Path, base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    name = request.param
    head = f"FAMILY, FILES, WEIGHTS = {name!r}, {str(files)!r}, {WEIGHTS[name]!r}\n"
    folder = tmp_path_factory.mktemp(name)
    found = run_beside(__file__, comfyui, base, folder, head=head, seconds=HEAVY_SECONDS)
    return found | {"name": name}


def is_flow(measured: dict[str, Any]) -> bool:
    return measured["name"] in ("sd3", "flux", "schnell")


def others(measured: dict[str, Any], warnings: list[str]) -> list[str]:
    """The warnings, without that CFG guides a distilled model: Flux, as published, is one, and it is said once of each chain."""
    said = [line for line in warnings if "is distilled" in line]
    assert len(said) == (measured["name"] in ("flux", "schnell")), warnings
    return [line for line in warnings if line not in said]


def test_comfyui_takes_the_file_for_what_it_is(measured: dict[str, Any]) -> None:
    assert measured["detected"] == measured["is detected as"]
    assert measured["latents"].startswith(repr(LATENTS[measured["name"]]))
    assert measured["process"] == ("rectified flow" if is_flow(measured) else "VE-scaled")
    assert measured["first sigma"] == pytest.approx(1.0) if is_flow(measured) else measured["first sigma"] > 10


@pytest.mark.parametrize(
    "name",
    ["our cfg is core's", "patch: cfg guider", "patch: ksampler", "patch: basic guider", "the model is left alone"],
)
def test_the_same_picture_by_two_ways(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= SAME


def test_a_classifier_guides_without_a_warning(measured: dict[str, Any]) -> None:
    """On a flow the first step has no signal, alpha = 0: it is guided by nothing, silently."""
    assert measured["finite"] and others(measured, measured["warnings"]) == []
    assert measured["guided differs"] >= DIFFERENT and measured["guided differs: prompt alone"] >= DIFFERENT


def test_a_loss_is_followed_at_the_estimate_and_through_the_network(measured: dict[str, Any]) -> None:
    """The random network's own latents are no nearer to the reference than noise is."""
    assert measured["MPGD: patch"] <= SAME
    through = [measured["DPS"], *(found["DPS"] for found in measured["weights"].values())]
    for found in (measured["MPGD"], *through):
        finite, differs, share = found
        assert finite and differs >= DIFFERENT and share < LOWER, found
    said = [line for line in measured["loss: warnings"] if "is distilled" not in line]
    assert said == []


def test_cores_skip_layer_nodes_act_beside_rules(measured: dict[str, Any]) -> None:
    """Core's nodes for transformers: one adds a pass after the combination, one takes the place of the evaluation."""
    nodes = {"SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "SkipLayerGuidanceSD3"}
    assert set(measured["skip layers"]) == (nodes if is_flow(measured) else set())
    for node, found in measured["skip layers"].items():
        assert found["acts"] >= DIFFERENT and found["our cfg is core's"] <= SAME and found["patch"] <= SAME, (
            node,
            found,
        )
        for name, (finite, from_node, from_rule) in found["beside"].items():
            assert finite and min(from_node, from_rule) >= DIFFERENT, (node, name, found)


def test_the_gradient_joins_by_the_identity(measured: dict[str, Any]) -> None:
    """denoised += w sigma^2 / alpha grad; without 1/alpha it is another thing on a flow, and the same elsewhere."""
    assert measured["identity"] <= 1e-3
    if is_flow(measured):
        assert measured["naive form"] >= 0.1
        assert measured["at alpha = 0 nothing is added"] == 0
    else:
        assert measured["naive form"] <= 1e-3


def test_a_classifier_of_other_latents_is_refused_with_both_names(measured: dict[str, Any]) -> None:
    mine = LATENTS[measured["name"]]
    assert set(measured["refused"]) == {"SD15", "SDXL", "SD3", "Flux", "SDXL_Playground_2_5"} - {mine}
    for name, messages in measured["refused"].items():
        for message in messages:
            assert message.startswith("UserError: "), (name, message)
            assert repr(name) in message and repr(mine) in message and "Load Noisy-Latent Classifier" in message


def test_a_latent_of_other_channels_is_refused(measured: dict[str, Any]) -> None:
    message = measured["a latent of other channels"]
    assert message.startswith("UserError: ") and "3 channels" in message and LATENTS[measured["name"]] in message


def test_stored_in_any_way_the_weights_guide(measured: dict[str, Any]) -> None:
    for name, found in measured["weights"].items():
        assert found["stored in"] == STORED[name] and found["dtype"] == "torch.float32"
        assert found["finite"] and others(measured, found["warnings"]) == [], (name, found)
        assert max(found["patch"], found["cfg"]) <= SAME and found["guided differs"] >= DIFFERENT, (name, found)


def test_a_whole_checkpoint_makes_pictures(measured: dict[str, Any]) -> None:
    assert ("picture" in measured) == (measured["name"] == "sd15"), "the others' files hold their networks alone"
    if "picture" in measured:
        assert measured["picture"] == [[1, 64, 64, 3], True]
        assert measured["picture differs"] >= DIFFERENT
