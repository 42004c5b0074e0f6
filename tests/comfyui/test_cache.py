"""Runs in a row on a server: only what a change reaches runs again, and what is gone is said before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .comfy import Refused, Server, psnr
from .test_workflows import LIMIT, workflow


def run(server: Server, prompt: dict[str, Any]) -> tuple[set[str], np.ndarray[Any, Any]]:
    """The nodes that ran, and the picture."""
    prompt_id = server.queue(prompt)
    entry = server.wait(prompt_id)
    assert entry["status"]["status_str"] == "success", entry["status"]
    cached = {
        node for kind, said in entry["status"]["messages"] if kind == "execution_cached" for node in said["nodes"]
    }
    [images] = [
        output["images"] for node, output in entry["outputs"].items() if prompt[node]["class_type"] == "SaveImage"
    ]
    return set(prompt) - cached, server.picture(images[0])


def reached(prompt: dict[str, Any], node: str) -> set[str]:
    """``node`` and every node that it reaches through the links."""
    found = {node}
    while True:
        more = {
            name
            for name, other in prompt.items()
            if any(isinstance(value, list) and value[0] in found for value in other["inputs"].values())
        }
        if more <= found:
            return found
        found |= more


def test_only_what_a_change_reaches_runs_again(server: Server) -> None:
    def prompt(**changes: object) -> dict[str, Any]:
        made = workflow("classifier_guidance", checkpoint="tiny", seed=271828)
        for node in made.values():
            node["inputs"] |= {name: value for name, value in changes.items() if name in node["inputs"]}
        return made

    def holder(name: str) -> str:
        [node] = [key for key, node in prompt().items() if name in node["inputs"]]
        return node

    _, first = run(server, prompt())
    ran, again = run(server, prompt())
    assert ran == set() and psnr(first, again) == float("inf")
    for name, value in {"seed": 314159, "label": "not Flags", "guidance_scale": 1.0}.items():
        run(server, prompt())  # a server remembers its last prompt's nodes only
        ran, other = run(server, prompt(**{name: value}))
        assert ran == reached(prompt(), holder(name)), name
        assert psnr(first, other) < LIMIT, name
        assert not {prompt()[node]["class_type"] for node in ran} & {"LGLoadCheckpoint", "LGLoadClassifier"}
    ran, back = run(server, prompt())
    assert psnr(first, back) == float("inf")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("LGClassifierGuidance", {"class_type": "LGRuleThatIsGone"}, ["LGRuleThatIsGone"]),
        ("LGLoadClassifier", {"inputs": {"classifier": "gone"}}, ["classifier", "gone", "tiny"]),
        ("LGLoadCheckpoint", {"inputs": {"checkpoint": "gone"}}, ["checkpoint", "gone", "tiny"]),
    ],
)
def test_a_saved_workflow_with_something_gone_says_what(
    server: Server, kind: str, change: dict[str, Any], words: list[str]
) -> None:
    prompt = workflow("classifier_guidance", checkpoint="tiny")
    [node] = [node for node in prompt.values() if node["class_type"] == kind]
    node.update(change)
    with pytest.raises(Refused) as error:
        server.run(prompt)
    assert all(word in str(error.value) for word in words), str(error.value)
