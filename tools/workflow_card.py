"""The thumbnail of a workflow that runs on the user's own checkpoint: its graph, drawn, and what it needs. Not a picture it made."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE, BAND, MARGIN, FINE = 512, 110, 24, 3
GROUND, NODE, LINK, BRIGHT, DIM = "#1b2030", "#3a4258", "#f4b942", "#ffffff", "#b4bccf"


def _slot(node: dict[str, Any], inputs: bool, slot: int) -> tuple[float, float]:
    """Where a link meets a node."""
    x, y = node["pos"]
    return (x if inputs else x + node["size"][0]), y + 14 + 20 * slot


def _curve(a: tuple[float, float], b: tuple[float, float], points: int = 24) -> list[tuple[float, float]]:
    """A link from an output at a to an input at b, as the editor draws it."""
    reach = max(40.0, abs(b[0] - a[0]) / 2)
    places = [i / points for i in range(points + 1)]
    return [
        (
            (1 - t) ** 3 * a[0]
            + 3 * (1 - t) ** 2 * t * (a[0] + reach)
            + 3 * (1 - t) * t**2 * (b[0] - reach)
            + t**3 * b[0],
            (1 - t) ** 3 * a[1] + 3 * (1 - t) ** 2 * t * a[1] + 3 * (1 - t) * t**2 * b[1] + t**3 * b[1],
        )
        for t in places
    ]


def card(workflow: dict[str, Any], kind: str) -> Image.Image:
    """A square picture of a workflow in the editor's format; ``kind`` of checkpoint is named below it."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    boxes = [group["bounding"] for group in workflow["groups"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    room = (SIDE - 2 * MARGIN, SIDE - BAND - 2 * MARGIN)
    scale = FINE * min(room[0] / (right - left), room[1] / (bottom - top))
    shift = (
        FINE * SIDE / 2 - scale * (left + right) / 2,
        FINE * (SIDE - BAND) / 2 - scale * (top + bottom) / 2,
    )

    def at(x: float, y: float) -> tuple[float, float]:
        return x * scale + shift[0], y * scale + shift[1]

    picture = Image.new("RGB", (FINE * SIDE, FINE * SIDE), GROUND)
    draw = ImageDraw.Draw(picture)
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        draw.rounded_rectangle([at(x, y), at(x + width, y + height)], FINE * 3, outline=group["color"], width=FINE)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        ours = node["type"].startswith("LG")
        draw.rounded_rectangle([at(x, y - 30), at(x + width, y + height)], FINE * 2, fill="#2f6f68" if ours else NODE)
    for _, origin, out, target, into, _ in workflow["links"]:
        ends = _slot(nodes[origin], False, out), _slot(nodes[target], True, into)
        draw.line([at(*point) for point in _curve(*ends)], fill=LINK, width=FINE)
    draw.rectangle([(0, FINE * (SIDE - BAND)), (FINE * SIDE, FINE * SIDE)], fill="#11141f")
    large, small = (ImageFont.load_default(size=FINE * size) for size in (30, 19))
    draw.text((FINE * SIDE / 2, FINE * (SIDE - 74)), f"for your {kind} checkpoint", BRIGHT, large, anchor="mm")
    draw.text((FINE * SIDE / 2, FINE * (SIDE - 34)), "the graph, not a picture it made", DIM, small, anchor="mm")
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
