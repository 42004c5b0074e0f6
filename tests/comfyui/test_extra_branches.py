"""Rules with branches of their own in a real ComfyUI: equal to core's own guiders and to the embedded host, and no pass too many."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .comfy import Server, psnr
from .test_guidance import DIFFERENT, SAME
from .test_workflows import embedded, saved_only, workflow

PARITY = 60.0
"""PSNR in dB of a picture by ComfyUI against the embedded host's."""


SAME_TWO = [
    "is core's",
    "again",
    "equal conditions are cfg",
    "equal to the negative is cfg",
    "summed, equal conditions are cfg",
    "neutral is the prompt",
    "no negative where it cancels",
    "another node evaluates the pair",
]
OTHER_TWO = ["from cfg", "the forms", "the condition", "another node's hook acts", "an area in the condition acts"]
SAME_PERP = [
    "is core's for one picture",
    "alone and in a batch",
    "neutral is the prompt",
    "without negatives it is cfg",
    "the negatives' order",
    "another node evaluates the pair",
]
SAME_AUTO = [
    "again",
    "neutral is the model",
    "at 0 it is the weak model",
    "a negative is not looked at",
    "one estimate by hand",
    "after unloading",
    "after an interrupt",
    "what is masked is kept",
]
OTHER_AUTO = ["from the model", "from the weak model", "the weak model from the model"]
OTHER_PERP = ["from cfg", "the second negative", "core's in a batch"]


