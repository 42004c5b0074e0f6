"""Memory for graphs in a real ComfyUI, networks that autograd must not keep, interrupts, and nodes that change the number of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from .test_guidance import SAME


def test_without_a_graph_comfyuis_own_estimate_is_asked_for(measured: dict[str, Any]) -> None:
    for name in ("CFG", "a leaf, latents", "off"):
        found = measured["reserved"][name]
        assert found["least"] == pytest.approx(2 * measured["unit"]) and found["most"] == pytest.approx(
            4 * measured["unit"]
        )
        assert not found["whole"]


def test_a_gradient_through_the_model_reserves_the_graph_of_every_pass(measured: dict[str, Any]) -> None:
    for name, passes in (("through", 2), ("through, one condition", 1)):
        found = measured["reserved"][name]
        assert found["least"] == pytest.approx(2 * passes * measured["graph"] * measured["unit"])
        assert found["whole"] in (True, None), "the older ComfyUI has no such switch there"


def test_families_that_need_less_are_named_as_comfyui_names_them(measured: dict[str, Any]) -> None:
    for name, (known, factor, otherwise) in measured["families"].items():
        assert known and 1 < factor < otherwise, name


def test_decoding_with_a_gradient_reserves_what_the_vae_says_it_needs(measured: dict[str, Any]) -> None:
    for name, picture, size in (
        ("a leaf, pictures", "a picture", 2),
        ("a leaf, half pictures", "half a picture", 2),
        ("a leaf, in tiles", "a tile", 6),
        ("on a model, pictures", "a picture", 2),
    ):
        more = measured["reserved"][name]["least"] - size * measured["unit"]
        wanted = measured["decoded"] * measured[picture]
        assert 0.99 * wanted <= more <= wanted + size * measured["unit"], name


def test_a_loss_by_a_clip_reserves_the_graph_of_the_cutouts_that_go_through_it_together(
    measured: dict[str, Any],
) -> None:
    pictures = measured["reserved"]["a leaf, pictures"]["least"]
    for crops, together in ((3, 3), (30, 8)):
        more = measured["reserved"][f"a leaf, {crops} cutouts"]["least"] - pictures
        assert more == pytest.approx(1000 * together * measured["unit"], rel=0.01), crops


def test_what_two_nodes_reserve_adds_up(measured: dict[str, Any]) -> None:
    """And does not multiply: the passes' graphs, and once what is decoded."""
    more = measured["reserved"]["two nodes"]["least"] - measured["reserved"]["through"]["least"]
    wanted = measured["decoded"] * measured["a picture"]
    assert 0.99 * wanted <= more <= wanted + 2 * measured["unit"]


def test_a_samplers_own_network_is_loaded_with_what_the_model_needs(measured: dict[str, Any]) -> None:
    for name, factor in (("beside the sampler", 1), ("beside the sampler, through", 2 * measured["graph"])):
        first, second = measured[name]
        assert second["least"] == pytest.approx(first["least"]) == pytest.approx(2 * factor * measured["unit"])
        assert second["most"] == pytest.approx(first["most"])


@pytest.mark.parametrize("by", ["picture", "classifier"])
def test_an_interrupt_is_heard_inside_a_step(measured: dict[str, Any], by: str) -> None:
    """The loss interrupts the second of thirty iterations; one in the space of latents, which calls no network, hears it after the step."""
    said, asked = measured[f"interrupted, {by}"]
    assert said.startswith("InterruptProcessingException") and asked == 2
    said, asked = measured["interrupted, latent"]
    assert said.startswith("InterruptProcessingException") and asked == 30


@pytest.mark.parametrize(
    ("how", "error"), [("done", ""), ("failed", "ValueError"), ("interrupted", "InterruptProcessingException")]
)
def test_a_run_through_the_network_leaves_nothing_in_memory(measured: dict[str, Any], how: str, error: str) -> None:
    """No graph, no tensor, and nothing of the run; as long as somebody keeps its error, the graph that it broke off is there."""
    found = measured["left"][how]
    assert found["said"] == error and found["at most"] > 100
    assert (found["graph"], found["bytes"], found["parts"]) == (0, 0, 0)
    assert (found["graph, error kept"] > 100) == (found["bytes, error kept"] > 0) == bool(error)


def test_a_model_on_several_gpus_is_refused_under_a_gradient_through_it(measured: dict[str, Any]) -> None:
    assert "several GPUs" in measured["several GPUs"] and "MPGD" in measured["several GPUs"]
    assert measured["several GPUs, a leaf"] == ""


def test_a_controlnet_under_dynamic_vram_is_refused(measured: dict[str, Any]) -> None:
    assert "--disable-dynamic-vram" in measured["a ControlNet under dynamic VRAM"]


def test_models_under_dynamic_vram_are_taken_without_it_where_a_gradient_goes_through_them(
    measured: dict[str, Any],
) -> None:
    if "dynamic" not in measured:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    found = measured["dynamic"]
    assert found["of the guiders"] == [False, False] and found["loaded once more"] == 1
    assert found["same as plain"] <= SAME < 0.01 < found["without the LoRA"]
    assert found["a leaf rule's"] is True, "nothing is loaded again for a rule that needs no gradient through the model"
    assert "--disable-dynamic-vram" in found["no loader"]
    assert found["of the decoder"] is False and found["its network is its patcher's"] and found["pictures"] <= SAME
    assert "--disable-dynamic-vram" in found["a VAE without a loader"]


@pytest.mark.parametrize("node", ["ToMe", "HyperTile"])
def test_weakened_attention_beside_nodes_that_change_the_number_of_tokens(measured: dict[str, Any], node: str) -> None:
    assert measured[f"{node}, CFG"] == ""
    for rule in ("identity", "blur"):
        assert measured[f"{node}, {rule}"].startswith("UserError") and "ToMe" in measured[f"{node}, {rule}"]


def test_a_scale_that_changes_within_a_run_is_followed_on_a_model(measured: dict[str, Any]) -> None:
    assert measured["a scale that falls"] <= SAME < 0.01 < measured["it does fall"]


def test_conditions_and_shapes_of_other_kinds(measured: dict[str, Any]) -> None:
    assert measured["a named tuple"] == "Pair"
    assert "sliding windows over a latent of shape (1, 4, 8)" in measured["windows over a line"]
