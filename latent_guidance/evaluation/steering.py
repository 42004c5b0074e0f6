"""What classifier guidance does: samples from the empty prompt, steered to a group, judged by someone else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bench import Bench
from .judge import Judge, judge_mark
from .parts import measured

CLASSES_BLOCK, BASE_BLOCK = 20, 25
WANTED = 0.9
"""Of the judge's accuracy on real pictures: what steering is held to."""


def distribution(verdicts: Tensor, labels: tuple[str, ...]) -> dict[str, float]:
    """Share of each group among verdicts (N,)."""
    counts = torch.bincount(verdicts, minlength=len(labels)).float()
    return {label: float(count) / len(verdicts) for label, count in zip(labels, counts.tolist(), strict=True)}


def measure_classes(bench: Bench, judge: Judge, on_real: dict[str, Any]) -> dict[str, Any]:
    """Share of samples judged as asked, per group, against the judge's accuracy on real pictures and against no guidance.

    Args:
        bench: Where samples come from.
        judge: Of the bench's labels.
        on_real: The judge's accuracy on the real pictures, as :func:`.judge.accuracies` has it.
    """
    plan, labels = bench.plan, bench.labels

    def run() -> dict[str, Any]:
        groups: dict[str, Any] = {}
        for k, label in enumerate(labels):
            seeds = bench.seeds(plan.per_group, block=CLASSES_BLOCK + 1000 * k)
            verdicts = judge.verdicts(bench.by_classifier(label, seeds))
            share, real = float((verdicts == k).float().mean()), on_real["by_group"][label]
            groups[label] = {
                "as_asked": share,
                "judge_on_real": real,
                "wanted": WANTED * real,
                "reached": share >= WANTED * real,
                "judged": distribution(verdicts, labels),
            }
        count = plan.per_group * len(labels)
        unguided = judge.verdicts(bench.from_nothing(bench.seeds(count, block=BASE_BLOCK)))
        base, real = distribution(unguided, labels), distribution(bench.data.classes, labels)
        mean = sum(group["as_asked"] for group in groups.values()) / len(groups)
        wanted = WANTED * on_real["mean_of_groups"]
        return {
            "per_group": plan.per_group,
            "groups": groups,
            "mean": mean,
            "judge_on_real": on_real["mean_of_groups"],
            "wanted": wanted,
            "reached": mean >= wanted,
            "unguided": {
                "pictures": count,
                "judged": base,
                "real": real,
                "total_variation": sum(abs(base[label] - real[label]) for label in labels) / 2,
            },
        }

    settings = bench.settings(
        per_group=plan.per_group,
        classifier_scale=plan.classifier_scale,
        classifier_scaling=plan.classifier_scaling,
        judge=judge_mark(bench.out),
    )
    return measured(bench.out, "classes", settings, run, say=bench.say)
