"""Guidance inside a real ComfyUI: as GUIDER and as patch, under core's guiders, with other nodes' hooks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

SAME, DIFFERENT = 1e-4, 1e-2
"""Largest difference relative to the spread of the latents: rounding is below the first, an effect above the second."""


@pytest.mark.parametrize(
    "name",
    [
        "no rules",
        "again",
        "basic",
        "cfg 1",
        "ksampler 1",
        "clone of a patch",
        "the model is left alone",
        "our cfg is core's",
        "cfg and classifier: patch of both",
        "cfg and classifier: patch of both, ksampler",
        "cfg and classifier: core's cfg",
        "cfg and classifier: cfg in guider, classifier on model",
        "cfg and classifier: heun",
        "interval: patch",
        "chain: two patches",
        "chain: guider and patch",
        "cfg function: patch order",
        "cfg function: in our guider",
        "pre hook: in our guider",
        "post hook: in our guider",
        "post hook: at scale 1",
        "ddim is euler",
        "ddim is euler, masked",
        "item 1 of a batch, alone",
        "after unloading",
        "flow: patch",
    ],
)
def test_the_same_picture_by_two_ways(measured: dict[str, Any], name: str) -> None:
    assert measured[name] <= SAME


@pytest.mark.parametrize(
    "name",
    [
        "guided differs",
        "cfg and classifier is not cfg",
        "interval is not cfg",
        "chain: not the first",
        "chain: not the second",
        "cfg function acts",
        "post hook acts",
        "post hook before ours",
        "post hook kept by our patch",
        "the mask acts",
        "mean shift acts",
        "mean shift twice acts twice",
        "post step acts",
        "items differ",
        "step noise is not the initial noise",
        "flow: guided differs",
    ],
)
def test_what_acts_is_seen(measured: dict[str, Any], name: str) -> None:
    assert measured[name] >= DIFFERENT


@pytest.mark.parametrize("name", ["finite", "ddpm is finite", "flow: finite", "flow: ddpm"])
def test_nothing_is_broken(measured: dict[str, Any], name: str) -> None:
    assert measured[name] is True


def test_the_loader_lists_the_labels(measured: dict[str, Any]) -> None:
    assert measured["labels"][:2] == ["Smileys & Emotion", "People & Body"] and len(measured["labels"]) == 9


def test_one_batched_call_a_step_and_no_branch_too_many(measured: dict[str, Any]) -> None:
    steps, batch = 6, 2
    assert measured["batches: plain"] == [batch] * steps
    assert measured["batches: cfg"] == [2 * batch] * steps
    assert measured["batches: interval"] == [2 * batch] * 3 + [batch] * 3
    assert measured["batches: classifier"] == [batch] * steps


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cfg without negative", ["negative", "Null Conditioning"]),
        ("cfg under BasicGuider", ["negative", "KSampler", "BasicGuider"]),
        ("unknown label", ["dragons", "Flags", "Food & Drink"]),
        ("guider rule in sampler", ["Classifier Guidance", "Guider"]),
        ("sampler rule in guider", ["Mean Shift", "DDPM"]),
        ("classifier in both", ["twice", "Classifier Guidance", "Mean Shift"]),
        ("classifier on the model and in the sampler", ["twice", "Classifier Guidance", "Mean Shift"]),
        ("same rule twice", ["Classifier Guidance", "twice"]),
        ("two cfg rules", ["Classifier-Free Guidance (CFG)", "at most one"]),
        ("noise for another batch", ["1 pictures", "batch_size"]),
        ("picture size", ["64 x 65", "multiples of 8", "64 x 64"]),
        ("latent channels", ["5 channels", "4"]),
        ("unknown checkpoint", ["nothing", "tiny"]),
        ("classifier of other latents", ["Stable Diffusion 1", "0.18215", "0.8", "Load Noisy-Latent Classifier"]),
    ],
)
def test_bad_input_is_refused_with_words(measured: dict[str, Any], name: str, words: list[str]) -> None:
    message = measured[f"refused: {name}"]
    assert message.startswith("UserError: "), message
    assert all(word in message for word in words), message


def test_a_node_that_would_undo_what_another_did_is_refused(measured: dict[str, Any]) -> None:
    lost = {name: message for name, message in measured.items() if name.startswith("lost: ")}
    assert len(lost) == 4
    for name, message in lost.items():
        assert message.startswith("UserError: ") and "Classifier Guidance did would be lost" in message, (name, message)
        assert ("Limited Interval" if "interval" in name else "Classifier-Free") in message
    assert measured["cfg and classifier: cfg, then classifier, on the model"] <= SAME


def test_other_latents_are_refused_on_the_model_too(measured: dict[str, Any]) -> None:
    assert measured["refused: on the model too"] == measured["refused: classifier of other latents"]


def test_the_classifier_is_managed_by_comfyui(measured: dict[str, Any]) -> None:
    assert measured["classifier is managed while sampling"] is True


def test_the_case_of_inference_tensors_was_met(measured: dict[str, Any]) -> None:
    assert measured["inference tensors"] is True


def test_an_interrupt_stops_within_one_step(measured: dict[str, Any]) -> None:
    assert measured["interrupted: guider"] == measured["interrupted: ddpm"] == "InterruptProcessingException"
    assert measured["steps until interrupted"] == 2
    assert measured["ddpm steps until interrupted"] == 2


def test_a_flow_model_starts_without_signal(measured: dict[str, Any]) -> None:
    assert measured["flow: first sigma"] == pytest.approx(1.0)
    assert measured["flow: process"] == "rectified flow"
