"""The generated files are fresh, and every node has all its words in both languages."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def node_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("node_docs", ROOT / "tools" / "node_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["node_docs"] = module
    spec.loader.exec_module(module)
    return module


def test_help_pages_translations_and_the_list_of_nodes_are_fresh(node_docs: ModuleType) -> None:
    assert not node_docs.stale(), "run: python tools/node_docs.py"


def test_a_changed_text_makes_its_page_stale(node_docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_guidance.host.pack import load_pack

    node: Any = load_pack(ROOT).NODE_CLASS_MAPPINGS["LGCFG"]
    monkeypatch.setattr(node, "DESCRIPTION", "Something else.")
    assert "web/docs/LGCFG/en.md is stale" in node_docs.stale()


def test_the_list_of_nodes_says_in_which_order_every_rule_acts(node_docs: ModuleType) -> None:
    from latent_guidance.guidance import RULES, Stage

    assert list(node_docs.STAGES) == [stage.value for stage in Stage]
    page = (ROOT / "docs" / "NODES.md").read_text(encoding="utf-8")
    section = page.split("## The order in which rules act\n")[1].split("\n## ")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if re.match(r"\| \d", line)]
    for row, stage in zip(rows, Stage, strict=True):
        acting = [rule.node for rule in RULES if rule.stage is stage]
        assert row[3] == ", ".join(node.name for node in acting)
        assert row[4] == "、".join(node.name_zh for node in acting)


def test_the_formulas_of_a_docstring(node_docs: ModuleType) -> None:
    docstring = """A rule.

    D      = a + b ** 2            (first)
    theta' = a

Reference: arXiv 1234.5678, eq. 3 and
sec. 4. It has 2**k levels.
Space: D.

More words."""
    english = "\n".join(node_docs.formula_section(docstring, "en"))
    assert "```text\nD      = a + b ** 2   (first)\ntheta' = a\n```" in english and r"2\*\*k levels" in english
    assert "\n\nSpace: D." in english and "More words." in english
    chinese = "\n".join(node_docs.formula_section(docstring, "zh"))
    assert "D      = a + b" in chinese and "出处：arXiv 1234.5678, eq. 3 and sec. 4\n" in chinese
    assert "words" not in chinese and "levels" not in chinese


def test_an_abbreviation_does_not_end_the_source(node_docs: ModuleType) -> None:
    assert node_docs.source_of("Reference: arXiv 1234.5678, app. D.\nSpace: D.\n") == "arXiv 1234.5678, app. D"
    assert node_docs.source_of("A.\n\nReference: Doe et al. Title, eq. 3. More.\n") == "Doe et al. Title, eq. 3"
    assert node_docs.source_of("Reference: none; compare others.\n") == "none; compare others"


def test_a_second_formula_has_words_in_chinese(node_docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = "A rule.\n\n    a = b\n\nand so\n\n    b = a\n\nReference: arXiv 1234.5678.\n"
    with pytest.raises(ValueError, match="no words for the last formula of twice"):
        node_docs.formula_section(docstring, "zh", "twice")
    monkeypatch.setitem(node_docs.LEADS_ZH, "twice", ("所以",))
    assert "所以\n\n```text\nb = a" in "\n".join(node_docs.formula_section(docstring, "zh", "twice"))
    assert "所以" not in "\n".join(node_docs.formula_section(docstring, "en", "twice"))


def test_every_input_has_a_tooltip_in_both_languages() -> None:
    from latent_guidance.host.pack import load_pack

    translated = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, node in load_pack(ROOT).NODE_CLASS_MAPPINGS.items():
        inputs = {name: spec for section in node.INPUT_TYPES().values() for name, spec in section.items()}
        assert translated[node_id]["inputs"].keys() == inputs.keys(), node_id
        for name, (_, options) in inputs.items():
            assert options["tooltip"] and translated[node_id]["inputs"][name]["tooltip"], (node_id, name)
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) == len(translated[node_id]["outputs"]), node_id
        assert all(output["name"] and output["tooltip"] for output in translated[node_id]["outputs"].values()), node_id
        assert node.DESCRIPTION and node.SEARCH_ALIASES, node_id
