"""The scales that the curves recommend (docs/EMOJI.md) are those of the nodes, of their tooltips and of the example workflows."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


OTHERS = {
    "cfg_plus_classifier": ["LGCFG 4"],
    "compare_rules": [
        "LGCFG 8",
        "LGCFGZeroStar 8",
        "LGFrequencyDecoupled 3",
        "LGFrequencyDecoupled 8",
        *["LGCFG 8"] * 5,
    ],
    "compare_more_rules": [*["LGCFG 8"] * 7, "LGAngleDomain 8"],
    "compare_weakened": [
        "LGPerturbedAttention 1.5",
        "LGSmoothedEnergy 2",
        "LGTokenPerturbation 4",
        "LGSlidingWindow 0.6",
    ],
    "compare_negatives": ["LGCFG 4", "LGTwoConditions 3", "LGTwoConditions 4", "LGCFG 4", "LGCFG 4"],
    "classifier_forms": ["LGClassifierPostStep 0.5"],
    "compare_scales": [f"LGClassifierGuidance {scale}" for scale in ("0", "0.05", "0.1", "0.8")],
    "compare_cfg_plus_plus": ["LGCFG 8", "LGCFG 0.6"],
    "compare_losses": ["LGCFG 3", *["LGMPGD 0.3"] * 5, "LGMPGD 0.15"],
    "compare_loss_rules": [
        *("LGCFG 3", "LGMPGD 0.3", "LGDPS 0.3", "LGLossGuidedDiffusion 0.3", "LGFreeDoM 0.3"),
        *("LGUniversalGuidance 0.15", "LGTrainingFreeGuidance 0.15", "LGTrainingFreeGuidance 0.15"),
    ],
    "noisy_clip": ["LGNoisyCLIPGuidance 2", "LGNoisyCLIPGuidance 8", "LGNoisyCLIPGuidance 8"],
}
"""Workflow -> scales that it sets on purpose and that are not the recommended ones, in order; its note speaks of them."""
NOT_IN_NOTES = {"compare_scales", "compare_weakened"}
"""Captions show the scales of the one; the other's note says that they are set by eye."""


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)", text, re.ASCII))


def _graph(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tool", ["make_workflows"], indirect=True)
def test_the_example_workflows(curves: dict[str, float], tool: ModuleType) -> None:
    """Each scale is the recommended one, or a named exception of which the workflow's note speaks, in both languages."""
    recommended = json.loads((ROOT / "latent_guidance" / "guidance" / "recommended.json").read_text(encoding="utf-8"))
    recommended["KSampler"] = {"cfg": recommended["LGCFG"]["guidance_scale"]}
    met: set[str] = set()
    for name in tool.BUNDLED:
        others: list[str] = []
        for node in _graph(name).values():
            kind, inputs = node["class_type"], node["inputs"]
            for entry, value in inputs.items():
                if entry not in {"cfg", "scale"} and "_scale" not in entry and not entry.startswith("scale_"):
                    continue
                if isinstance(value, list) or entry in {"away_scale", "negative_scale"}:
                    continue
                raw = kind == "LGClassifierGuidance" and inputs["scaling"] == "raw"
                wanted = curves["Classifier, raw"] if raw else recommended[kind].get(entry)
                met |= {f"{kind} raw" if raw else kind} if value == wanted else set()
                others += [] if value == wanted else [f"{kind} {value:g}"]
        assert others == OTHERS.get(name, []), name
        nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
        note = next(node["widgets_values"][0] for node in nodes if node["type"] in {"MarkdownNote", "Note"})
        first = re.search(r"[\u4e00-\u9fff]", note)
        assert first is not None
        for language in (note[: first.start()], note[first.start() :]):
            assert name in NOT_IN_NOTES or {other.split()[1] for other in others} <= _numbers(language), name
    assert met >= {"LGCFG", "KSampler", "LGClassifierGuidance", "LGClassifierGuidance raw", "LGClassifierMeanShift"}


def test_a_raw_scale_goes_with_its_steps_and_captions_with_their_scales(curves: dict[str, float]) -> None:
    forms = _graph("classifier_forms").values()
    [steps] = [node["inputs"]["steps"] for node in forms if node["class_type"] == "BasicScheduler"]
    assert f"\n{steps} steps on the karras grid" in (ROOT / "docs" / "EMOJI.md").read_text(encoding="utf-8")
    scales = _graph("compare_scales")
    [sheet] = [node["inputs"] for node in scales.values() if node["class_type"] == "LGPictureGrid"]
    shown = []
    for entry in ("images", *sorted(name for name in sheet if name.startswith("images_"))):
        decoder = scales[sheet[entry][0]]["inputs"]
        guider = scales[scales[decoder["samples"][0]]["inputs"]["guider"][0]]["inputs"]
        shown.append(scales[guider["rules"][0]]["inputs"]["guidance_scale"])
    assert sheet["labels"].splitlines() == [f"scale {scale:g}" if scale else "unguided" for scale in shown]
    assert curves["Classifier, relative"] in shown


@pytest.mark.parametrize("tool", ["results_picture"], indirect=True)
def test_the_readmes_picture(curves: dict[str, float], tool: ModuleType) -> None:
    assert (curves["Classifier-free (CFG)"], curves["Classifier, relative"]) == (tool.CFG_SCALE, tool.CLASSIFIER_SCALE)
