"""Sheets of labelled pictures as image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from .bench import Bench
from .parts import measured
from .pictures import INK, MUTED, PAPER, font_for, picture_grid

UNGUIDED_BLOCK, GROUPS_BLOCK, NAMES_BLOCK = 30, 40, 60
SIDE = 96
"""Pixels of a picture on a page."""


def save_sheet(
    path: Path,
    cells: Sequence[Tensor],
    labels: Sequence[str] = (),
    *,
    title: str,
    note: str = "",
    columns: int,
    side: int = 0,
) -> None:
    """Write a grid of pictures under a title, under a temporary name first.

    Args:
        path: Its ending says the format; JPEG has quality 85.
        cells: Each (B, 3, H, W) uint8; the pictures of a cell stand below one another.
        labels: One per cell, or none.
        title: A line above.
        note: A smaller line beside it.
        columns: Cells side by side.
        side: Pixels of a picture; 0 leaves it as it is.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    def shown(cell: Tensor) -> Tensor:
        x = cell.float() / 255
        if side:
            x = functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return x.clamp(0, 1).movedim(1, -1)

    grid = picture_grid([shown(cell) for cell in cells], labels, columns=columns)[0]
    sheet = Image.fromarray((grid.numpy() * 255).round().astype(np.uint8))
    head = 44
    whole = Image.new("RGB", (sheet.width, sheet.height + head), PAPER)
    whole.paste(sheet, (0, head))
    draw = ImageDraw.Draw(whole)
    draw.text((10, 12), title, font=font_for(title, 20), fill=INK)
    if note:
        draw.text((whole.width - 10, 16), note, font=font_for(note, 14), fill=MUTED, anchor="ra")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    if path.suffix == ".jpg":
        whole.save(partial, quality=85)
    else:
        whole.save(partial)
    os.replace(partial, path)


def measure_pages(bench: Bench) -> dict[str, Any]:
    """Pages of samples to look at: unguided, per group, and one per name, at several seeds."""
    plan = bench.plan
    texts = bench.data.texts

    def run() -> dict[str, Any]:
        files: list[str] = []

        def page(name: str, pictures: Tensor, title: str, note: str, labels: Sequence[str] = ()) -> None:
            file = f"pages/{name}.jpg"
            cells = list(pictures.split(1))
            save_sheet(bench.out / file, cells, labels, title=title, note=note, columns=10, side=SIDE)
            files.append(file)

        for number in range(plan.page_seeds):
            seeds = bench.seeds(plan.page, block=UNGUIDED_BLOCK + number)
            note = f"seeds from {seeds[0]}"
            page(f"unguided-{number}", bench.from_nothing(seeds), "Unguided, empty prompt", note)
            for k, label in enumerate(bench.labels):
                seeds = bench.seeds(plan.page, block=GROUPS_BLOCK + 1000 * k + number)
                pictures = bench.by_classifier(label, seeds)
                title = f"{label}, classifier guidance {plan.classifier_scale:g} ({plan.classifier_scaling})"
                page(f"group-{k}-{slug(label)}-{number}", pictures, title, f"seeds from {seeds[0]}")
            names = [texts[i] for i in bench.names(plan.page)]
            seeds = bench.seeds(len(names), block=NAMES_BLOCK + number)
            title = f"Names, CFG {plan.cfg_scale:g}"
            page(f"names-{number}", bench.by_prompt(names, seeds), title, f"seeds from {seeds[0]}", names)
        return {"files": files}

    settings = bench.settings(
        page=plan.page,
        seeds=plan.page_seeds,
        classifier_scale=plan.classifier_scale,
        classifier_scaling=plan.classifier_scaling,
        cfg_scale=plan.cfg_scale,
    )
    return measured(
        bench.out, "pages", settings, run, say=bench.say,
        whole=lambda result: all((bench.out / file).is_file() for file in result["files"]),
    )  # fmt: skip


def slug(label: str) -> str:
    """A label as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
