"""The example workflows over HTTP: server started, prompt queued, pictures fetched, and equal to the embedded host's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_guidance.host.context import Host
from latent_guidance.host.run import run_workflow

from .comfy import ROOT, Server, psnr

EVERY = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
OWN = tuple(name for name in EVERY if name.startswith(("sd15_", "sdxl_", "sd3_")))
"""Workflows for the user's own checkpoint; ``test_own_checkpoints.py`` has them."""
NAMES = tuple(name for name in EVERY if name not in OWN)
LIMIT = 40.0
"""PSNR in dB below which two pictures count as different."""
EMOJI = (ROOT / "models" / "emoji" / "model_index.json").is_file()

Pictures = dict[str, list[np.ndarray[Any, Any]]]


TINY_CLASSIFIER = 30.0
"""The tiny checkpoint's random classifier has small gradients: raw scales are raised by this, so that its guidance is seen."""
TINY_ASCENT = 0.2
"""An ascent through the tiny checkpoint's random VAE makes of rounding another picture: its steps are made shorter by this."""


def workflow(name: str, *, checkpoint: str, seed: int | None = None) -> dict[str, Any]:
    """The API twin of a workflow, on another checkpoint; for the tiny one with fewer steps and a classifier that matters."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    for node in prompt.values():
        inputs = node["inputs"]
        for entry in ("checkpoint", "classifier", "noisy_clip"):
            if isinstance(inputs.get(entry), str):
                inputs[entry] = checkpoint
        if checkpoint == "tiny" and "steps" in inputs:
            inputs["steps"] = 6
        if checkpoint == "tiny" and node["class_type"] == "LGClassifierGuidance" and inputs["scaling"] == "raw":
            inputs["guidance_scale"] *= TINY_CLASSIFIER
        if checkpoint == "tiny" and "step_size" in inputs:
            inputs["step_size"] *= TINY_ASCENT
        if seed is not None and "seed" in inputs:
            inputs["seed"] = seed
    return prompt


def saved_only(prompt: dict[str, Any], pictures: Pictures) -> list[np.ndarray[Any, Any]]:
    """The pictures of the SaveImage nodes, in order."""
    return [
        picture for node in sorted(pictures) if prompt[node]["class_type"] == "SaveImage" for picture in pictures[node]
    ]


def embedded(prompt: dict[str, Any], models: Path, folder: Path) -> list[np.ndarray[Any, Any]]:
    """What the embedded host saves."""
    folder.mkdir()
    path = folder / "workflow.json"
    path.write_text(json.dumps(prompt), encoding="utf-8")
    found = run_workflow(path, host=Host(output=folder, models=models, device_name="cpu"), pack=ROOT).saved
    return [np.asarray(Image.open(picture).convert("RGB"), dtype=np.float64) / 255 for picture in found]


def compare(server: Server, prompt: dict[str, Any], models: Path, folder: Path) -> list[float]:
    theirs, ours = saved_only(prompt, server.run(prompt)), embedded(prompt, models, folder)
    assert len(theirs) == len(ours) > 0
    return [psnr(a, b) for a, b in zip(theirs, ours, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_host_makes_the_same_pictures(
    name: str, server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    found = compare(server, workflow(name, checkpoint="tiny"), models_folder, tmp_path / "out")
    assert min(found) >= LIMIT, found


@pytest.mark.slow
@pytest.mark.skipif(not EMOJI, reason="models/emoji is not there")
@pytest.mark.parametrize("name", NAMES)
def test_with_the_emoji_model_too(
    name: str, server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    found = compare(server, workflow(name, checkpoint="emoji"), models_folder, tmp_path / "out")
    assert min(found) >= LIMIT, found


def test_our_own_noise_is_the_same_everywhere(
    server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    """A posterior sample, then DDPM with noise in every step and guidance inside it."""
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    [sampler] = [key for key, node in prompt.items() if node["class_type"] == "KSamplerSelect"]
    [rule] = [key for key, node in prompt.items() if node["class_type"] == "LGClassifierGuidance"]
    [guider] = [node for node in prompt.values() if node["class_type"] == "LGGuider"]
    [sampling] = [node for node in prompt.values() if node["class_type"] == "SamplerCustomAdvanced"]
    [decode] = [key for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    [load] = [key for key, node in prompt.items() if node["class_type"] == "LGLoadCheckpoint"]
    old = prompt[rule]["inputs"]
    kept = {name: old[name] for name in old if name not in {"scaling", "form"}} | {"guidance_scale": 50.0}
    prompt[rule] = {"class_type": "LGClassifierMeanShift", "inputs": kept | {"scaling": "raw", "at": "mu"}}
    prompt[sampler] = {"class_type": "LGSamplerDDPM", "inputs": {"variance": "beta", "rules": [rule, 0]}}
    del guider["inputs"]["rules"]
    drawn = {
        "class_type": "LGVAEEncode",
        "inputs": {"image": ["first", 0], "vae": [load, 2], "posterior": "sample", "seed": 6},
    }
    first = {key: value for key, value in sampling["inputs"].items() if key != "latent_image"}
    prompt["run"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": first | {"latent_image": sampling["inputs"]["latent_image"]},
    }
    prompt["first"] = {"class_type": "VAEDecode", "inputs": {"samples": ["run", 0], "vae": [load, 2]}}
    prompt["encode"] = drawn
    sampling["inputs"]["latent_image"] = ["encode", 0]
    assert prompt[decode]["inputs"]["samples"][0] in prompt
    found = compare(server, prompt, models_folder, tmp_path / "out")
    assert min(found) >= LIMIT, found


@pytest.mark.parametrize("name", ["euler_ancestral", "ddpm", "dpmpp_2m_sde"])
def test_the_noise_of_stock_samplers_steps(
    name: str, server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    """Since 1e4e342f (after 0.6.0) ComfyUI seeds it with seed + 1 on the CPU, and so does the embedded host."""
    prompt = workflow("quickstart", checkpoint="tiny")
    [sampler] = [node for node in prompt.values() if node["class_type"] == "KSampler"]
    sampler["inputs"]["sampler_name"] = name
    found = compare(server, prompt, models_folder, tmp_path / "out")
    source = (server.comfyui / "comfy" / "k_diffusion" / "sampling.py").read_text("utf-8")
    if name == "dpmpp_2m_sde" or "seed += 1" in source:
        assert min(found) >= LIMIT, found
    else:
        assert max(found) < LIMIT, "the README says that this differs"


def test_another_seed_would_be_noticed(server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path) -> None:
    prompt = workflow("quickstart", checkpoint="tiny")
    ours = embedded(workflow("quickstart", checkpoint="tiny", seed=99), models_folder, tmp_path / "out")
    theirs = saved_only(prompt, server.run(prompt))
    assert max(psnr(a, b) for a, b in zip(theirs, ours, strict=True)) < LIMIT


def test_guidance_left_out_would_be_noticed(
    server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    guided = saved_only(prompt, server.run(prompt))
    [guider] = [node for node in prompt.values() if node["class_type"] == "LGGuider"]
    del guider["inputs"]["rules"]
    assert (
        max(psnr(a, b) for a, b in zip(guided, embedded(prompt, models_folder, tmp_path / "out"), strict=True)) < LIMIT
    )


def test_the_pictures_carry_the_workflow(server: Server) -> None:
    prompt = workflow("quickstart", checkpoint="tiny")
    entry = server.wait(server.queue(prompt))
    assert entry["status"]["status_str"] == "success"
    assert entry["prompt"][2] == prompt


def test_a_changed_label_changes_the_picture_and_an_unchanged_graph_runs_nothing(server: Server) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    [rule] = [node for node in prompt.values() if node["class_type"] == "LGClassifierGuidance"]
    first = saved_only(prompt, server.run(prompt))
    again = copy.deepcopy(prompt)
    entry = server.wait(server.queue(again))
    cached = next(message for kind, message in entry["status"]["messages"] if kind == "execution_cached")
    assert set(prompt) - set(cached["nodes"]) <= {key for key, node in prompt.items() if "Image" in node["class_type"]}
    rule["inputs"]["label"] = "Food & Drink"
    changed = saved_only(prompt, server.run(prompt))
    assert min(psnr(a, b) for a, b in zip(first, changed, strict=True)) < LIMIT
