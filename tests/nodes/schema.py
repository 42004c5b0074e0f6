"""The nodes' schemas as plain data, and what a good one must have. Run it to rewrite the snapshot: ``python tests/nodes/schema.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("schema.json")
ROOT = Path(__file__).resolve().parents[2]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}
SOCKETS = {
    "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK", "GUIDER", "SAMPLER", "SIGMAS", "NOISE", "STRING",
    "LG_GUIDANCE", "LG_CLASSIFIER", "LG_NOISY_CLIP", "LG_LOSS", "LG_PICTURE_CLIP", "CLIP_VISION",
}  # fmt: skip


def inputs_of(node: Any) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Input name -> (type, options, required)."""
    declared = node.INPUT_TYPES()
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {}, group == "required")
        for group in ("required", "optional")
        for name, spec in declared.get(group, {}).items()
    }


def described(node: Any) -> dict[str, Any]:
    """Everything about a node that a saved workflow depends on; texts are left out, they may change."""
    inputs = {}
    for name, (kind, options, required) in inputs_of(node).items():
        files = isinstance(kind, list) and "default" not in options
        kept = {key: options[key] for key in ("default", "min", "max", "step", "multiline") if key in options}
        inputs[name] = {
            "type": "<files>" if files else kind,
            "required": required,
            **kept,
            **({"control_after_generate": True} if options.get("control_after_generate") else {}),
        }
    return {
        "inputs": inputs,
        "outputs": list(node.RETURN_TYPES),
        "output_names": list(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)),
        "category": node.CATEGORY,
    }


def snapshot(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of all nodes by id."""
    return {node_id: described(node) for node_id, node in sorted(nodes.items())}


def problems(node_id: str, node: Any) -> list[str]:
    """What a node lacks, in words; empty for a good one."""
    found = []
    if not node_id.startswith("LG") or not node_id[2:3].isupper():
        found.append("its id does not begin with LG and a capital letter")
    if not node.CATEGORY.startswith("latent guidance/"):
        found.append(f"its category is {node.CATEGORY}")
    for text in ("DISPLAY_NAME", "DESCRIPTION"):
        if not getattr(node, text, ""):
            found.append(f"it has no {text}")
    if not getattr(node, "SEARCH_ALIASES", []):
        found.append("it has no search aliases")
    if len(getattr(node, "OUTPUT_TOOLTIPS", ())) != len(node.RETURN_TYPES) or not all(node.OUTPUT_TOOLTIPS):
        found.append("its outputs are not all described")
    if not set(node.RETURN_TYPES) <= SOCKETS:
        found.append(f"it has outputs of the types {node.RETURN_TYPES}")
    found += _input_problems(node) + _chinese_problems(node)
    return found


def _input_problems(node: Any) -> list[str]:
    found = []
    for name, (kind, options, _) in inputs_of(node).items():
        tooltip = options.get("tooltip", "")
        if len(tooltip) < 15:
            found.append(f"{name} has no tooltip")
        if kind in ("INT", "FLOAT"):
            if not all(key in options for key in ("default", "min", "max", "step")):
                found.append(f"{name} lacks default, min, max or step")
            elif not options["min"] <= options["default"] <= options["max"]:
                found.append(f"the default of {name} is out of its range")
            elif options["min"] == -1:
                found.append(f"{name} begins at -1: is that infinity?")
            if "ange: " not in tooltip:
                found.append(f"the tooltip of {name} does not say its range")
            if kind == "FLOAT" and "eutral: " not in tooltip:
                found.append(f"the tooltip of {name} does not say its neutral value")
        if isinstance(kind, list) and "default" in options and options["default"] not in kind:
            found.append(f"the default of {name} is not one of its choices")
        if not isinstance(kind, list) and kind not in WIDGETS | SOCKETS:
            found.append(f"{name} has the type {kind}")
    return found


def _chinese_problems(node: Any) -> list[str]:
    texts, found = getattr(node, "ZH", {}), []
    if not texts.get("display_name") or not texts.get("description"):
        found.append("it has no Chinese name and description")
    lacking = sorted(inputs_of(node).keys() ^ texts.get("inputs", {}).keys())
    if lacking:
        found.append(f"Chinese and English inputs differ in {lacking}")
    if len(texts.get("outputs", ())) != len(node.RETURN_TYPES):
        found.append("its outputs have no Chinese names and tooltips")
    everything = [
        texts.get("display_name", ""),
        texts.get("description", ""),
        *(tip for _, tip in (*texts.get("inputs", {}).values(), *texts.get("outputs", ()))),
    ]
    if not all(any("\u4e00" <= character <= "\u9fff" for character in text) for text in everything):
        found.append("a Chinese text has no Chinese in it")
    return found


def text(nodes: Mapping[str, Any]) -> str:
    """The snapshot as it stands in its file."""
    return json.dumps(snapshot(nodes), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # at the end: the library when it is not installed
    from latent_guidance.host.pack import load_pack

    SNAPSHOT.write_text(text(load_pack(ROOT).NODE_CLASS_MAPPINGS), encoding="utf-8")
    sys.stdout.write(f"{SNAPSHOT}\n")
