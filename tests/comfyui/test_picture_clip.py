"""A CLIP on decoded pictures in a real ComfyUI: of an open_clip folder, and of a CLIP_VISION with its CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latent_guidance.models.tiny import make_tiny_picture_clip

from .comfy import run_beside
from .test_guidance import DIFFERENT, SAME


@pytest.fixture(scope="module")
def measured(comfyui: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    make_tiny_picture_clip(base / "models" / "clip_vision" / "tiny")
    return run_beside(__file__, comfyui, base, tmp_path_factory.mktemp("picture_clip"))


def needed(measured: dict[str, Any], name: str) -> None:
    if name == "open_clip" and not measured["open_clip is there"]:
        pytest.skip("this ComfyUI's Python has no open_clip")


def test_without_open_clip_a_folder_of_it_is_refused_with_words(measured: dict[str, Any]) -> None:
    if measured["open_clip is there"]:
        pytest.skip("this ComfyUI's Python has open_clip")
    assert all(word in measured["no open_clip"] for word in ("UserError", "pip install open_clip_torch", "CLIP Vision"))


@pytest.mark.parametrize("node", ["LGMPGD", "LGDPS"])
@pytest.mark.parametrize("name", ["open_clip", "CLIP_VISION"])
def test_a_text_is_followed_and_the_cutouts_follow_from_the_seed(
    measured: dict[str, Any], name: str, node: str
) -> None:
    needed(measured, name)
    assert measured[f"{name} {node}: lower by"] > 0
    assert measured[f"{name} {node}: again"] == 0
    assert measured[f"{name} {node}: another seed"] >= DIFFERENT


@pytest.mark.parametrize("name", ["open_clip", "CLIP_VISION"])
def test_the_gradient_is_the_slope(measured: dict[str, Any], name: str) -> None:
    """In fp32, by a difference along it: 1e-4 was seen."""
    needed(measured, name)
    assert measured[f"{name}: slope"] < 1e-3


@pytest.mark.parametrize("name", ["open_clip", "CLIP_VISION"])
def test_the_memory_of_its_graph_is_what_is_reserved(measured: dict[str, Any], name: str) -> None:
    """In networks this small ComfyUI's attention on a CPU, which keeps its matrix, is seen too: 1.6."""
    needed(measured, name)
    assert 0.6 < measured[f"{name}: kept"] < 2


@pytest.mark.parametrize("name", ["open_clip", "CLIP_VISION"])
def test_it_is_managed_by_comfyui_and_survives_inference_tensors(measured: dict[str, Any], name: str) -> None:
    needed(measured, name)
    assert measured[f"{name}: managed"] and measured[f"{name}: inference tensors"]
    assert measured[f"{name}: after unloading"] <= SAME


def test_pictures_and_texts_are_read_as_comfyui_reads_them(measured: dict[str, Any]) -> None:
    assert measured["image features and ComfyUI's own"] <= 1e-5
    assert measured["text features and ComfyUI's own"] <= 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("identity", ["without its text projection", "Stable Diffusion 1.5", "clip_l.safetensors"]),
        ("zeros", ["without its text projection"]),
        ("nan", ["without its text projection"]),
        ("another width", ["64 numbers", "48", "Load Picture CLIP"]),
        ("no projection", ["SigLIP", "Load CLIP Vision"]),
        ("no CLIP", ["no CLIP"]),
    ],
)
def test_what_does_not_belong_together_is_refused_with_words(
    measured: dict[str, Any], name: str, words: list[str]
) -> None:
    assert measured[name].startswith("UserError") and all(word in measured[name] for word in words)
