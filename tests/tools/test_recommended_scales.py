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


@pytest.mark.parametrize("tool", ["workflow_parts"], indirect=True)
def test_the_scales_that_the_workflows_are_built_with(curves: dict[str, float], tool: ModuleType) -> None:
    assert curves == {
        "Classifier, raw": tool.RAW_SCALE,
        "Classifier, relative": tool.CLASSIFIER_SCALE,
        "Classifier-free (CFG)": tool.CFG_SCALE,
    }
    page = (ROOT / "docs" / "EMOJI.md").read_text(encoding="utf-8")
    assert f"\n{tool.RAW_STEPS} steps on the karras grid" in page


OTHER_SCALES = {
    "cfg_plus_classifier": {4.0},
    "compare_negatives": {4.0},
    "compare_losses": {3.0},
    "compare_loss_rules": {3.0},
    "compare_rules": {8.0},
    "compare_more_rules": {8.0},
    "compare_cfg_plus_plus": {8.0, 0.6},
    "compare_scales": {0.0, 0.05, 0.1, 0.8},
}
"""Workflow -> scales that it sets on purpose and that are not the curves': its note has to speak of them."""
UNSAID = {"compare_scales", "compare_cfg_plus_plus"}
"""Scales stand in titles and captions."""


def _scales(name: str) -> dict[tuple[str, bool], set[float]]:
    """(CFG or classifier, raw) -> the scales of a workflow of the bundled model."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, bool], set[float]] = {}
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in {"LGCFG", "KSampler"}:
            found.setdefault(("CFG", False), set()).add(inputs.get("guidance_scale", inputs.get("cfg")))
        if node["class_type"] == "LGClassifierGuidance":
            found.setdefault(("classifier", inputs["scaling"] == "raw"), set()).add(inputs["guidance_scale"])
    return found


@pytest.mark.parametrize("tool", ["make_workflows"], indirect=True)
def test_the_example_workflows(curves: dict[str, float], tool: ModuleType) -> None:
    """Each scale of CFG and of classifier guidance is the recommended one, or a named exception that the workflow's note gives."""
    recommended = {
        ("CFG", False): curves["Classifier-free (CFG)"],
        ("classifier", False): curves["Classifier, relative"],
        ("classifier", True): curves["Classifier, raw"],
    }
    met: set[tuple[str, bool]] = set()
    for name in tool.BUNDLED:
        scales = _scales(name)
        others = {scale for kind, those in scales.items() for scale in those - {recommended[kind]}}
        assert others == OTHER_SCALES.get(name, set()), name
        met |= {kind for kind, those in scales.items() if recommended[kind] in those}
        nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
        note = next(node["widgets_values"][0] for node in nodes if node["type"] in {"MarkdownNote", "Note"})
        first = re.search(r"[\u4e00-\u9fff]", note)
        assert first is not None
        english, chinese = note[: first.start()], note[first.start() :]
        if name not in UNSAID:
            for scale in others:
                assert re.search(rf"\b{scale:g}\b", english) and re.search(rf"(?<![\d.]){scale:g}(?![\d.])", chinese), (
                    name
                )
    assert met == set(recommended)


@pytest.mark.parametrize("tool", ["results_picture"], indirect=True)
def test_the_readmes_picture(curves: dict[str, float], tool: ModuleType) -> None:
    assert (curves["Classifier-free (CFG)"], curves["Classifier, relative"]) == (tool.CFG_SCALE, tool.CLASSIFIER_SCALE)
