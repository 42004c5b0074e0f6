"""A guidance report as a picture: curves over the noise level, which falls from left to right.

Drawn with Pillow, which every host of the nodes has; labels are English whatever the language, as fonts allow.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..guidance.report import Chain, Report
from .pictures import INK, MUTED, TRACK, canvas, font_for, to_tensor

COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
_SCALE = 2  # drawn larger and shrunk, for smooth lines
_WIDTH, _LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = 1040, 84, 280, 62, 26, 52
_HIGH, _LOW = 250, 140  # panels of sizes, and others
_FONT, _SMALL = 14, 12
SMALLEST = 1e-5
"""Contributions below this part of the largest one are rounding, and drawn as nothing."""

DIFFERENCE = "prompt - negative"

Curve = tuple[str, np.ndarray, np.ndarray]
"""Name, noise levels (N,), values (N, B) with NaN where there is none."""


def _curve(name: str, rows: Iterable[tuple[dict[str, Any], Sequence[float | None] | None]]) -> Curve | None:
    """The rows that have values, as a curve; None if no row has a number. On a flow's or any other grid a sigma of 0 has no place."""
    found = [(row, values) for row, values in rows if values is not None and all(s and s > 0 for s in row["sigma"])]
    if not found:
        return None
    values = np.array([[math.nan if v is None else v for v in values] for _, values in found])
    sigmas = np.array([row["sigma"][0] for row, _ in found])
    return (name, sigmas, values) if np.isfinite(values).any() else None


def _named(chain: Chain, several: bool) -> str:
    return f" ({'in' if chain.on == 'sampler' else 'on'} the {chain.on})" if several else ""


def _panels(report: Report) -> list[tuple[str, list[Curve]]]:
    """Title and curves of every panel that has any."""
    scale: list[Curve | None] = []
    sizes: list[Curve | None] = []
    notes: dict[str, list[Curve | None]] = {}
    several = len(report.chains) > 1
    for chain in report.chains:
        rows, where = chain.rows, _named(chain, several)
        scale.append(_curve(f"w{where}", ((row, row["guidance_scale"]) for row in rows)))
        sizes.append(_curve(f"{DIFFERENCE}{where}", ((row, row["delta"]) for row in rows)))
        for rule in dict.fromkeys(name for row in rows for name in row["contributions"]):
            sizes.append(_curve(f"{rule}{where}", ((row, row["contributions"].get(rule)) for row in rows)))
        noted = dict.fromkeys((rule, name) for row in rows for rule, found in row["notes"].items() for name in found)
        for rule, name in noted:
            values = ((row, row["notes"].get(rule, {}).get(name)) for row in rows)
            notes.setdefault(name, []).append(_curve(f"{rule}{where}", values))
    panels = [("guidance scale", scale), ("size in D (root mean square)", sizes), *notes.items()]
    kept = [(title, [curve for curve in curves if curve is not None]) for title, curves in panels]
    return [(title, curves) for title, curves in kept if curves]


def draw_report(report: Report, path: Path) -> None:
    """Write :func:`report_image`'s picture to ``path``, by its ending PNG or another, under a temporary name first.

    Raises:
        UserError: a report without rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    _drawn(report).save(partial)
    os.replace(partial, path)


def report_image(report: Report) -> Tensor:
    """The report as a picture (1, H, W, 3) in [0, 1]: the scale in force, the sizes of Δ and of what each rule changed, and what
    rules noted, each in a panel; lines are the batch's mean, bands its extremes.

    Raises:
        UserError: a report without rows.
    """
    return to_tensor(_drawn(report))[None]


def colors_of(panels: Sequence[tuple[str, list[Curve]]]) -> dict[str, str]:
    """Name of a curve -> colour; a rule's is the same in every panel."""
    names = dict.fromkeys(name for _, curves in panels[1:] for name, _, _ in curves if not name.startswith(DIFFERENCE))
    chosen = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    others = {name: MUTED if name.startswith(DIFFERENCE) else INK for _, curves in panels for name, _, _ in curves}
    return others | chosen


@dataclass(frozen=True)
class Panel:
    """Where one panel lies in the picture, and what its axes span."""

    top: float
    bottom: float
    sigmas: tuple[float, float]
    values: tuple[float, float]

    def across(self, sigma: float) -> float:
        """The place of a noise level, in pixels before shrinking."""
        high, low = (math.log(end) for end in self.sigmas)
        share = (high - math.log(sigma)) / (high - low)
        return _SCALE * (_LEFT + share * (_WIDTH - _LEFT - _RIGHT))

    def down(self, value: float) -> float:
        """The place of a value, in pixels before shrinking."""
        low, high = self.values
        return _SCALE * (self.bottom - (value - low) / (high - low) * (self.bottom - self.top))


def _drawn(report: Report) -> Any:
    from PIL import Image

    panels = _panels(report)
    if not panels:
        raise UserError("a report without a call of the guider", expected="one of a run", mend="sample first")
    levels = [float(sigma) for _, curves in panels for _, sigmas, _ in curves for sigma in sigmas]
    ends = (max(levels) * 1.05, min(levels) / 1.05)
    heights = [_HIGH if title.startswith("size") else _LOW for title, _ in panels]
    height = _TOP + sum(heights) + _GAP * (len(panels) - 1) + _BOTTOM
    image, draw = canvas(_WIDTH * _SCALE, height * _SCALE)
    _write(draw, _heading(report), (_LEFT, 14), "la", INK)
    colors, top = colors_of(panels), _TOP
    for (title, curves), high in zip(panels, heights, strict=True):
        panel = Panel(top, top + high, ends, _span(title, curves))
        last = title == panels[-1][0]
        _draw_axes(draw, panel, title, with_levels=last)
        _draw_curves(draw, panel, curves, colors)
        _draw_legend(draw, panel, curves, colors)
        top += high + _GAP
    return image.resize((_WIDTH, height), Image.Resampling.LANCZOS)


