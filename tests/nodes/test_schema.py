"""Every node is described, and no saved workflow breaks by accident."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any, ClassVar

from .schema import SNAPSHOT, problems, text


def test_every_node_is_fully_described(pack: ModuleType) -> None:
    found = {node_id: problems(node_id, node) for node_id, node in pack.NODE_CLASS_MAPPINGS.items()}
    assert not {node_id: list_ for node_id, list_ in found.items() if list_}


def test_a_badly_described_node_is_noticed() -> None:
    class Bad:
        CATEGORY = "latent guidance/sampling"
        DISPLAY_NAME = "Bad"
        DESCRIPTION = ""
        RETURN_TYPES = ("MODEL",)
        OUTPUT_TOOLTIPS = ("The model.",)
        ZH: ClassVar[dict[str, Any]] = {
            "display_name": "坏",
            "description": "坏节点",
            "inputs": {},
            "outputs": (("模型", "A model."),),
        }

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"scale": ("FLOAT", {"default": 2.0, "min": -1, "max": 1, "step": 0.1})}}

    found = " ".join(problems("lgBad", Bad))
    for part in (
        "its id",
        "DESCRIPTION",
        "search aliases",
        "no tooltip",
        "out of its range",
        "neutral",
        "differ in ['scale']",
        "no Chinese in it",
    ):
        assert part in found


def test_schemas_are_those_of_the_snapshot(pack: ModuleType) -> None:
    """Workflows that people saved depend on these. After a change that is meant: ``python tests/nodes/schema.py``."""
    assert text(pack.NODE_CLASS_MAPPINGS) == SNAPSHOT.read_text("utf-8")


def test_every_node_has_its_display_name(pack: ModuleType) -> None:
    names = pack.NODE_DISPLAY_NAME_MAPPINGS
    assert names.keys() == pack.NODE_CLASS_MAPPINGS.keys()
    assert len(set(names.values())) == len(names)


def test_every_rule_has_a_node(pack: ModuleType) -> None:
    from latent_guidance.guidance import RULES

    assert {rule.node.id for rule in RULES} <= pack.NODE_CLASS_MAPPINGS.keys()


def test_numbers_are_written_in_full_and_usual_ranges_in_chinese(pack: ModuleType) -> None:
    usual = 0
    for node_id, node in pack.NODE_CLASS_MAPPINGS.items():
        for section in node.INPUT_TYPES().values():
            for name, (_, *options) in section.items():
                english, chinese = options[0]["tooltip"] if options else "", node.ZH["inputs"][name][1]
                assert not re.search(r"\de\+", english + chinese), (node_id, name)
                assert ("Usual: " in english) == ("常用：" in chinese), (node_id, name)
                words = re.findall(r"\b[a-z]+\b", chinese.partition("常用：")[2].partition("。")[0])
                assert set(words) <= {"raw", "relative", "correction", "score"}, (node_id, name, words)
                usual += "Usual: " in english
    assert usual > 40
