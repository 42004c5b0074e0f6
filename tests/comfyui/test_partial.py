"""Models whose weights ComfyUI has loaded in part, as on a small GPU and by --novram: guidance is the same."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import DIFFERENT, SAME

KINDS = {"tiny": ["classifier", "DPS", "MPGD"], "sd3": ["classifier", "DPS"]}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_loaded_in_part_is_guided_as_one_loaded_whole(measured: dict[str, Any], name: str) -> None:
    """Half of the layers cast their weights at every call, one of them under an adapter; also where a gradient goes through them."""
    found = measured[name]
    for kind in KINDS[name]:
        whole, half = (found[f"{way}, {kind}"] for way in ("whole", "half"))
        assert half["same"] <= SAME < DIFFERENT <= min(found["unguided"][kind], found["without the adapter"]), kind
        assert min(half["model"]) > 0 and half["adapters"] > 0
        assert whole["model"][0] == 0 < whole["model"][1] and whole["adapters"] == 0
    assert found["half, classifier"]["classifier"] == 1
    if name == "tiny":  # sd3 is stored in fp16, which is cast at every call however it is loaded
        assert found["whole, classifier"]["casts"] == 0 < found["half, classifier"]["casts"]
        assert min(found["half, MPGD"]["vae"]) > 0 and found["whole, MPGD"]["vae"][0] == 0


@pytest.mark.parametrize("name", KINDS)
def test_under_novram_only_what_a_gradient_goes_through_is_loaded(measured: dict[str, Any], name: str) -> None:
    found = {kind: measured[name][f"novram, {kind}"] for kind in KINDS[name]}
    assert max(one["same"] for one in found.values()) <= SAME and found["classifier"]["classifier"] == 1
    for kind, one in found.items():
        layers_left, layers_loaded = one["model"]
        assert layers_left == 0 < layers_loaded if kind == "DPS" else layers_loaded == 0 < layers_left, kind
    if name == "tiny":
        assert found["MPGD"]["vae"][0] == 0 < found["MPGD"]["vae"][1]


def test_a_model_of_which_a_part_was_unloaded_guides_as_before(measured: dict[str, Any]) -> None:
    found = measured["a part unloaded"]
    before, after, again = found["left"]
    assert found["freed"] > 0 and after > 0 == before == again
    assert max(found["same"], found["whole again"]) <= SAME


def test_a_network_of_plain_layers_is_loaded_whole_and_leaves_whole(measured: dict[str, Any]) -> None:
    """A plain patcher leaves layers behind that cannot cast, and says that it has freed some."""
    assert measured["tiny budget"]["ours"] == [1, 0, 1]
    loaded, _, _ = measured["tiny budget"]["plain"]
    assert loaded < 1
