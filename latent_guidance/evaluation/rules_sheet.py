"""The pictures of the table over rules: one row per rule, the same prompts and seeds in the columns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .pictures import INK, MUTED, PAPER, _shortened, canvas, font_for
from .rule_rows import GROUP, PICTURE, PROMPT, ROWS, TEXT

SIDE, GAP, LABELS, MOST = 72, 4, 300, 12
"""Pixels of a picture and between two, of the column of labels; columns at most."""
TITLES = {
    PROMPT: "Told to the model:",
    TEXT: "Told to the rule alone:",
    GROUP: "Empty prompt, group:",
    PICTURE: "Empty prompt, reference picture of:",
}


def save_rules_sheet(path: Path, folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write the sheet.

    Args:
        path: JPEG, written under a temporary name first.
        folder: with the strip KEY.png of every row.
        results: of the rows, by key.
    """
    from PIL import Image

    sections = [
        (task, [row for row in ROWS if row.task == task and row.key in results])
        for task in (PROMPT, TEXT, GROUP, PICTURE)
    ]
    sections = [(task, rows) for task, rows in sections if rows]
    columns = min(MOST, max(len(results[rows[0].key]["asked"]) for _, rows in sections))
    head, step = 40, SIDE + GAP
    width = LABELS + columns * step + GAP
    height = sum(head + len(rows) * step for _, rows in sections) + GAP
    sheet, draw = canvas(width, height)
    top = GAP
    for task, rows in sections:
        asked = results[rows[0].key]["asked"][:MOST]
        draw.text((8, top + head // 2), TITLES[task], font=font_for("", 14), fill=INK, anchor="lm")
        for i, name in enumerate(asked):
            for k, line in enumerate(_two_lines(name)):
                place = (LABELS + i * step + SIDE / 2, top + 6 + 15 * k)
                draw.text(place, _shortened(line, 11, step), font=font_for(line, 11), fill=INK, anchor="ma")
        top += head
        for row in rows:
            result = results[row.key]
            size = len(result["asked"])
            with Image.open(folder / f"{row.key}.png") as strip:
                side = strip.width // size
                for i in range(min(size, columns)):
                    one = strip.crop((i * side, 0, (i + 1) * side, side)).convert("RGB")
                    sheet.paste(one.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (LABELS + i * step, top))
            words = _shortened(row.name, 14, LABELS - 16)
            draw.text((8, top + SIDE / 2 - 9), words, font=font_for(words, 14), fill=INK, anchor="lm")
            note = _shortened(result["setting"], 11, LABELS - 16)
            draw.text((8, top + SIDE / 2 + 10), note, font=font_for(note, 11), fill=MUTED, anchor="lm")
            top += step
    whole = Image.new("RGB", sheet.size, PAPER)
    whole.paste(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    whole.save(partial, format="JPEG", quality=85)
    os.replace(partial, path)


def _two_lines(name: str) -> list[str]:
    """A name in at most two lines, broken at the space nearest to its middle if it is long."""
    spaces = [i for i, character in enumerate(name) if character == " "]
    if len(name) <= 11 or not spaces:
        return [name]
    at = min(spaces, key=lambda i: abs(2 * i - len(name)))
    return [name[:at], name[at + 1 :]]
