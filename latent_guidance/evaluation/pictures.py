"""Drawing with Pillow: bar charts of class probabilities, and grids of pictures with captions.

Pictures are (B, H, W, 3) fp32 in [0, 1], as a node graph has them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED, TRACK = "#ffffff", "#1f2328", "#6b7280", "#eef0f3"
ACCENT, BAR = "#2563eb", "#a9c1f5"

SHOWN = 20
"""Bars of a chart at most: of more labels, the most probable are shown."""

MAX_PIXELS = 2**27
"""Of a grid."""

LONGEST = 500
"""Characters of a caption or a label that are looked at; measuring text takes time, and texts come from strangers' files."""

_SUPERSAMPLING = 2
_PUNCTUATION = "–—‘’“”…"
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "DejaVuSans.ttf",
)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or for text beyond Latin one that the system has, ``size`` pixels high."""
    from PIL import ImageFont

    if any(ord(character) > 0x24F and character not in _PUNCTUATION for character in text):
        for name in _WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return math.ceil(font_for(text, size).getlength(text))


def _shortened(text: str, size: int, room: int) -> str:
    """``text`` cut off with an ellipsis so that it is at most ``room`` pixels wide."""
    if len(text) <= LONGEST and _width(text, size) <= room:
        return text
    return (
        text[: bisect_right(range(1, min(len(text), LONGEST)), room, key=lambda n: _width(text[:n] + "…", size))] + "…"
    )


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (H, W, 3) fp32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet, and what draws on it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def bar_chart(labels: Sequence[str], values: Sequence[float], *, title: str = "", width: int = 512) -> Tensor:
    """A chart with one horizontal bar per label, the largest one marked.

    Args:
        labels: one per value; of more than 20, the 20 largest are shown, in falling order.
        values: probabilities in [0, 1].
        title: a line above the bars.
        width: of the chart, in pixels.

    Returns:
        (H, width, 3) in [0, 1]; H follows from the number of bars.

    Raises:
        UserError: not one value in [0, 1] per label.
    """
    from PIL import Image

    if len(labels) != len(values) or not labels or not all(0 <= value <= 1 for value in values):
        raise UserError(
            f"{len(values)} values for {len(labels)} bars"
            + ("" if all(0 <= value <= 1 for value in values) else ", some outside 0 to 1"),
            expected="one number from 0 to 1 for each of at least one label",
            mend="give the probabilities of the labels",
        )
    rows = list(zip(labels, values, strict=True))
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: -row[1])[:SHOWN]
    others = len(labels) - len(rows)

    scale = _SUPERSAMPLING
    size, row, margin, head = 14 * scale, 26 * scale, 16 * scale, (40 if title else 16) * scale
    total = width * scale
    text_room = min(max(_width(label, size) for label, _ in rows), int(total * 0.4))
    left = margin + text_room + 10 * scale
    right = total - margin - _width("100.0 %", size) - 8 * scale
    height = head + row * len(rows) + (row if others else 0) + margin
    image, draw = canvas(total, height)
    if title:
        heading = _shortened(title, 16 * scale, total - 2 * margin)
        draw.text((margin, 12 * scale), heading, font=font_for(heading, 16 * scale), fill=INK)
    best = max(range(len(rows)), key=lambda i: rows[i][1])
    for i, (label, value) in enumerate(rows):
        top, middle = head + i * row, head + i * row + row // 2
        name, marked = _shortened(label, size, text_room), i == best
        ink = INK if marked else MUTED
        draw.text((left - 10 * scale, middle), name, font=font_for(name, size), fill=ink, anchor="rm")
        box = (left, top + 5 * scale, right, top + row - 5 * scale)
        draw.rounded_rectangle(box, radius=4 * scale, fill=TRACK)
        if value > 0:
            length = max(value * (right - left), 2 * scale)
            bar = (*box[:2], left + length, box[3])
            draw.rounded_rectangle(bar, radius=min(4 * scale, length / 2), fill=ACCENT if marked else BAR)
        draw.text(
            (right + 8 * scale, middle),
            f"{value:.1%}".replace("%", " %"),
            font=font_for("", size),
            fill=ink,
            anchor="lm",
        )
    if others:
        note = f"and {others} others, together {max(0.0, sum(values) - sum(v for _, v in rows)):.1%}".replace("%", " %")
        draw.text((left, height - margin), note, font=font_for(note, size), fill=MUTED, anchor="ls")
    return to_tensor(image.resize((width, height // scale), Image.Resampling.LANCZOS))


def picture_grid(cells: Sequence[Tensor], labels: Sequence[str] = (), *, columns: int = 0, gap: int = 8) -> Tensor:
    """Pictures in a grid, each cell a stack of pictures under its caption.

    Args:
        cells: each (B, H, W, 3 or more) in [0, 1]; the pictures of one cell stand below one another.
        labels: captions of the cells, in order; cells beyond the last have none.
        columns: cells side by side; 0 lets the grid be about as wide as high.
        gap: pixels between pictures.

    Returns:
        (1, H, W, 3) in [0, 1].

    Raises:
        UserError: no pictures, more captions than cells, or a grid too large.
    """
    if not cells or not all(len(cell) for cell in cells):
        raise UserError("no pictures for a grid", expected="at least one", mend="connect the pictures to show")
    if len(labels) > len(cells):
        raise UserError(
            f"{len(labels)} labels for {len(cells)} cells: {', '.join(labels)}",
            expected="at most one line for each",
            mend="take out lines, or connect more pictures",
        )
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (1, 2))
    stack = max(len(cell) for cell in cells)
    columns = min(columns or _columns(len(cells), width, height * stack), len(cells))
    size = max(12, min(28, width // 8))
    lines = [_wrapped(label, size, width) for label in labels]
    caption = (size + 4) * max((len(line) for line in lines), default=0) + (6 if lines else 0)
    cell_width, cell_height = width + gap, caption + stack * (height + gap)
    rows = -(-len(cells) // columns)
    across, down = gap + columns * cell_width, gap + rows * cell_height
    if across * down > MAX_PIXELS:
        raise UserError(
            f"a grid of {across}x{down} pixels, for {sum(map(len, cells))} pictures of up to {width}x{height}",
            expected=f"at most {MAX_PIXELS:,} pixels",
            mend="show fewer pictures, or make the large ones smaller",
        )
    sheet, draw = canvas(across, down)
    for i, cell in enumerate(cells):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        for j, text in enumerate(lines[i] if i < len(lines) else ()):
            place = (x + width / 2, y + j * (size + 4))
            draw.text(place, text, font=font_for(text, size), fill=INK, anchor="ma")
        for k, picture in enumerate(cell):
            drawn = _to_image(picture)
            corner = (x + (width - drawn.width) // 2, y + caption + k * (height + gap) + (height - drawn.height) // 2)
            sheet.paste(drawn, corner)
    return to_tensor(sheet)[None]


def _to_image(picture: Tensor) -> Any:
    from PIL import Image

    values = (picture[..., :3].detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(values.expand(-1, -1, 3).numpy())


def _columns(count: int, width: int, height: int) -> int:
    """Cells side by side so that ``count`` cells of this size make a sheet about as wide as high."""
    return max(1, round(math.sqrt(count * height / width)))


def _wrapped(text: str, size: int, room: int) -> list[str]:
    """``text`` in at most two lines of ``room`` pixels, cut off where it does not fit."""
    words, lines = text[:LONGEST].split(), [""]
    while words and len(lines) <= 2:
        longer = f"{lines[-1]} {words[0]}".strip()
        if _width(longer, size) <= room or not lines[-1]:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) == 2:
            lines[-1] = f"{lines[-1]} {' '.join(words)}"
            break
        else:
            lines.append("")
    return [_shortened(line, size, room) for line in lines]
