"""The example workflows for the user's own checkpoint: accepted as they are, and run on one of SD 1.5's make with random weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .comfy import ROOT, Refused, Server, run_inside
from .test_workflows import OWN, psnr, saved_only

SD15, TUNED = "v1-5-pruned-emaonly-fp16.safetensors", "DreamShaper_8_pruned.safetensors"

WITH_CLIP = ("sd15_clip_text",)
"""Needs a whole CLIP ViT-L too, which ComfyUI knows by its depth; ``test_picture_clip.py`` runs its nodes on a small one."""

SAME = 60.0
"""PSNR in dB from which two pictures count as one."""

MAKE = """
import inside, json, os, torch
from safetensors.torch import save_file
import comfy.clip_model, comfy.ops
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
import comfy.sd1_clip

torch.manual_seed(0)
with open(os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_clip_config.json")) as file:
    text = json.load(file)
plain = dict(dtype=torch.float16, device="cpu", operations=comfy.ops.disable_weight_init)
parts = {
    "model.diffusion_model.": UNetModel(  # SD 1.5's blocks, fewer of them
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=(1, 1),
        transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1], context_dim=768, num_heads=8,
        use_spatial_transformer=True, legacy=False, **plain,
    ),
    "cond_stage_model.transformer.": comfy.clip_model.CLIPTextModel(text, **plain),
    "first_stage_model.": AutoencoderKL(
        ddconfig=dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
                      num_res_blocks=2, attn_resolutions=[], dropout=0.0), embed_dim=4,
    ).half(),
}
weights, noise = {}, torch.randn(2**22)
for prefix, network in parts.items():
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            norm = value.ndim == 1 and name.endswith("weight")
            spread = 0.0 if value.ndim == 1 else min(1.0, value[0].numel() ** -0.5)
            drawn = (noise * spread).half().repeat(value.numel() // len(noise) + 1)[: value.numel()].reshape(value.shape)
            value = torch.ones_like(value) if norm else drawn
        weights[prefix + name] = value.contiguous()
save_file(weights, inside.path)
"""


made: list[Path] = []
"""Where the checkpoint is, once it is made: half a GB is written once for all ComfyUIs."""


@pytest.fixture(scope="session")
def checkpoint(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint that ComfyUI takes for SD 1.5, in models/checkpoints under the name that the workflows give."""
    if not made:
        folder = tmp_path_factory.mktemp("make")
        run_inside(server.comfyui, server.base, MAKE.replace("inside.path", repr(str(folder / SD15))), folder)
        made.append(folder / SD15)
    checkpoints = server.base / "models" / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for name in (SD15, TUNED):
        (checkpoints / name).hardlink_to(made[0])
    return SD15


def twin(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def small(prompt: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The prompt on ``checkpoint``, with few steps on few pixels; as a flow where it was meant for one."""
    [loader, *_] = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    flow = prompt[loader]["inputs"]["ckpt_name"].startswith("sd3")
    for node in prompt.values():
        inputs = node["inputs"]
        name = TUNED if inputs.get("ckpt_name") == TUNED else checkpoint
        sides = {side: min(64, inputs[side] // 8) for side in ("width", "height") if side in inputs}
        changes = {"ckpt_name": name, **sides, "steps": 3, "channels": 4}
        inputs.update({name: value for name, value in changes.items() if name in inputs})
        if flow and inputs.get("model") == [loader, 0]:
            inputs["model"] = ["flow", 0]
    if flow:
        prompt["flow"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": [loader, 0], "shift": 3.0}}
    return prompt


@pytest.mark.parametrize("name", [name for name in OWN if name not in WITH_CLIP])
def test_it_runs_on_a_checkpoint_of_its_kind_and_every_rule_acts(name: str, server: Server, checkpoint: str) -> None:
    """SDXL's and SD3's too: the graph is the same, and small ones cannot be made, since ComfyUI knows them by their depth."""
    prompt = small(twin(name), checkpoint)
    found = server.run(prompt)
    [picture] = saved_only(prompt, found)
    assert picture.std() > 0.01
    rules = [key for key, node in prompt.items() if node["class_type"] == "LGPictureGrid"]
    if rules:
        images = [value for key, value in prompt[rules[0]]["inputs"].items() if key.startswith("images")]
        for i, image in enumerate(images):
            prompt[f"cell{i}"] = {"class_type": "PreviewImage", "inputs": {"images": image}}
        cells = server.run(prompt)
        pictures = [cells[f"cell{i}"][0] for i in range(len(images))]
        if (
            name == "sd15_autoguidance"
        ):  # here its two checkpoints are one file: guided away from its equal, a model is itself
            assert psnr(pictures[0], pictures.pop()) > SAME
        assert max(psnr(pictures[0], other) for other in pictures[1:]) < float("inf")
    else:
        for node in prompt.values():
            if node["class_type"] in ("LGGuider", "KSampler"):
                node["inputs"].pop("rules", None)
                node["inputs"].update({"cfg": 1.0} if "cfg" in node["inputs"] else {})
        [plain] = saved_only(prompt, server.run(prompt))
        assert psnr(picture, plain) < float("inf")


@pytest.mark.parametrize("name", OWN)
def test_as_it_is_only_the_checkpoint_can_be_missing(name: str, server: Server) -> None:
    with pytest.raises(Refused) as error:
        prompt = twin(name)
        for node in prompt.values():
            node["inputs"].update({"ckpt_name": "gone.safetensors"} if "ckpt_name" in node["inputs"] else {})
        server.queue(prompt)
    errors = json.loads(str(error.value))["node_errors"]
    clip = {"CLIPVisionLoader", "CLIPLoader"} if name in WITH_CLIP else set[str]()
    assert {found["class_type"] for found in errors.values()} == {"CheckpointLoaderSimple"} | clip


def test_the_declared_core_nodes_are_as_in_comfyui(server: Server) -> None:
    info = server.json("/object_info")
    declared = core_nodes()
    assert set(declared.CORE) == {
        "CheckpointLoaderSimple",
        "CLIPVisionLoader",
        "CLIPLoader",
        "SolidMask",
        "MaskComposite",
    }
    for name, node in declared.CORE.items():
        assert tuple(info[name]["output"]) == node.RETURN_TYPES
        for part, inputs in node.INPUT_TYPES().items():
            found = info[name]["input"][part]
            assert list(found) == list(inputs)
            for entry, (kind, options) in inputs.items():
                if isinstance(kind, str):
                    assert found[entry][0] == kind
                    assert {key: found[entry][1][key] for key in options} == options
    titles = {name: info[name]["display_name"] for name in declared.TITLES}
    assert titles == declared.TITLES


def core_nodes() -> ModuleType:
    """tools/core_nodes.py."""
    spec = importlib.util.spec_from_file_location("core_nodes", ROOT / "tools" / "core_nodes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
