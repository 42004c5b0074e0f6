"""Reports and passes in a real ComfyUI: found by the latent, also where the sampler's answer comes from the cache."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .comfy import Server
from .test_workflows import workflow

CFG, CLASSIFIER = "Classifier-Free Guidance (CFG)", "Classifier Guidance"
SHIFT = "Classifier Mean Shift (DDPM)"
STEPS, BATCH = 4, 2


@pytest.mark.parametrize(
    ("name", "total", "text"),
    [
        ("nothing", 4, "1 network pass a step: positive"),
        ("nothing, but another node wants the negative", 8, "2 network passes a step: positive, negative"),
        ("cfg", 8, "2 network passes a step: positive, negative"),
        ("cfg, a prompt of two parts", 12, "3 network passes a step: positive, negative"),
        ("interval", 7, "at most 2 network passes a step\nsigma above"),
        ("a classifier too", 8, "called by: Classifier Guidance"),
        ("two conditions, one of two parts", 16, "4 network passes a step: positive, negative, of Two-Condition"),
    ],
)
def test_the_passes_said_are_those_made_and_reported(
    measured: dict[str, Any], name: str, total: int, text: str
) -> None:
    said, made, reported, words = measured["passes"][name]
    assert said == made == reported == total
    assert text in words


def test_the_evaluation_made_again_is_said_and_reported(measured: dict[str, Any]) -> None:
    """FreeU changes activations in place: the first step is evaluated twice where a rule differentiates through the network."""
    for name, more in (("as it is", 0), ("with FreeU", 2)):
        said, made, reported, rows, words = measured["in place"][name]
        assert said == 8 and made == reported == 8 + more and rows == [2 + more, 2, 2, 2]
        assert "one step twice if the model changes its activations in place, as Flux and FreeU do" in words


def test_a_report_is_of_its_own_run(measured: dict[str, Any]) -> None:
    [first], [second] = measured["first"], measured["second"]
    assert first["rules"] == [CFG] and [row["step"] for row in first["rows"]] == [0, 1, 2, 3]
    assert second["rules"] == [CFG, CLASSIFIER] and len(second["rows"]) == 2 * STEPS - 1
    for row in second["rows"]:
        assert len(row["notes"][CLASSIFIER]["probability"]) == BATCH
        assert min(row["delta"] + row["contributions"][CLASSIFIER] + row["contributions"][CFG]) > 0
        assert row["contributions"][CFG] == pytest.approx([3 * delta for delta in row["delta"]], rel=1e-4)
    assert measured["a copy is found"] is True and measured["same picture"] == 0
    assert measured["plot"][0] == 1 and measured["plot"][3] == 3
    assert measured["refused"].startswith("UserError") and "denoised_output" in measured["refused"]


def test_rules_inside_the_samplers_steps_report_beside_the_guiders(measured: dict[str, Any]) -> None:
    guider, steps = measured["in the steps"]
    assert (guider["on"], steps["on"], steps["rules"]) == ("guider", "sampler", [SHIFT])
    assert [row["step"] for row in steps["rows"]] == [0, 1, 2, 3]
    assert all(min(row["contributions"][SHIFT]) > 0 for row in steps["rows"])
    assert all(0 < p < 1 for row in steps["rows"] for p in row["notes"][SHIFT]["probability"])
    assert measured["in the steps: same picture"] == 0
    assert [chain["on"] for chain in measured["in the steps, on the model"]] == ["model", "sampler"]
    chains = [chain["on"] for chain in measured["in the steps, guider and model"]]
    assert sorted(chains) == ["guider", "model", "sampler"]
    assert measured["nothing stays on a guider"] == []


def test_rules_on_a_model_report_under_ksampler_and_beside_a_guiders(measured: dict[str, Any]) -> None:
    [chain] = measured["on the model"]
    assert chain["on"] == "model" and chain["passes"] is None and len(chain["rows"]) == STEPS
    assert chain["rules"] == [CLASSIFIER] and min(chain["rows"][0]["contributions"][CLASSIFIER]) > 0
    by_place = {chain["on"]: chain for chain in measured["guider and model"]}
    assert by_place["guider"]["rules"] == [CFG] and by_place["model"]["rules"] == [CLASSIFIER]


def test_a_run_out_of_the_cache_still_has_its_report(server: Server) -> None:
    prompt = workflow("cfg_plus_classifier", checkpoint="tiny")
    [guider] = [node for node in prompt.values() if node["class_type"] == "LGGuider"]
    [sampler] = [key for key, node in prompt.items() if node["class_type"] == "SamplerCustomAdvanced"]
    guider["inputs"]["report"] = True
    server.wait(server.queue(prompt))  # nobody asks for the report yet
    prompt["90"] = {"class_type": "LGGuidanceReport", "inputs": {"latent": [sampler, 0]}}
    prompt["91"] = {"class_type": "PreviewAny", "inputs": {"source": ["90", 1]}}
    entry = server.wait(server.queue(prompt))
    [cached] = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    assert sampler in cached and "90" not in cached
    [text] = entry["outputs"]["91"]["text"]
    [chain] = json.loads(text)["chains"]
    assert chain["rules"][0] == CFG and len(chain["rows"]) > 1
