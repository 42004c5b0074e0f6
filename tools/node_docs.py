"""Writes what is generated from the nodes' own texts: help pages, the Chinese translation, and the list of nodes.

    python tools/node_docs.py            write
    python tools/node_docs.py --check    exit with status 1 if a committed file is not what would be written

Help pages go to web/docs/<node id>/{en,zh}.md, where the editor looks for them; translations to locales/zh/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: the library when it is not installed

WORDS = {
    "en": {
        "inputs": "Inputs", "outputs": "Outputs", "formula": "Formula and source", "source": "Reference: ",
        "required": "required", "optional": "optional", "default": "default {}", "menu": "Menu: {}. Node id: `{}`.",
    },
    "zh": {
        "inputs": "输入", "outputs": "输出", "formula": "公式与出处", "source": "出处：",
        "required": "必需", "optional": "可选", "default": "默认 {}", "menu": "菜单：{}。节点 id：`{}`。",
    },
}  # fmt: skip

CATEGORIES_ZH = {"evaluation": "评估", "losses": "损失"}
"""Submenus that the editor has no Chinese word for; it knows loaders, conditioning, guidance and sampling."""

LEADS_ZH = {
    "angle_domain": ("由于 e / sin(theta) 与 D_c 等长，",),
    "cfg_pp": ("取 lambda 的一步相当于普通 CFG 取如下 w 的一步：",),
    "log_prob": ("例如：",),
    "schedule": ("各种形状：",),
}
"""Module -> what leads to each of its formulas after the first, where the Chinese page has the formulas alone."""

SOURCES_ZH = {
    "classifier_post_step": "没有论文；可对照 arXiv 2105.05233 的算法 1，其梯度前有 Sigma",
    "curve": "没有论文；逐点给出的调度，常见于各种用户界面。最佳强度取决于噪声水平，这是 arXiv 2404.07724（第 3 节）与 2404.13040 的发现",
}
"""Module -> where its formula comes from, where that is no paper but words."""

STAGES = {
    "scale": ("set the guidance scale w", "设定引导强度 w"),
    "branches": ("change the estimates of prompt and negative", "改变正向与反向的估计"),
    "combine": ("make one estimate of them by w; one rule of a chain at most", "按 w 合成一个估计；一条链中至多一条规则"),
    "post": ("change the guided estimate", "改变引导后的估计"),
    "gradient": ("add a gradient to it; all of them see the same estimate", "为其加上梯度；各规则看到的是同一个估计"),
    "step": ("act inside the step of the DDPM sampler, to which they are connected", "连接到 DDPM 采样器，在其步内起作用"),
}  # fmt: skip
"""Stage of a rule -> what its rules do, in English and Chinese, in the order in which they act."""

NO_ABBREVIATION = "".join(rf"(?<!\b{word})" for word in ("al", "app", "eq", "fig", "sec"))


def cell(text: object) -> str:
    """Text fit for a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


def inputs_of(node: Any) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """(name, type, options, required) of every input."""
    for section, inputs in node.INPUT_TYPES().items():
        for name, spec in inputs.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            yield name, kind if isinstance(kind, str) else "COMBO", options, section == "required"


def formulas(docstring: str) -> Iterator[tuple[bool, str]]:
    """(is it a formula, text) of every paragraph of a rule's module docstring; formulas are those set off to the right."""
    for paragraph in docstring.strip().split("\n\n"):
        lines = paragraph.split("\n")
        if all(line.startswith("    ") for line in lines):
            yield True, "\n".join(re.sub(r"(?<=\S) {3,}(?! *=)", "   ", line[4:]) for line in lines)
        else:
            yield False, " ".join(line.strip() for line in lines).replace("**", r"\*\*")


def source_of(docstring: str) -> str:
    """The sentence of a rule's module docstring that names its papers; "app." and the like do not end it."""
    [text] = re.findall(
        rf"^Reference: (.+?)(?={NO_ABBREVIATION}\.\s+[A-Z]|\.?\n(?:Space:|\n)|\Z)", docstring, re.MULTILINE | re.DOTALL
    )
    return " ".join(text.split()).removesuffix(".")


def formula_section(docstring: str, language: str, module: str = "") -> list[str]:
    """The formulas of a rule or a sampler and where they come from; in English with all that its author says of them.

    Raises:
        ValueError: more than one set of formulas, and no Chinese words in LEADS_ZH for the next one of ``module``.
    """
    lines, leads = [f"## {WORDS[language]['formula']}", ""], iter(("", *LEADS_ZH.get(module, ())))
    for is_formula, text in formulas(docstring):
        if is_formula:
            lead = next(leads, None)
            if lead is None:
                raise ValueError(f"LEADS_ZH has no words for the last formula of {module or 'a module'}")
            lines += [lead, ""] if lead and language == "zh" else []
            lines += ["```text", text, "```", ""]
        elif language == "en":
            lines += [re.sub(r" (?=(Reference|Space): )", "\n\n", text), ""]
    if language != "en":
        lines += [f"{WORDS[language]['source']}{SOURCES_ZH.get(module) or source_of(docstring)}", ""]
    return lines


def default_of(node: Any, name: str, kind: str, options: dict[str, Any], required: bool, words: dict[str, Any]) -> str:
    if "default" in options:
        value = options["default"]
        return words["default"].format(f"`{value}`" if value != "" else '`""`')
    if kind == "COMBO":
        choices = node.INPUT_TYPES()["required"].get(name, ([],))[0]
        return words["default"].format("`emoji`") if choices and choices[0] == "emoji" else words["required"]
    return words["required"] if required else words["optional"]


def output_names(node: Any) -> tuple[str, ...]:
    return tuple(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))


