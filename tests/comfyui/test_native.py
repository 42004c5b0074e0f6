"""Checkpoint folders inside a real ComfyUI: native where they map, wrapped otherwise, and equal to the library either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from latent_guidance.models.checkpoint import load_text_encoder

from .comfy import run_beside

EQUAL, ELSE = 1e-5, 1e-3
"""Largest difference relative to the largest value."""

MAPPED = {
    "plain",
    "AdaGN",
    "linear projection",
    "two transformer layers",
    "attention everywhere",
    "heads of one width",
    "no attention in the middle",
}
WRAPPED = {"layers by level", "16 norm groups", "condition vector", "another activation", "learned range"}


PROMPTS = {"short": "a (red:1.3) apple", "long": "word " * 200, "empty": ""}


@pytest.fixture(scope="module")
def measured(comfyui: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    encode_prompts(base / "models" / "latent_guidance" / "tiny", base / "input")
    return run_beside(__file__, comfyui, base, tmp_path_factory.mktemp("native"))


def encode_prompts(checkpoint: Path, folder: Path) -> None:
    """Write what the library makes of the prompts; the library's text tower needs open_clip, which a ComfyUI lacks."""
    encoder, encoded = load_text_encoder(checkpoint), {}
    for name, prompt in PROMPTS.items():
        encoded[f"{name}.tokens"], encoded[f"{name}.pooled"] = encoder.encode(prompt)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in encoded.items()}, folder / "encoded.safetensors")


def test_the_objects_are_comfyuis_own(measured: dict[str, Any]) -> None:
    assert measured["classes"] == ["comfy", "comfy"]
    assert measured["model is a plain ModelPatcher"] == "ModelPatcher"
    assert measured["scale factor"] == 0.8


@pytest.mark.parametrize(
    "name",
    [
        "vae encode", "vae decode", "wrapped vae encode", "wrapped vae decode", "vae sample", "wrapped vae sample",
        "clip short", "clip long", "clip empty", "clip pooled short", "clip pooled long", "clip pooled empty",
        "sigmas scaled_linear", "sigmas linear", "sigmas squaredcos_cap_v2",
        "sigmas scaled_linear, rebuilt by a core node", "sigmas linear, rebuilt by a core node",
        "sigmas squaredcos_cap_v2, rebuilt by a core node",
    ],
)  # fmt: skip
def test_vae_text_and_noise_levels_equal_the_library(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= EQUAL


@pytest.mark.parametrize("name", sorted(MAPPED | WRAPPED))
def test_unets_agree_whichever_way_they_are_loaded(measured: dict[str, Any], name: str) -> None:
    entry = measured["unets"][name]
    assert entry["native"] is (name in MAPPED), entry["why"]
    assert entry["wrapped"] <= EQUAL
    if name in MAPPED:
        assert entry["far"] <= EQUAL
        assert entry["with one weight changed"] >= ELSE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers by level", "layers_per_block [1, 2]"),
        ("16 norm groups", "norm_num_groups is 16"),
        ("condition vector", "class_embed_type is 'projection'"),
        ("another activation", "act_fn is 'gelu'"),
        ("learned range", "out_channels"),
    ],
)
def test_what_does_not_map_says_why(measured: dict[str, Any], name: str, words: str) -> None:
    assert words in measured["unets"][name]["why"]


def test_a_posterior_sample_differs_from_the_mode(measured: dict[str, Any]) -> None:
    assert measured["sample is not the mode"] >= ELSE


def test_a_wrapped_model_samples_and_is_guided(measured: dict[str, Any]) -> None:
    assert measured["wrapped: finite"] is True
    assert measured["wrapped: condition acts"] >= ELSE
    assert measured["wrapped: guided"] >= ELSE
    assert measured["wrapped: guider"] <= EQUAL


def test_a_node_that_has_no_effect_on_a_wrapped_model_is_said_once(measured: dict[str, Any]) -> None:
    [message], moved = measured["wrapped: another node's attention"]
    assert "PAG" in message and "has no effect" in message
    assert moved == 0


def test_wrappers_of_other_nodes_act_around_a_wrapped_models_network(measured: dict[str, Any]) -> None:
    assert min(measured["wrapped: another node's wrapper"].values()) > 1e-2, measured["wrapped: another node's wrapper"]


def test_previews_have_colours(measured: dict[str, Any]) -> None:
    assert measured["preview"] == [4, 3, 3]
    assert measured["plain latent format has no preview"] is True


def test_previews_have_the_colours_of_the_picture(measured: dict[str, Any]) -> None:
    """A map fitted to small pictures of one colour is 0.5 off."""
    assert measured["preview error"] <= 0.3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights missing", ["UNet", "out.2.bias", "config.json"]),
        ("VAE weights of another shape", ["VAE", "conv_in", "config"]),
        ("no text weights", ["text encoder", "lacks"]),
        ("another vocabulary", ["30000", "49408"]),
        ("class table", ["num_class_embeds", "cross-attention"]),
        ("no such folder", ["nothing", "not found"]),
    ],
)
def test_broken_checkpoints_are_refused_with_words(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: ") and all(word in message for word in words), message


@pytest.mark.parametrize("what", ["tokens", "pooled"])
def test_relics_in_a_text_config_change_nothing(measured: dict[str, Any], what: str) -> None:
    """Padding is the tokenizer's business, and the end token is 49407 whatever the config says."""
    assert measured[f"relics in a text config: {what}"] == 0
