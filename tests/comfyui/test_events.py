"""What the user sees while a prompt runs: progress, previews, the classifier's labels; and that Cancel stops it at once."""

from __future__ import annotations

from typing import Any

import pytest

from .comfy import Server
from .events import Events, watch
from .test_workflows import workflow

STEPS = 6
LABELS = ("Smileys & Emotion", "Flags")
LATE = 2
"""Steps that may still be told of after Cancel was answered: one at work, one whose message was on its way."""


def only(prompt: dict[str, Any], kind: str) -> str:
    """The id of the one node of a type."""
    [node_id] = [key for key, node in prompt.items() if node["class_type"] == kind]
    return node_id


def with_sampler(prompt: dict[str, Any], kind: str, **inputs: Any) -> dict[str, Any]:
    """The prompt with one of the pack's own samplers in the place of the stock one."""
    prompt[only(prompt, "KSamplerSelect")] = {"class_type": kind, "inputs": inputs}
    return prompt


def on_model(prompt: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's KSampler on a model that CFG was applied to."""
    sampler = prompt[only(prompt, "KSampler")]["inputs"]
    prompt["rule"] = {"class_type": "LGCFG", "inputs": {"guidance_scale": 3.0}}
    prompt["patch"] = {"class_type": "LGApplyGuidance", "inputs": {"model": sampler["model"], "rules": ["rule", 0]}}
    sampler["model"] = ["patch", 0]
    return prompt


def graph(way: str, seed: int) -> dict[str, Any]:
    match way:
        case "guider":
            return workflow("cfg_plus_classifier", checkpoint="tiny", seed=seed)
        case "ddpm":
            return with_sampler(
                workflow("classifier_guidance", checkpoint="tiny", seed=seed), "LGSamplerDDPM", variance="beta"
            )
        case "ddim":
            return with_sampler(workflow("classifier_guidance", checkpoint="tiny", seed=seed), "LGSamplerDDIM", eta=0.5)
    return on_model(workflow("quickstart", checkpoint="tiny", seed=seed))


@pytest.mark.parametrize("way", ["guider", "ddpm", "ddim", "patch"])
def test_progress_and_previews_arrive_at_every_step(way: str, server: Server) -> None:
    prompt = graph(way, seed=21)
    node = only(prompt, "KSampler" if way == "patch" else "SamplerCustomAdvanced")
    events = watch(server, prompt)
    assert events.end == "execution_success"
    assert [done for at, done, of in events.progress if at == node and of == STEPS] == list(range(1, STEPS + 1))
    assert len(events.previews) == STEPS and all(min(size) > 0 for size in events.previews)


def test_nothing_is_told_of_a_run_that_is_cached(server: Server) -> None:
    """The measure above has teeth: progress and previews come from sampling alone."""
    prompt = graph("guider", seed=22)
    watch(server, prompt)
    again = watch(server, prompt)
    assert again.end == "execution_success" and not again.progress and not again.previews


def test_the_loader_shows_the_labels_of_its_classifier(server: Server) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny", seed=23)
    prompt[only(prompt, "LGLoadClassifier")]["inputs"]["classifier"] = "shown"
    shown = server.base / "models" / "latent_classifiers" / "shown"
    shown.symlink_to(server.base / "models" / "latent_guidance" / "tiny" / "classifier", target_is_directory=True)
    try:
        events = watch(server, prompt)
    finally:
        shown.unlink()
    lines = events.texts[only(prompt, "LGLoadClassifier")].splitlines()
    assert len(lines) == 9 and set(LABELS) <= set(lines)


@pytest.mark.parametrize("way", ["guider", "ddpm", "patch"])
def test_cancel_stops_within_a_step(way: str, server: Server) -> None:
    prompt = graph(way, seed=24)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 1000
        if "batch_size" in node["inputs"]:
            node["inputs"]["batch_size"] = 16
    at: list[int] = []

    def cancel(events: Events) -> None:
        if events.steps() >= 3 and not at:
            server.post("/interrupt", {})
            at.append(events.steps())

    events = watch(server, prompt, cancel)
    assert events.end == "execution_interrupted"
    assert events.steps() - at[0] <= LATE, (events.steps(), at)


def test_labels_cannot_bring_html_into_the_editor(inside: Any) -> None:
    """The editor shows such texts as HTML."""
    found = inside(
        """
import inside
from types import SimpleNamespace
import comfy_execution.utils as utils
import sys
sent = []
editor = SimpleNamespace(send_progress_text=lambda text, node_id: sent.append([text, node_id]))
sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=editor))
with utils.CurrentNodeContext("prompt", "7"):
    inside.part("nodes.runtime.comfy").show_text("<img src=x onerror=y>\\nSmileys & [[Emotion|javascript:z]]")
del sys.modules["server"]
with utils.CurrentNodeContext("prompt", "7"):
    inside.part("nodes.runtime.comfy").show_text("no editor")
inside.result["sent"] = sent
"""
    )
    assert found["sent"] == [["‹img src=x onerror=y>\nSmileys & [ [Emotion|javascript:z]]", "7"]]
