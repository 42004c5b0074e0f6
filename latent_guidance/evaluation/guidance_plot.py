"""A guidance report as a picture, with matplotlib: curves over the noise level, which falls from left to right."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..guidance.report import Chain, Report
from .pictures import INK, MUTED, PAPER, TRACK

COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
SMALLEST = 1e-5
"""Contributions below this part of the largest one are rounding, and drawn as nothing."""

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
    return f" (on the {chain.on})" if several else ""


def _panels(report: Report) -> list[tuple[str, list[Curve]]]:
    """Title and curves of every panel that has any."""
    scale: list[Curve | None] = []
    sizes: list[Curve | None] = []
    notes: dict[str, list[Curve | None]] = {}
    several = len(report.chains) > 1
    for chain in report.chains:
        rows, where = chain.rows, _named(chain, several)
        scale.append(_curve(f"w{where}", ((row, row["guidance_scale"]) for row in rows)))
        sizes.append(_curve(f"Δ = prompt - negative{where}", ((row, row["delta"]) for row in rows)))
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
    """Write :func:`report_image`'s picture as a PNG to ``path``, under a temporary name first.

    Raises:
        UserError: a report without rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    partial.write_bytes(_png(report))
    os.replace(partial, path)


def report_image(report: Report) -> Tensor:
    """The report as a picture (1, H, W, 3) in [0, 1]: the scale in force, the sizes of Δ and of what each rule changed, and what
    rules noted, each in a panel; lines are the batch's mean, bands its extremes.

    Raises:
        UserError: a report without rows.
    """
    from PIL import Image

    with Image.open(io.BytesIO(_png(report))) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def _png(report: Report) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _panels(report)
    if not panels:
        raise UserError("a report without a call of the guider", expected="one of a run", mend="sample first")
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    }  # fmt: skip
    names = dict.fromkeys(name for _, curves in panels[1:] for name, _, _ in curves if not name.startswith("Δ"))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}  # a rule's is the same in every panel
    heights = [1.6 if title.startswith("size") else 1.0 for title, _ in panels]
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.6, 0.7 + 1.55 * sum(heights)), dpi=120, facecolor=PAPER, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (title, curves) in zip(axes, panels, strict=True):
            _draw(axis, title, curves, colors)
        axes[0].set_title(_heading(report), fontsize=10, loc="left", pad=10)
        axes[-1].set_xlabel("noise level sigma")
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _heading(report: Report) -> str:
    [*calls] = [len(chain.rows) for chain in report.chains]
    passes = [chain.passes for chain in report.chains if chain.passes is not None]
    return f"{max(calls)} calls of the guider" + (f", {sum(passes)} network passes a picture" if passes else "")


def _over(values: np.ndarray, measure: Callable[[np.ndarray], Any]) -> np.ndarray:
    """``measure`` of the numbers in each row of ``values`` (N, B), as (N,); NaN for a row without one."""
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([measure(row) if len(row) else math.nan for row in rows])


def _draw(axis: Any, title: str, curves: Sequence[Curve], colors: Mapping[str, str]) -> None:
    """One panel."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    largest = max(float(np.nanmax(np.abs(values))) for _, _, values in curves)
    for name, sigmas, values in curves:
        if title.startswith("size"):
            values = np.where(np.abs(values) < SMALLEST * largest, 0.0, values)
        mean, low, high = (_over(values, measure) for measure in (np.mean, np.min, np.max))
        color = colors.get(name, MUTED if name.startswith("Δ") else INK)
        dashes = (0, (4, 2)) if name.startswith("Δ") else "solid"
        label = "\n".join(textwrap.wrap(name, 26))
        axis.plot(sigmas, mean, color=color, linestyle=dashes, linewidth=1.6, marker="o", markersize=2.8, label=label)
        if values.shape[1] > 1:
            axis.fill_between(sigmas, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if not axis.xaxis_inverted():
        axis.invert_xaxis()
    if title == "probability":
        axis.set_ylim(-0.03, 1.03)
    elif not title.startswith("score"):
        axis.set_ylim(bottom=min(0.0, min(float(np.nanmin(values)) for _, _, values in curves)))
    axis.set_ylabel("\n".join(textwrap.wrap(title, 18)))
    axis.grid(color=TRACK, linewidth=1)
    axis.set_axisbelow(True)
    axis.tick_params(length=3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8.5, borderaxespad=0)
