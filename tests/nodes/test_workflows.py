"""The example workflows: complete, convertible, and naming only what exists."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from latent_guidance.host.context import Host, running
from latent_guidance.host.convert import convert
from latent_guidance.host.pack import node_library
from latent_guidance.host.run import run_workflow
from latent_guidance.host.schema import NodeLibrary
from latent_guidance.host.validate import check

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
OWN = tuple(name for name in NAMES if name.startswith(("sd15_", "sdxl_", "sd3_")))
"""Workflows for the user's own checkpoint, which only a ComfyUI loads."""
BUNDLED = tuple(name for name in NAMES if name not in OWN)
NOT_SHOWN = {
    "LGLogProbGuidance",  # follows what another node pack brings: nothing of this pack's goes into it
    "LGLoadPictureCLIP",  # sd15_clip_text shows its loss, with files that ComfyUI itself loads; this one takes a folder of open_clip's
}
"""Nodes that no example shows, and why."""


@pytest.fixture
def library(pack: ModuleType, models_folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("core_nodes", ROOT / "tools" / "core_nodes.py")
    assert spec is not None and spec.loader is not None
    core_nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core_nodes)
    with running(Host(models=models_folder)):
        yield core_nodes.with_core_nodes(node_library())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def with_checkpoint(prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """The prompt on another checkpoint than the emoji's."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        for entry in ("checkpoint", "classifier", "noisy_clip"):
            if isinstance(node["inputs"].get(entry), str):
                node["inputs"][entry] = name
    return changed


def test_every_workflow_has_its_api_twin_and_its_thumbnail() -> None:
    assert {"quickstart", "classifier_guidance"} <= set(BUNDLED) and {"sd15_ksampler", "sdxl_guider"} <= set(OWN)
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.jpg")) == NAMES
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.jpg") as picture:
            assert picture.format == "JPEG" and min(picture.size) >= 256


def test_every_node_is_shown_in_an_example(pack: ModuleType) -> None:
    shown = {node["class_type"] for name in NAMES for node in read(FOLDER / "api" / f"{name}.json").values()}
    missing = sorted(pack.NODE_CLASS_MAPPINGS.keys() - shown - NOT_SHOWN)
    assert not missing, (
        f"no example shows {missing}: give it a column in tools/workflow_rules.py, run tools/make_workflows.py"
    )
    assert not shown & NOT_SHOWN


def test_a_workflow_that_needs_a_checkpoint_says_which_and_needs_no_more() -> None:
    for name in OWN:
        data = read(FOLDER / f"{name}.json")
        loaders = [node for node in data["nodes"] if node["type"] == "CheckpointLoaderSimple"]
        assert len(loaders) == (2 if name == "sd15_autoguidance" else 1)
        for loader in loaders:
            [model] = loader["properties"]["models"]
            assert loader["widgets_values"] == [model["name"]] and model["directory"] == "checkpoints"
            assert model["url"].startswith("https://") and model["url"].endswith("/" + model["name"])
        note = next(node for node in data["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
        kind = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3"}[name.split("_")[0]]
        assert f"your **{kind}** checkpoint" in note
        others = [node for node in data["nodes"] if "Loader" in node["type"] and node not in loaders]
        if name == "sd15_clip_text":
            assert {node["type"] for node in others} == {"CLIPVisionLoader", "CLIPLoader"}
            assert all(f"`{node['widgets_values'][0]}`" in note for node in others)
        else:
            assert not others
        assert not [node for node in data["nodes"] if node["type"].startswith("LGLoad")]


def test_without_a_comfyui_such_a_workflow_is_refused_with_words(tmp_path: Path, pack: ModuleType) -> None:
    with pytest.raises(ValueError, match="CheckpointLoaderSimple") as error:
        run_workflow(FOLDER / "sd15_ksampler.json", host=Host(output=tmp_path))
    assert "ComfyUI" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_api_twin_is_what_the_editor_would_send(name: str, library: NodeLibrary) -> None:
    assert convert(read(FOLDER / f"{name}.json"), library).prompt == read(FOLDER / "api" / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_nodes_inputs_links_and_values_are_all_valid(name: str, library: NodeLibrary) -> None:
    prompt = with_checkpoint(read(FOLDER / "api" / f"{name}.json"), "tiny")
    outputs = check(prompt, library)
    assert [prompt[node]["class_type"] for node in outputs if prompt[node]["class_type"] == "SaveImage"]
    for node in prompt.values():
        required = {entry.name for entry in library.schema(node["class_type"]).inputs.values() if entry.required}
        assert required <= node["inputs"].keys()


def test_a_broken_workflow_would_be_noticed(library: NodeLibrary) -> None:
    good = with_checkpoint(read(FOLDER / "api" / "quickstart.json"), "tiny")
    sampler = next(key for key, node in good.items() if node["class_type"] == "KSampler")
    for change in ({"steps": 0}, {"cgf": 3.0}, {"model": ["99", 0]}, {"sampler_name": "eulr"}, {"positive": ["2", 0]}):
        broken = copy.deepcopy(good)
        broken[sampler]["inputs"].update(change)
        with pytest.raises(ValueError, match=next(iter(change))):
            check(broken, library)


@pytest.mark.parametrize("name", BUNDLED)
def test_they_need_no_file_and_no_luck(name: str) -> None:
    """No LoadImage, and only samplers whose picture is the same in every ComfyUI (or our own seeded noise)."""
    prompt = read(FOLDER / "api" / f"{name}.json")
    kinds = {node["class_type"] for node in prompt.values()}
    assert "LoadImage" not in kinds
    for node in prompt.values():
        assert node["inputs"].get("sampler_name", "euler") in {"euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim"}
        assert node["inputs"].get("checkpoint", "emoji") == "emoji"


@pytest.mark.parametrize("name", NAMES)
def test_the_canvas_is_readable(name: str) -> None:
    """A note says what it is about, everything stands in a titled group, and no node lies on another."""
    data = read(FOLDER / f"{name}.json")
    notes = [node for node in data["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and len(notes[0]["widgets_values"][0]) > 100
    english, _, chinese = notes[0]["widgets_values"][0].rpartition("\n\n")
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 25 and len(english) > 200
    boxes = []
    for node in data["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((node["id"], x, y - 30, x + width, y + height))
    for i, (first, left, top, right, bottom) in enumerate(boxes):
        for second, left2, top2, right2, bottom2 in boxes[i + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"nodes {first} and {second} overlap"
    groups = [group["bounding"] for group in data["groups"]]
    for number, left, top, right, bottom in boxes:
        inside = any(x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in groups)
        assert inside or number in {note["id"] for note in notes}, f"node {number} is in no group"


def test_the_files_are_those_that_the_tool_writes() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_workflows.py"), "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_in_a_guider_no_rule_changes_a_scale_that_nobody_set(name: str, pack: ModuleType) -> None:
    """Rules that change how CFG acts do nothing in a guider's chain without a rule that combines prompt and negative."""
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    for guider in (node for node in prompt.values() if node["class_type"] == "LGGuider"):
        stages, link = set(), guider["inputs"].get("rules")
        while link:
            rule = prompt[link[0]]
            stages.add(pack.NODE_CLASS_MAPPINGS[rule["class_type"]].RULE.stage.value)
            link = rule["inputs"].get("rules")
        assert "scale" not in stages or "combine" in stages, (guider, stages)
