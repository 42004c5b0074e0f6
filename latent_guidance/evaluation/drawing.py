"""The curves as a picture, with matplotlib."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from .pictures import ACCENT, INK, MUTED, PAPER, TRACK

NAMED = 0.8
"""Share of names that classifier-free guidance is held to."""
TITLES = {"raw": "Classifier, raw", "relative": "Classifier, relative", "cfg": "Classifier-free (CFG)"}
ROWS = {"share": "share as asked", "diversity": "diversity", "distance": "distance to training set"}
NOTES = {"share": "wanted", "diversity": "real pictures of a group", "distance": "real picture to nearest other"}
NEUTRAL = {"raw": 0.0, "relative": 0.0, "cfg": 1.0}


def recommended(points: list[dict[str, Any]], *, wanted: float, samples: int, neutral: float) -> dict[str, Any]:
    """The point of the smallest scale that guides and is sure to reach the share ``wanted``; the best one if none does.

    Sure: the share less its standard error, of ``samples`` samples a point. The ``neutral`` scale, which does not guide, is left out.
    """
    guiding = [point for point in points if point["scale"] != neutral]
    reaching = [p for p in guiding if p["share"] - math.sqrt(p["share"] * (1 - p["share"]) / samples) >= wanted]
    return min(reaching, key=lambda p: p["scale"]) if reaching else max(guiding, key=lambda p: p["share"])


def choices(curves: dict[str, Any], wanted: float) -> dict[str, dict[str, Any]]:
    """The recommended point of each curve; ``wanted`` is what steering by class is held to."""
    counts = curves["samples"]
    held = {kind: (wanted, counts["groups"]) for kind in TITLES}
    held["cfg"] = (NAMED, counts["names"] * counts["per_name"])
    return {
        kind: recommended(curves[kind], wanted=share, samples=count, neutral=NEUTRAL[kind])
        for kind, (share, count) in held.items()
    }


def draw_curves(curves: dict[str, Any], wanted: float, path: Path) -> None:
    """Nine panels: share, diversity and distance over the scale of each kind of guidance.

    Args:
        curves: The result of `curves`.
        wanted: The share that steering by class is held to, drawn as a line.
        path: PNG, written under a temporary name first.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    real, chosen = curves["real"], choices(curves, wanted)
    style: dict[Any, Any] = {
        "font.size": 9.5, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
        "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(10.5, 7.6), dpi=150, facecolor=PAPER, layout="constrained")
        axes = figure.subplots(len(ROWS), len(TITLES), sharey="row", sharex="col")
        for column, (kind, title) in enumerate(TITLES.items()):
            points = curves[kind]
            scales = [point["scale"] for point in points]
            choice = chosen[kind]
            for row, (name, label) in enumerate(ROWS.items()):
                axis = axes[row][column]
                axis.grid(axis="y", color=TRACK, linewidth=1)
                axis.set_axisbelow(True)
                axis.axvline(choice["scale"], color=TRACK, linewidth=7, zorder=0.5)
                line = {"share": wanted if kind != "cfg" else NAMED, "diversity": real["diversity"] if kind != "cfg" else None,
                        "distance": real["nearest_other"]}[name]  # fmt: skip
                values = [point[name] for point in points]
                if line is not None:
                    axis.axhline(line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
                    note = "0.9 × judge on real" if name == "share" and kind != "cfg" else NOTES[name]
                    axis.annotate(
                        f"dashed: {note}", (1, 0), xycoords="axes fraction", xytext=(-2, 34 if row == 0 else 6),
                        textcoords="offset points", fontsize=8.5, ha="right", va="bottom", color=MUTED,
                    )  # fmt: skip
                axis.plot(scales, values, color=ACCENT, linewidth=1.8, marker="o", markersize=4, markeredgecolor=PAPER)
                axis.plot(choice["scale"], choice[name], "o", color=ACCENT, markersize=8, markeredgecolor=PAPER)
                axis.set_xlim(min(scales) - 0.03 * (max(scales) - min(scales)), max(scales) * 1.03)
                axis.tick_params(length=3)
                if row == 0:
                    axis.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=10)
                    axis.annotate(
                        f"recommended {choice['scale']:g}\nneutral {NEUTRAL[kind]:g}", (1, 0), xycoords="axes fraction",
                        xytext=(-2, 6), textcoords="offset points", fontsize=8.5, ha="right", va="bottom", color=ACCENT,
                    )  # fmt: skip
                if row == len(ROWS) - 1:
                    axis.set_xlabel("guidance_scale")
                if column == 0:
                    axis.set_ylabel(label)
        for row in range(len(ROWS)):
            top = axes[row][0].get_ylim()[1]
            axes[row][0].set_ylim(0, 1.02 if row == 0 else 1.08 * top)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial.{path.name}")
        figure.savefig(partial)
        os.replace(partial, path)
