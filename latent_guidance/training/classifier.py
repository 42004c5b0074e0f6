"""Recipe: a noisy-latent classifier.

It sees crops of the latents of larger renders, plain and mirrored, and the whole latents of the renders the UNet is trained on, at a
log-SNR drawn evenly from the schedule's whole range, or more often from where a sampler settles what it draws. Classes come equally
often. One picture in ten is held out, chosen by its number alone, and never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError
from .data import random_crops
from .latents import LatentSet
from .loop import LoopSettings, TrainingRun, check_settings

if TYPE_CHECKING:
    from ..models.classifier import Classifier, ClassifierConfig

HELD_OUT_EVERY = 10
SETTLING = (-4.5, 0.5)
"""log-SNRs between which the exact posterior of a small set of pictures goes from knowing little to knowing the picture."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """Settings of :func:`train_classifier`.

    Attributes:
        batch: Latents per step, >= 1 for each set of latents.
        crop: Side of the crops, in latent pixels, >= 1.
        first: Share of the batch drawn from the first set, above 0 and at most 1; None for as many as from each other set.
        settling: Share of noise levels drawn from :data:`SETTLING` rather than from the whole range, 0 to 1.

    Raises:
        UserError: A value out of its range.
    """

    batch: int = 64
    crop: int = 16
    first: float | None = None
    settling: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            batch=(self.batch >= 1, "at least 1"),
            crop=(self.crop >= 1, "at least 1"),
            first=(self.first is None or 0 < self.first <= 1, "above 0 and at most 1, or none"),
            settling=(0 <= self.settling <= 1, "from 0 to 1"),
        )

    def log_snrs(self, low: float, high: float, *, generator: torch.Generator) -> Tensor:
        """Noise levels (batch,) of a step, for a schedule of log-SNRs from ``low`` to ``high``."""
        place = torch.rand(self.batch, generator=generator)
        if not self.settling:
            return low + (high - low) * place
        inner = max(low, SETTLING[0]), max(low, min(high, SETTLING[1]))
        settling = torch.rand(self.batch, generator=generator) < self.settling
        return torch.where(settling, inner[0] + (inner[1] - inner[0]) * place, low + (high - low) * place)


def check_draws(recipe: object, sets: Sequence[LatentSet], *, batch: int, crop: int) -> None:
    """Raise UserError unless a recipe's ``batch`` has a latent of every set and its ``crop`` fits into the smallest."""
    side = min(min(latents.mean.shape[-2:]) for latents in sets)
    check_settings(
        recipe,
        batch=(batch >= len(sets), f"at least {len(sets)}, one latent of each set"),
        crop=(crop <= side, f"at most {side}, the side of the smallest latents"),
    )


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
        UserError: A class without a picture that is not held out, a recipe that does not fit the latents, training turned NaN, or
            the state belongs to another network or to other latents.
    """
    from ..models.classifier import Classifier, new_classifier

    recipe = ClassifierRecipe() if recipe is None else recipe
    check_draws(recipe, sets, batch=recipe.batch, crop=recipe.crop)
    classes = sets[0].classes
    seen = ~held_out(len(classes))
    by_class = [torch.nonzero((classes == number) & seen).flatten() for number in range(len(config.labels))]
    if empty := [label for label, own in zip(config.labels, by_class, strict=True) if not len(own)]:
        raise UserError(
            f"no pictures to learn {', '.join(map(repr, empty))} from: all of them are held out for the test, one in {HELD_OUT_EVERY}",
            expected="at least one picture of every class besides those held out",
            mend="add pictures to these classes, or leave the classes out",
        )
    low, high = config.log_snr_range
    torch.manual_seed(settings.seed)
    network = new_classifier(config).train()
    mark = "; ".join(latents.mark for latents in sets if latents.mark)
    run = TrainingRun(network, run_folder, settings, data=mark, recipe=asdict(recipe))
    forward = run.compiled(network)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        labels = torch.randint(len(by_class), (recipe.batch,), generator=generator)
        picks = torch.rand(recipe.batch, generator=generator)
        chosen = torch.stack(
            [by_class[k][int(u * len(by_class[k]))] for k, u in zip(labels.tolist(), picks, strict=True)]
        )
        x0 = drawn_crops(sets, chosen, size=recipe.crop, generator=generator, first=recipe.first)
        log_snr = recipe.log_snrs(low, high, generator=generator)
        x = noised(x0, log_snr, generator=generator).to(settings.device)
        with run.arithmetic():
            logits = forward(x, log_snr.to(settings.device))
        loss = functional.cross_entropy(logits.float(), labels.to(settings.device))
        right = (logits.detach().argmax(1).cpu() == labels).float()
        clear = right[log_snr > 1]
        numbers = {"accuracy": float(right.mean())}
        return loss, numbers | ({"accuracy_clear": float(clear.mean())} if len(clear) else {})

    run.train(loss_of, progress=progress)
    run.finished()
    return Classifier(network)


def drawn_crops(
    sets: Sequence[LatentSet], chosen: Tensor, *, size: int, generator: torch.Generator, first: float | None = None
) -> Tensor:
    """Crops (B, C, size, size) of posterior samples of the pictures ``chosen`` (B,).

    Args:
        sets: Latents of the same pictures in the same order.
        chosen: Indices of pictures.
        size: Side of the crops.
        generator: Draws samples and places.
        first: Share of the batch from the first set, the others sharing the rest equally; None for an equal share from each.
    """
    count, others = len(chosen), len(sets) - 1
    own = count if not others else count // len(sets) if first is None else round(first * count)
    share = (count - own) // max(1, others)
    sizes = [own, *([share] * others)]
    sizes[-1] += count - sum(sizes)
    cuts = chosen.split(sizes)
    crops = [
        random_crops(latents.draw(cut, generator=generator), size=size, generator=generator)
        for latents, cut in zip(sets, cuts, strict=True)
        if len(cut)
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