def page(node_id: str, node: Any, language: str) -> str:
    """The help page of a node."""
    words, chinese = WORDS[language], node.ZH if language == "zh" else None
    title = chinese["display_name"] if chinese else node.DISPLAY_NAME
    lines = [f"# {title}", "", chinese["description"] if chinese else node.DESCRIPTION, ""]
    inputs = list(inputs_of(node))
    lines += [f"## {words['inputs']}", ""] if inputs else []
    for name, kind, options, required in inputs:
        label, tooltip = chinese["inputs"][name] if chinese else (name, options.get("tooltip", ""))
        shown = f"**{label}** (`{name}`)" if chinese and label != name else f"**{name}**"
        lines += [f"- {shown} {kind}, {default_of(node, name, kind, options, required, words)}  ", f"  {tooltip}"]
    lines += ["", f"## {words['outputs']}", ""] if node.RETURN_TYPES else [""]
    for i, (name, kind) in enumerate(zip(output_names(node), node.RETURN_TYPES, strict=True)):
        if chinese:
            label, tooltip = chinese["outputs"][i]
            lines += [f"- **{label}** {kind}  ", f"  {tooltip}"]
        else:
            lines += [f"- **{name}** {kind}  ", f"  {node.OUTPUT_TOOLTIPS[i]}"]
    lines += [""] if node.RETURN_TYPES else []
    rule = getattr(node, "RULE", None)
    source = getattr(node, "FORMULAS_OF", None) if rule is None else rule.__module__
    if source is not None:
        lines += formula_section(importlib.import_module(source).__doc__ or "", language, source.rpartition(".")[2])
    lines += [words["menu"].format(node.CATEGORY, node_id), ""]
    return "\n".join(lines)


def translations(nodes: dict[str, Any]) -> str:
    """locales/zh/nodeDefs.json."""
    found: dict[str, Any] = {}
    for node_id, node in nodes.items():
        inputs = {name: {"name": label, "tooltip": tip} for name, (label, tip) in node.ZH["inputs"].items()}
        outputs = {str(i): {"name": label, "tooltip": tip} for i, (label, tip) in enumerate(node.ZH["outputs"])}
        found[node_id] = {
            "display_name": node.ZH["display_name"],
            "description": node.ZH["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return json.dumps(found, ensure_ascii=False, indent=2) + "\n"


def order_of_rules(nodes: dict[str, Any]) -> list[str]:
    """The section of docs/NODES.md that says in which order rules act."""
    of_rules = [node for node in nodes.values() if hasattr(getattr(node, "RULE", None), "stage")]  # losses have none
    looking = [node for node in of_rules if node.RULE.stage.value == "scale" and node.RULE.looks_at_branches]
    names, names_zh = (" and ".join(n.DISPLAY_NAME for n in looking), "与".join(n.ZH["display_name"] for n in looking))
    rows = []
    for number, (stage, (words, words_zh)) in enumerate(STAGES.items(), start=1):
        acting = [node for node in of_rules if node.RULE.stage.value == stage]
        english = ", ".join(node.DISPLAY_NAME for node in acting)
        rows.append((str(number), words, words_zh, english, "、".join(node.ZH["display_name"] for node in acting)))
    return [
        "## The order in which rules act",
        "",
        "However the rules of a chain are connected, they act stage by stage, and within a stage in the order in which they are connected. "
        f"{names} compare the two estimates, so they look at them after stage 2.",
        "",
        f"无论链中的规则如何连接，都按下列阶段依次作用；同一阶段内按连接的顺序。{names_zh}要比较两个估计，因此在第 2 阶段之后查看。",
        "",
        *table(("", "what its rules do", "作用", "rules", "规则"), rows),
        "",
    ]


def listing(nodes: dict[str, Any]) -> str:
    """docs/NODES.md."""
    lines = ["# Nodes", "", "Made by `tools/node_docs.py` from the nodes' own texts.", "", *order_of_rules(nodes)]
    for category in dict.fromkeys(node.CATEGORY for node in nodes.values()):
        rows = [
            (
                f"[{node.DISPLAY_NAME}](../web/docs/{node_id}/en.md)",
                f"[{node.ZH['display_name']}](../web/docs/{node_id}/zh.md)",
                node.DESCRIPTION,
            )
            for node_id, node in nodes.items()
            if category == node.CATEGORY
        ]
        lines += [f"## {category}", "", *table(("node", "节点", "what it does"), rows), ""]
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """Path -> text of every generated file."""
    from latent_guidance.host.pack import load_pack

    nodes: dict[str, Any] = dict(load_pack(ROOT).NODE_CLASS_MAPPINGS)
    files = {
        ROOT / "web" / "docs" / node_id / f"{language}.md": page(node_id, node, language)
        for node_id, node in nodes.items()
        for language in WORDS
    }
    files[ROOT / "locales" / "zh" / "nodeDefs.json"] = translations(nodes)
    main = {"nodeCategories": CATEGORIES_ZH}
    files[ROOT / "locales" / "zh" / "main.json"] = json.dumps(main, ensure_ascii=False, indent=2) + "\n"
    files[ROOT / "docs" / "NODES.md"] = listing(nodes)
    return files


def stale() -> list[str]:
    """What a fresh run would change: paths, with why."""
    wanted = generated()
    problems = [
        f"{path.relative_to(ROOT)} is {'missing' if not path.exists() else 'stale'}"
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    kept = {path for path in (ROOT / "web" / "docs").rglob("*.md")} if (ROOT / "web" / "docs").is_dir() else set()
    return problems + [f"{path.relative_to(ROOT)} belongs to no node" for path in sorted(kept - wanted.keys())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is stale")
    if parser.parse_args().check:
        problems = stale()
        for problem in problems:
            print(problem)
        return 1 if problems else 0
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
