"""Recipe: a noisy-latent classifier.

It sees crops of the latents of larger renders, and the whole latents of the renders the UNet is trained on, plain and
mirrored, at a log-SNR drawn evenly from the schedule's whole range. Classes come equally often. One picture in ten is held
out, chosen by its number alone, and never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .data import random_crops
from .latents import LatentSet
from .loop import LoopSettings, TrainingRun

if TYPE_CHECKING:
    from ..models.classifier import Classifier, ClassifierConfig

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class ClassifierRecipe:
    """Settings of :func:`train_classifier`.

    Attributes:
        batch: Latents per step.
        crop: Side of the crops, in latent pixels.
    """

    batch: int = 64
    crop: int = 16


def held_out(total: int) -> Tensor:
    """Which of ``total`` pictures are kept for the test, (total,) bool: every tenth of a fixed shuffle."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(2024))
    mask = torch.zeros(total, dtype=torch.bool)
    mask[order[::HELD_OUT_EVERY]] = True
    return mask


def train_classifier(
    sets: Sequence[LatentSet],
    run_folder: Path,
    *,
    config: ClassifierConfig,
    settings: LoopSettings,
    recipe: ClassifierRecipe | None = None,
    progress: bool = True,
) -> Classifier:
    """Train a classifier, resuming ``run_folder`` if it holds a state.

    Args:
        sets: Latents of the *same* pictures in the same order, at any sizes >= ``recipe.crop``.
        run_folder: Where the state is kept.
        config: Labels, latents, noise range and shape.
        settings: See :class:`.loop.LoopSettings`.
        recipe: See :class:`ClassifierRecipe`.
        progress: Show a bar.

    Raises:
        UserError: Training turned NaN, or the state belongs to another network or to other latents.
    """
    from ..models.classifier import Classifier, new_classifier

    recipe = ClassifierRecipe() if recipe is None else recipe
    classes = sets[0].classes
    seen = ~held_out(len(classes))
    by_class = [torch.nonzero((classes == number) & seen).flatten() for number in range(len(config.labels))]
    low, high = config.log_snr_range
    torch.manual_seed(settings.seed)
    network = new_classifier(config).train()
    run = TrainingRun(network, run_folder, settings, data="; ".join(latents.mark for latents in sets if latents.mark))

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        labels = torch.randint(len(by_class), (recipe.batch,), generator=generator)
        picks = torch.rand(recipe.batch, generator=generator)
        chosen = torch.stack(
            [by_class[k][int(u * len(by_class[k]))] for k, u in zip(labels.tolist(), picks, strict=True)]
        )
        x0 = drawn_crops(sets, chosen, size=recipe.crop, generator=generator)
        log_snr = low + (high - low) * torch.rand(recipe.batch, generator=generator)
        x = noised(x0, log_snr, generator=generator).to(settings.device)
        with run.arithmetic():
            logits = network(x, log_snr.to(settings.device))
        loss = functional.cross_entropy(logits.float(), labels.to(settings.device))
        right = (logits.detach().argmax(1).cpu() == labels).float()
        return loss, {"accuracy": float(right.mean()), "accuracy_clear": float(right[log_snr > 1].mean())}

    run.train(loss_of, progress=progress)
    run.finished()
    return Classifier(network)


def drawn_crops(sets: Sequence[LatentSet], chosen: Tensor, *, size: int, generator: torch.Generator) -> Tensor:
    """Crops (B, C, size, size) of posterior samples of the pictures ``chosen`` (B,), an equal share of the batch from each set.

    Args:
        sets: Latents of the same pictures in the same order.
        chosen: Indices of pictures.
        size: Side of the crops.
        generator: Draws samples and places.
    """
    share = len(chosen) // len(sets)
    cuts = chosen.split([share] * (len(sets) - 1) + [len(chosen) - share * (len(sets) - 1)])
    crops = [
        random_crops(latents.draw(cut, generator=generator), size=size, generator=generator)
        for latents, cut in zip(sets, cuts, strict=True)
    ]
    return torch.cat(crops)


def noised(x0: Tensor, log_snr: Tensor, *, generator: torch.Generator) -> Tensor:
    """Unit-variance x (B, C, h, w) at ``log_snr`` (B,): sqrt(p) * x0 + sqrt(1 - p) * noise, p = sigmoid(log_snr).

    p is alpha**2 / (alpha**2 + sigma**2), whatever the process.
    """
    kept = torch.sigmoid(log_snr).reshape(-1, 1, 1, 1)
    return kept.sqrt() * x0 + (1 - kept).sqrt() * torch.randn(x0.shape, generator=generator)


@torch.no_grad()
def accuracy_by_noise(
    classifier: Classifier, latents: LatentSet, *, log_snrs: Sequence[float], chosen: Tensor, seed: int = 0
) -> dict[float, float]:
    """Accuracy on the pictures ``chosen`` (N,) bool at each log-SNR; one noise draw per picture and level."""
    result: dict[float, float] = {}
    x0, classes = latents.mean[chosen], latents.classes[chosen]
    for number, level in enumerate(log_snrs):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        log_snr = torch.full((len(x0),), level)
        x = noised(x0, log_snr, generator=generator)
        logits = torch.cat([classifier.logits(a, b) for a, b in zip(x.split(64), log_snr.split(64), strict=True)])
        result[level] = float((logits.argmax(1).cpu() == classes).float().mean())
    return result