@pytest.mark.parametrize(
    "name",
    [f"two conditions: {name}" for name in SAME_TWO]
    + [f"perp-neg: {name}" for name in SAME_PERP]
    + [f"autoguidance: {name}" for name in SAME_AUTO],
)
def test_the_same_picture_by_two_ways(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= SAME


@pytest.mark.parametrize(
    "name",
    [f"two conditions differ: {name}" for name in OTHER_TWO]
    + [f"perp-neg differs: {name}" for name in OTHER_PERP]
    + [f"autoguidance differs: {name}" for name in OTHER_AUTO],
)
def test_what_acts_is_seen(measured: dict[str, Any], name: str) -> None:
    assert measured["finite"] is True and measured[name] >= DIFFERENT


def test_one_batched_call_a_step_and_no_branch_too_many(measured: dict[str, Any]) -> None:
    steps, batch = 6, 2
    assert measured["calls: three"] == [3 * batch] * steps
    assert measured["calls: two"] == [2 * batch] * steps
    assert measured["calls: two negatives"] == [4 * batch] * steps
    assert measured["calls: one"] == [batch] * steps
    assert measured["calls: autoguidance, the model"] == [batch] * steps
    assert measured["calls: autoguidance, the weak model"] == [batch] * 3
    assert measured["calls: in a window"] == [3 * batch] * 3 + [batch] * 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two conditions on a model", ["Two-Condition Guidance", "Guider", "SamplerCustomAdvanced"]),
        ("two conditions without a negative", ["negative", "Null Conditioning"]),
        ("an empty condition", ["empty", "CLIPTextEncode"]),
        ("no condition", ["condition of Two-Condition Guidance is missing"]),
        ("perp-neg on a model", ["Perp-Neg", "Guider", "SamplerCustomAdvanced"]),
        ("perp-neg without the empty prompt", ["negative", "Null Conditioning"]),
        ("a negative with an area", ["a part of the picture", "mask"]),
        ("the weak model is the model", ["weights only once", "loader of its own"]),
        ("rules on the weak model", ["rules on it", "Apply Guidance to Model"]),
        ("a weak model of another process", ["rectified flow", "VE-scaled"]),
        ("hooks", ["hooks", "model of its own"]),
        ("autoguidance on a model", ["Autoguidance", "Guider", "SamplerCustomAdvanced"]),
        ("two rules that combine", ["Two-Condition Guidance", "at most one"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_words(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: ") and all(word in message for word in words), message


def test_a_guider_of_two_models_in_core_makes_the_same_picture(measured: dict[str, Any]) -> None:
    found = measured["autoguidance: is core's guider of two models"]
    if found is None:
        pytest.skip("this ComfyUI has no guider of two models")
    assert found <= SAME


def test_the_weak_model_is_loaded_and_freed_by_comfyui(measured: dict[str, Any]) -> None:
    assert measured["both models are managed"] and measured["let go of afterwards"]
    assert measured["interrupted"] == "InterruptProcessingException" and measured["let go of after an interrupt"]
    assert measured["its options are left alone"]


def with_rule(rule: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """A workflow with ``rule`` in its guider, in the place of those that it has, and ``more`` nodes."""
    prompt = workflow("cfg_plus_classifier", checkpoint="tiny")
    [guider] = [node for node in prompt.values() if node["class_type"] == "LGGuider"]
    [load] = [key for key, node in prompt.items() if node["class_type"] == "LGLoadCheckpoint"]
    text = {"text": "a red flag in the snow", "clip": [load, 1]}
    prompt |= {"text": {"class_type": "CLIPTextEncode", "inputs": text}, "rule": rule, **more}
    guider["inputs"]["rules"] = ["rule", 0]
    return prompt


def pictures(
    server: Server, prompt: dict[str, Any], models: Path, folder: Path
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    return saved_only(prompt, server.run(prompt)), embedded(prompt, models, folder)


def check_parity(server: Server, prompt: dict[str, Any], changed: dict[str, Any], models: Path, folder: Path) -> None:
    """Both hosts make one picture of ``prompt``; that of ``changed`` would be noticed."""
    theirs, mine = pictures(server, prompt, models, folder / "out")
    found = [psnr(a, b) for a, b in zip(theirs, mine, strict=True)]
    assert found and min(found) >= PARITY, found
    others = embedded(changed, models, folder / "changed")
    assert max(psnr(a, b) for a, b in zip(theirs, others, strict=True)) < PARITY


@pytest.mark.parametrize("form", ["nested", "sum"])
def test_two_conditions_make_the_embedded_hosts_picture(
    form: str, server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    def prompt(form: str) -> dict[str, Any]:
        inputs = {"condition": ["text", 0], "first_scale": 1.5, "second_scale": 3.0, "form": form}
        return with_rule({"class_type": "LGTwoConditions", "inputs": inputs})

    changed = prompt("sum" if form == "nested" else "nested")
    check_parity(server, prompt(form), changed, models_folder, tmp_path)


def test_perp_neg_makes_the_embedded_hosts_picture(
    server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    def prompt(strength: float) -> dict[str, Any]:
        inputs = {"negative": ["both", 0], "guidance_scale": 4.0, "negative_scale": strength}
        made = with_rule({"class_type": "LGPerpNeg", "inputs": inputs})
        snow = {"text": "snow", "clip": made["text"]["inputs"]["clip"]}
        joined = {"conditioning_1": ["text", 0], "conditioning_2": ["snow", 0]}
        return made | {
            "snow": {"class_type": "CLIPTextEncode", "inputs": snow},
            "both": {"class_type": "ConditioningCombine", "inputs": joined},
        }

    check_parity(server, prompt(1.5), prompt(0.5), models_folder, tmp_path)


def test_autoguidance_makes_the_embedded_hosts_picture(
    server: Server, pack: ModuleType, models_folder: Path, tmp_path: Path
) -> None:
    from latent_guidance.models.tiny import make_tiny_checkpoint

    if not (models_folder / "latent_guidance" / "weak").is_dir():
        make_tiny_checkpoint(models_folder / "latent_guidance" / "weak", seed=1)

    def prompt(scale: float) -> dict[str, Any]:
        inputs = {"weak_model": ["weak", 0], "guidance_scale": scale}
        load = {"class_type": "LGLoadUNet", "inputs": {"checkpoint": "weak"}}
        return with_rule({"class_type": "LGAutoguidance", "inputs": inputs}, weak=load)

    check_parity(server, prompt(2.0), prompt(1.5), models_folder, tmp_path)
