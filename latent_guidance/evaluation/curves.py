"""What the guidance scale buys and what it costs: obedience, variety, and distance to the training set.

Every scale is given the same seeds, so that its points differ by the scale alone. Every point is kept in a file of its own: what
was stopped goes on where it was, and a further scale costs itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bench import Bench
from .judge import Judge, judge_mark
from .neighbours import RULE, Gallery, diversity, thumbnails
from .parts import measured

CURVES_BLOCK = 15
CURVES = {"raw": "classifier guidance, raw", "relative": "classifier guidance, relative", "cfg": "classifier-free"}


def measure_curves(bench: Bench, judge: Judge, gallery: Gallery) -> dict[str, Any]:
    """Share as asked or named, diversity and distance to the nearest reconstruction, over the scale."""
    plan, labels, texts = bench.plan, bench.labels, bench.data.texts
    common = bench.settings(
        per_group=plan.curve_per_group,
        names=plan.curve_names,
        seeds=plan.curve_seeds,
        judge=judge_mark(bench.out),
        rule=RULE,
    )

    def by_group(scale: float, scaling: str) -> dict[str, Any]:
        sets, shares = [], []
        for k, label in enumerate(labels):
            seeds = bench.seeds(plan.curve_per_group, block=CURVES_BLOCK + 1000 * k)
            pictures = bench.by_classifier(label, seeds, scale=scale, scaling=scaling)
            shares.append((judge.verdicts(pictures) == k).float())
            sets.append(pictures)
        return point(bench, gallery, scale, torch.cat(shares), sets)

    def by_name(scale: float) -> dict[str, Any]:
        chosen = bench.names(plan.curve_names)
        named = torch.tensor(chosen).repeat_interleave(plan.curve_seeds)
        prompts = [texts[i] for i in named.tolist()]
        pictures = bench.by_prompt(prompts, bench.seeds(len(prompts), block=CURVES_BLOCK), scale=scale)
        right = gallery.is_named(gallery.nearest(pictures)[1], named).float()
        return point(bench, gallery, scale, right, list(pictures.split(plan.curve_seeds)))

    def curve(name: str, scales: Sequence[float], measure: Callable[[float], dict[str, Any]]) -> list[dict[str, Any]]:
        points = []
        for scale in scales:
            own = {**common, "curve": name, "scale": scale}
            part = f"curves/{name}-{scale:g}"
            points.append(measured(bench.out, part, own, lambda scale=scale: measure(scale), say=bench.say))
            bench.say(f"curves: {CURVES[name]}, scale {scale:g}: share {points[-1]['share']:.3f}")
        return points

    def run() -> dict[str, Any]:
        thumbs = thumbnails(bench.data.images, bench.device)
        groups = [diversity(thumbs[(bench.data.classes == k).to(bench.device)]) for k in range(len(labels))]
        return {
            "raw": curve("raw", plan.raw_scales, lambda scale: by_group(scale, "raw")),
            "relative": curve("relative", plan.relative_scales, lambda scale: by_group(scale, "relative")),
            "cfg": curve("cfg", plan.cfg_scales, by_name),
            "real": {
                "diversity": sum(groups) / len(groups),
                "diversity_by_group": dict(zip(labels, groups, strict=True)),
                "nearest_other": float(gallery.nearest_other.mean()),
            },
            "samples": {
                "groups": len(labels) * plan.curve_per_group,
                "per_group": plan.curve_per_group,
                "names": plan.curve_names,
                "per_name": plan.curve_seeds,
            },
        }

    settings = {**common, "raw": plan.raw_scales, "relative": plan.relative_scales, "cfg": plan.cfg_scales}
    return measured(bench.out, "curves", settings, run, say=bench.say)


def point(bench: Bench, gallery: Gallery, scale: float, right: Tensor, sets: Sequence[Tensor]) -> dict[str, Any]:
    """One point of a curve.

    Args:
        bench: For its device.
        gallery: What distances are taken to.
        scale: Of the guidance.
        right: (N,) 1 where a sample is what was asked for.
        sets: The samples, (B, 3, H, W) uint8 each, by what was asked for; diversity is taken within a set.
    """
    distance = gallery.nearest(torch.cat(list(sets)))[0]
    spread = [diversity(thumbnails(pictures, bench.device)) for pictures in sets]
    return {
        "scale": scale,
        "share": float(right.mean()),
        "diversity": sum(spread) / len(spread),
        "distance": float(distance.mean()),
    }
