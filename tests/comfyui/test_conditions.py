"""Conditionings of every kind, masks, img2img, other samplings, bad input, interrupts and memory, inside a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME

KINDS = [
    "plain", "combined", "an area", "a mask", "a mask's bounds", "one after the other", "averaged", "joined",
    "a negative with an area", "a negative of two",
]  # fmt: skip
VE = ["eps", "v", "v, zero terminal snr", "x0", "lcm", "edm", "continuous eps", "continuous v"]
FLOW = ["flow", "flow of aura", "flow of flux"]


def check_pair(pair: list[float]) -> None:
    ours_and_core, guider_and_patch, guided_and_not = pair
    assert ours_and_core <= SAME and guider_and_patch <= SAME
    assert guided_and_not >= DIFFERENT


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_conditioning_is_guided_as_core_does(measured: dict[str, Any], name: str) -> None:
    check_pair(measured["kinds"][name])
    assert measured["finite"] is True
    assert name == "plain" or measured["kinds differ"][name] >= DIFFERENT


def test_a_mask_keeps_what_it_keeps(measured: dict[str, Any]) -> None:
    check_pair(measured["inpainting"])
    assert measured["what the mask keeps"] <= SAME and measured["what it does not"] >= DIFFERENT
    assert measured["inpainting: ksampler"] <= SAME


def test_img2img_starts_where_ksampler_does(measured: dict[str, Any]) -> None:
    check_pair(measured["img2img"])
    assert measured["img2img: ksampler"] <= SAME and measured["img2img is not txt2img"] >= DIFFERENT


def test_our_vae_decodes_in_tiles(measured: dict[str, Any]) -> None:
    """A tile does not see the picture around it: several tiles are near the whole, and one is equal to it."""
    shape, finite, difference = measured["tiles"]
    assert shape == [1, 128, 192, 3] and finite
    assert difference < measured["tiles of another latent"]
    assert measured["one tile"] <= 1e-3


@pytest.mark.parametrize("name", VE + FLOW)
def test_every_sampling_is_guided(measured: dict[str, Any], name: str) -> None:
    *pair, warnings = measured["samplings"][name]
    check_pair(pair)
    assert warnings == []
    assert measured["process"][name] == ("rectified flow" if name in FLOW else "VE-scaled")
    assert measured["node after ours"][name] <= SAME, "the sampling is read when it runs, not when the node does"
    assert name == "v" or measured["sampling differs"][name] >= DIFFERENT  # the tiny model is a v-model


def test_latents_changed_by_a_later_node_are_refused(measured: dict[str, Any]) -> None:
    message = measured["other latents by a node after ours"]
    assert message.startswith("UserError: ") and "'tiny'" in message and "'SDXL_Playground_2_5'" in message


def test_a_classifier_that_gives_nan_leaves_the_picture_and_says_so(measured: dict[str, Any]) -> None:
    assert measured["NaN: unguided"] <= SAME
    assert measured["NaN: warnings"] and all("Classifier Guidance" in line for line in measured["NaN: warnings"])
    assert "not finite" in measured["NaN: warnings"][0]


def test_a_node_whose_work_after_the_combination_is_lost_is_warned_of(measured: dict[str, Any]) -> None:
    found = measured["combined anew"]
    assert "PAG" in " ".join(found["cfg"]) and "before that node" in " ".join(found["cfg"])
    assert found["only ours before"] == found["a gradient"] == []


def test_a_node_whose_combination_is_replaced_is_named(measured: dict[str, Any]) -> None:
    for name in ("cfg", "cfg on the model"):
        [message] = measured["replaced"][name]
        assert "Classifier-Free Guidance" in message and "RescaleCFG" in message and "Rescale Guidance" in message
    assert measured["replaced"]["no other node"] == measured["replaced"]["no cfg"] == []
    assert measured["replaced: acts"] > DIFFERENT


def test_a_window_that_never_opens_is_said(measured: dict[str, Any]) -> None:
    for name in ("closed window", "closed window: on the model"):
        [message] = measured[name]
        assert "Classifier Guidance never acts in this run" in message and "(500, 1000]" in message
    assert measured["open window"] == []


def test_cfg_on_a_distilled_model_is_said(measured: dict[str, Any]) -> None:
    """A model that says of itself that it is Flux dev or schnell; a rule that needs no negative is fine there."""
    [dev], [schnell] = measured["distilled"]["dev, cfg"], measured["distilled"]["schnell, cfg"]
    assert "Classifier-Free Guidance (CFG)" in dev and "distilled" in dev and "FluxGuidance" in dev
    assert "distilled" in schnell and "FluxGuidance" not in schnell
    assert measured["distilled"]["dev, gradient"] == measured["distilled"]["schnell, gradient"] == []


def test_an_interrupt_stops_before_the_next_call_of_the_network(measured: dict[str, Any]) -> None:
    found = measured["interrupted"]
    assert {"guider", "patch", "LGSamplerDDPM", "LGSamplerDDIM"} <= set(found)
    assert {name: ended for name, ended in found.items() if ended != [2, "InterruptProcessingException"]} == {}


def test_memory_comes_back(measured: dict[str, Any]) -> None:
    first, *later = measured["tensors after each run"]
    assert len(set(later)) == 1 and later[0] <= first, "every run keeps something"
    assert measured["managed while in use"] is True
    assert measured["let go of"] == [True] * 4
    assert measured["nothing stays loaded"] == 0


def test_every_latent_format_has_a_name_and_numbers(measured: dict[str, Any]) -> None:
    described = measured["formats"]
    assert described["SD15"] == "'SD15' (4 channels, scaling factor 0.18215)"
    assert described["SDXL"] == "'SDXL' (4 channels, scaling factor 0.13025)"
    assert described["SD3"] == "'SD3' (16 channels, scaling factor 1.5305, shift 0.0609)"
    assert described["Flux"] == "'Flux' (16 channels, scaling factor 0.3611, shift 0.1159)"
    assert described["Wan21"] == "'Wan21' (16 channels, every channel scaled by itself)"