def _heading(report: Report) -> str:
    guiding = [chain for chain in report.chains if chain.on != "sampler"] or report.chains
    calls = max(len(chain.rows) for chain in guiding)
    passes = [chain.passes for chain in report.chains if chain.passes is not None]
    return f"{calls} calls of the guider" + (f", {sum(passes)} network passes a picture" if passes else "")


def _span(title: str, curves: Sequence[Curve]) -> tuple[float, float]:
    """The values at the bottom and the top of a panel."""
    if title == "probability":
        return -0.03, 1.03
    low = min(float(np.nanmin(values)) for _, _, values in curves)
    high = max(float(np.nanmax(values)) for _, _, values in curves)
    low = low if title == "score" else min(0.0, low)
    room = 0.05 * (high - low) or 1.0
    return (low - room if low < 0 or title == "score" else low), high + room


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most``."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * each for each in (1, 2, 5, 10, 20) if (high - low) / (unit * each) <= most - 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def level_ticks(high: float, low: float) -> list[float]:
    """Noise levels to write at the axis: 1, 2, 5 of every power of ten, or the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    among = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [each * 10.0**power for power in powers for each in among if low <= each * 10.0**power <= high]


def _write(draw: Any, text: str, place: tuple[float, float], anchor: str, fill: str, size: int = _FONT) -> None:
    """Text at a place in pixels of the finished picture."""
    x, y = (_SCALE * each for each in place)
    draw.text((x, y), text, font=font_for("", size * _SCALE), fill=fill, anchor=anchor)


def _draw_axes(draw: Any, panel: Panel, title: str, *, with_levels: bool) -> None:
    left, right = _SCALE * _LEFT, _SCALE * (_WIDTH - _RIGHT)
    for value in ticks(*panel.values, most=6 if panel.bottom - panel.top > _LOW else 4):
        y = panel.down(value)
        draw.line([(left, y), (right, y)], fill=TRACK, width=_SCALE)
        _write(draw, f"{value:g}", (_LEFT - 8, y / _SCALE), "rm", MUTED, _SMALL)
    for sigma in level_ticks(*panel.sigmas):
        x = panel.across(sigma)
        draw.line([(x, _SCALE * panel.top), (x, _SCALE * panel.bottom)], fill=TRACK, width=_SCALE)
        if with_levels:
            _write(draw, f"{sigma:g}", (x / _SCALE, panel.bottom + 6), "ma", MUTED, _SMALL)
    draw.line(
        [(left, _SCALE * panel.top), (left, _SCALE * panel.bottom), (right, _SCALE * panel.bottom)],
        fill=MUTED,
        width=_SCALE,
    )
    _write(draw, title, (_LEFT, panel.top - 4), "ld", MUTED, _SMALL)
    if with_levels:
        _write(draw, "noise level sigma", ((_LEFT + _WIDTH - _RIGHT) / 2, panel.bottom + 28), "ma", INK, _FONT)


def _draw_curves(draw: Any, panel: Panel, curves: Sequence[Curve], colors: Mapping[str, str]) -> None:
    """Bands below, lines above them; where a value is not known the line is broken."""
    largest = max(float(np.nanmax(np.abs(values))) for _, _, values in curves)
    cleaned = [(name, sigmas, np.where(np.abs(v) < SMALLEST * largest, 0.0, v)) for name, sigmas, v in curves]
    for name, sigmas, values in cleaned:
        low, high = _over(values, np.min), _over(values, np.max)
        for i in range(len(sigmas) - 1):
            corners = [(i, low[i]), (i + 1, low[i + 1]), (i + 1, high[i + 1]), (i, high[i])]
            if values.shape[1] > 1 and all(math.isfinite(value) for _, value in corners):
                draw.polygon(
                    [(panel.across(sigmas[j]), panel.down(value)) for j, value in corners], fill=_light(colors[name])
                )
    for name, sigmas, values in cleaned:
        places = [
            (panel.across(sigma), panel.down(value)) if math.isfinite(value) else None
            for sigma, value in zip(sigmas, _over(values, np.mean), strict=True)
        ]
        for i, place in enumerate(places):
            if place is None:
                continue
            if i and (before := places[i - 1]) is not None:
                draw.line([before, place], fill=colors[name], width=2 * _SCALE)
            radius = 2.5 * _SCALE
            draw.ellipse(
                [place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius], fill=colors[name]
            )


def _draw_legend(draw: Any, panel: Panel, curves: Sequence[Curve], colors: Mapping[str, str]) -> None:
    """Names beside the panel."""
    x, y = _WIDTH - _RIGHT + 14, panel.top
    for name, _, _ in curves:
        middle = _SCALE * (y + 9)
        draw.line([(_SCALE * x, middle), (_SCALE * (x + 22), middle)], fill=colors[name], width=3 * _SCALE)
        for line in textwrap.wrap(name, 34):
            _write(draw, line, (x + 30, y + 9), "lm", INK, _SMALL)
            y += 17
        y += 3


def _light(color: str) -> str:
    """The colour thinned to a sixth on white."""
    return "#" + "".join(f"{255 - (255 - int(color[i : i + 2], 16)) // 6:02x}" for i in (1, 3, 5))


def _over(values: np.ndarray, measure: Callable[[np.ndarray], Any]) -> np.ndarray:
    """``measure`` of the numbers in each row of ``values`` (N, B), as (N,); NaN for a row without one."""
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([measure(row) if len(row) else math.nan for row in rows])
