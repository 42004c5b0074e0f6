"""Parts of a measurement: one JSON file each, written whole or not at all, and not measured twice with the same settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.files import write_json

Say = Callable[[str], None]


def fingerprint(*paths: Path) -> str:
    """Twelve hexadecimal digits of SHA-256 over the safetensors and JSON files at and below ``paths``.

    Raises:
        UserError: A path does not exist.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} was not found", expected="a file or folder to measure", mend="check the path")
        files = (
            [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json"))
        )
        for file in files:
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def read_part(out: Path, name: str) -> dict[str, Any]:
    """A part that was measured before.

    Raises:
        UserError: It was not, or its file is damaged.
    """
    path = out / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"{path} was not found",
            expected="a measured part",
            mend=f"run `python -m latent_guidance.evaluation {name} {out}` first",
        )
    if found := _read(path):
        return found
    raise UserError(f"{path} is not readable", expected="a measured part, JSON", mend="delete it and measure again")


def _read(path: Path) -> dict[str, Any]:
    """The part that a file holds; nothing if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("settings", "result"))
    return found if whole else {}


def measured(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    measure: Callable[[], dict[str, Any]],
    *,
    say: Say,
    whole: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any]:
    """The part ``name``: read where it was measured with these settings, else measured and written.

    Args:
        out: Folder of the parts.
        name: The file is ``out``/``name``.json.
        settings: Everything that the result depends on, JSON values.
        measure: Gives the result, JSON values.
        say: Told what happens.
        whole: Whether the other files that belong to a result are there; otherwise the part is measured again.
    """
    plain = json.loads(json.dumps(dict(settings)))
    path = out / f"{name}.json"
    if path.is_file():
        found = _read(path)
        if found.get("settings") == plain and whole(found["result"]):
            say(f"{name}: already measured, {path} is kept")
            return found["result"]
    start = time.perf_counter()
    result = measure()
    seconds = round(time.perf_counter() - start, 1)
    write_json(path, {"settings": plain, "seconds": seconds, "result": result})
    say(f"{name}: {seconds:.0f} s, written to {path}")
    return result
