"""The settings that the table over rules recommends, for tooltips.

``recommended.json`` beside this file is written by ``python -m latent_guidance.evaluation rules-report --recommended``, from what was
measured on the bundled model (docs/RULES_TABLE.md): {node id: {knob: value}}. A rule that is not in it has no recommendation to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("recommended.json")


@cache
def _all() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def recommended(node_id: str) -> Mapping[str, Any]:
    """Knob -> recommended value of the rule with this node id; empty where none was measured."""
    return _all().get(node_id, {})
