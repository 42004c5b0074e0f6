"""What a ComfyUI server says of the pack: its nodes, its start, its files, its errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import latent_guidance

from .comfy import ROOT, Refused, Server
from .test_workflows import EVERY, workflow

START_LIMIT = 0.3
"""Seconds that loading the pack may add to ComfyUI's start."""


def test_the_pack_loads_quickly(server: Server) -> None:
    """ComfyUI prints how long each pack took."""
    found = re.search(r"(\d+\.\d+) seconds: .*latent_guidance", server.text())
    assert found and float(found[1]) <= START_LIMIT
    assert "IMPORT FAILED: " + "latent_guidance" not in server.text()


def test_the_editor_gets_every_node_as_it_is_declared(
    server: Server, pack: ModuleType, embedded: dict[str, type]
) -> None:
    info = server.json("/object_info")
    for node_id, node in embedded.items():
        seen = info[node_id]
        assert seen["display_name"] == pack.NODE_DISPLAY_NAME_MAPPINGS[node_id]
        assert seen["category"] == node.CATEGORY  # type: ignore[attr-defined]
        assert seen["description"] == node.DESCRIPTION  # type: ignore[attr-defined]
        assert seen["output"] == list(node.RETURN_TYPES)  # type: ignore[attr-defined]
        assert seen["output_tooltips"] == list(node.OUTPUT_TOOLTIPS)  # type: ignore[attr-defined]
        for group, inputs in node.INPUT_TYPES().items():  # type: ignore[attr-defined]
            for name, (_, options) in inputs.items():
                assert seen["input"][group][name][1]["tooltip"] == options["tooltip"]
    assert "tiny" in info["LGLoadCheckpoint"]["input"]["required"]["checkpoint"][0]
    assert "tiny" in info["LGLoadClassifier"]["input"]["required"]["classifier"][0]


def test_the_editor_finds_nodes_by_their_other_names(server: Server, embedded: dict[str, type]) -> None:
    """Newer ComfyUIs send them along: all of a node's, or none."""
    info = server.json("/object_info")
    if "search_aliases" not in info["KSampler"]:
        pytest.skip("this ComfyUI has no search aliases")
    wanted = {node_id: getattr(node, "SEARCH_ALIASES", []) for node_id, node in embedded.items()}
    assert {node_id: info[node_id]["search_aliases"] for node_id in embedded} == wanted
    assert all(aliases for node_id, aliases in wanted.items() if hasattr(embedded[node_id], "RULE"))


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_the_editor_gets_every_nodes_help_page(server: Server, embedded: dict[str, type], locale: str) -> None:
    """From where it asks for a page: under the name of the pack's folder, by node and language."""
    info, pages = server.json("/object_info"), {}
    for node_id in embedded:
        kind, folder = info[node_id]["python_module"].split(".")[:2]
        assert kind == "custom_nodes", "other nodes' pages are asked for elsewhere"
        pages[node_id] = server.get(f"/extensions/{folder}/docs/{node_id}/{locale}.md").decode("utf-8")
    for node_id, page in pages.items():
        node: Any = embedded[node_id]
        name, words = info[node_id]["display_name"], node.DESCRIPTION
        if locale == "zh":
            name, words = node.ZH["display_name"], node.ZH["description"]
        assert page.startswith(f"# {name}\n") and words in page, node_id
        for put in [put for group in node.INPUT_TYPES().values() for put in group]:
            assert f"**{put}**" in page or f"(`{put}`)" in page, (node_id, put)


def test_the_editor_offers_the_example_workflows(server: Server) -> None:
    listed = server.json("/api/workflow_templates")
    mine = next(found for name, found in listed.items() if "latent_guidance" in name)
    assert sorted(mine) == EVERY


def test_the_model_folders_are_known(server: Server) -> None:
    server.json("/object_info/LGLoadCheckpoint")
    assert {"latent_guidance", "latent_classifiers"} <= set(server.json("/models"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "dragons"}, ["dragons", "Flags"]),
        ({"label": ""}, ["Flags"]),
        ({"sigma_lo": 5.0, "sigma_hi": 2.0}, ["never opens"]),
    ],
)
def test_a_wrong_rule_stops_the_run_with_words(server: Server, change: dict[str, object], words: list[str]) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    [rule] = [node for node in prompt.values() if node["class_type"] == "LGClassifierGuidance"]
    rule["inputs"].update(change)
    with pytest.raises(Refused) as error:
        server.run(prompt)
    assert all(word in str(error.value) for word in words)


def test_a_value_out_of_range_is_refused_before_it_runs(server: Server) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    [rule] = [node for node in prompt.values() if node["class_type"] == "LGClassifierGuidance"]
    rule["inputs"]["guidance_scale"] = 1e6
    with pytest.raises(Refused, match="guidance_scale"):
        server.run(prompt)


def test_a_checkpoint_that_is_gone_is_refused_before_it_runs(server: Server) -> None:
    with pytest.raises(Refused, match="nothing"):
        server.run(workflow("quickstart", checkpoint="nothing"))


def test_an_interrupt_stops_a_run_and_the_next_one_works(server: Server, base: Path) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 1000
    prompt_id = server.queue(prompt)
    time.sleep(2)
    start = time.monotonic()
    while not server.json("/queue")["queue_running"] and time.monotonic() - start < 60:
        time.sleep(0.1)
    server.post("/interrupt", {})
    entry = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert server.run(workflow("classifier_guidance", checkpoint="tiny", seed=4))


def test_comfyui_reads_the_packs_project_file(inside: Callable[[str], dict[str, Any]]) -> None:
    found = inside(
        f"""
import inside
from comfy_config import config_parser
found = config_parser.extract_node_configuration({str(ROOT)!r})
project, comfy = found.project, found.tool_comfy
inside.result.update(
    name=project.name, version=project.version, license=project.license.text, issues=project.urls.issues,
    comfyui=project.supported_comfyui_version, systems=project.supported_os, publisher=comfy.publisher_id, icon=comfy.icon,
)
"""
    )
    assert (found["name"], found["version"], found["license"]) == (
        "latent-guidance",
        latent_guidance.__version__,
        "MIT",
    )
    assert found["issues"] and found["publisher"] and found["icon"].endswith(".svg")
    assert (found["comfyui"], found["systems"]) == (">=0.3.64", ["OS Independent"])
