"""The scales that the curves recommend (docs/EMOJI.md) are those of the nodes, of their tooltips and of the example workflows."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from latent_guidance.evaluation.rule_rows import ROWS
from latent_guidance.guidance import ClassifierGuidance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def curves() -> dict[str, float]:
    """The recommended scales of the page, by its words for the guidance."""
    page = (ROOT / "docs" / "EMOJI.md").read_text(encoding="utf-8")
    table = page.split("| guidance | recommended scale |")[1].split("<details>")[0]
    return {name: float(scale) for name, scale in re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", table, re.MULTILINE)}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    return importlib.import_module(request.param)


def test_the_page_has_the_three_curves(curves: dict[str, float]) -> None:
    assert set(curves) == {"Classifier, raw", "Classifier, relative", "Classifier-free (CFG)"}


def test_nodes_and_tooltips(curves: dict[str, float]) -> None:
    raw, relative, free = curves["Classifier, raw"], curves["Classifier, relative"], curves["Classifier-free (CFG)"]
    recommended = json.loads((ROOT / "latent_guidance" / "guidance" / "recommended.json").read_text(encoding="utf-8"))
    assert ClassifierGuidance.guidance_scale == recommended["LGClassifierGuidance"]["guidance_scale"] == relative
    assert ClassifierGuidance.scaling == "relative"
    assert recommended["LGCFG"]["guidance_scale"] == free
    rows = {row.key: row for row in ROWS}
    assert rows["cfg"].settings["guidance_scale"] == free and rows["classifier"].recommended == relative
    page = (ROOT / "web" / "docs" / "LGClassifierGuidance" / "en.md").read_text(encoding="utf-8")
    assert (
        f"Recommended on the emoji model: {relative:g}." in page
        and f"at its best on the emoji model {raw:g}, in 30 steps)" in page
    )
    page = (ROOT / "web" / "docs" / "LGClassifierGuidance" / "zh.md").read_text(encoding="utf-8")
    assert f"emoji 模型上以 {raw:g} 为佳，30 步时）" in page


@pytest.mark.parametrize("tool", ["workflow_graphs"], indirect=True)
def test_the_examples_of_classifier_guidance(curves: dict[str, float], tool: ModuleType) -> None:
    assert curves["Classifier, relative"] == tool.SCALE == tool.SECOND_SCALE
    nodes = json.loads((ROOT / "workflows" / "classifier_guidance.json").read_text(encoding="utf-8"))["nodes"]
    scales = [value for node in nodes if node["type"] == "LGClassifierGuidance" for value in node["widgets_values"]]
    assert curves["Classifier, relative"] in scales and "relative" in scales


@pytest.mark.parametrize("tool", ["results_picture"], indirect=True)
def test_the_readmes_picture(curves: dict[str, float], tool: ModuleType) -> None:
    assert (curves["Classifier-free (CFG)"], curves["Classifier, relative"]) == (tool.CFG_SCALE, tool.CLASSIFIER_SCALE)
