"""The classifier learns on two colours; its data are noised, held out and drawn as said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.models.classifier import ClassifierConfig
from latent_guidance.training.classifier import (
    ClassifierRecipe,
    accuracy_by_noise,
    held_out,
    noised,
    train_classifier,
)
from latent_guidance.training.loop import LoopSettings

from .samples import synthetic


def test_subgroups_as_classes() -> None:
    latents = synthetic(count=4)
    with pytest.raises(UserError, match="no subgroups"):
        replace(latents, subgroups=("a", "", "b", "b")).by_subgroup()
    with pytest.raises(UserError, match="no subgroups"):
        latents.by_subgroup()
    finer = replace(latents, subgroups=("cats", "dogs", "cats", "rain")).by_subgroup()
    assert finer.labels == ("cats", "dogs", "rain") and finer.classes.tolist() == [0, 1, 0, 2]


def test_noised_has_unit_variance_and_the_named_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 200, 200, generator=generator)
    log_snr = torch.tensor([-2.0, 3.0])
    x = noised(x0, log_snr, generator=generator)
    torch.testing.assert_close(x.var((1, 2, 3)), torch.ones(2), rtol=0.02, atol=0)
    signal = (x * x0).mean((1, 2, 3))
    ratio = signal.square() / (1 - signal.square())
    torch.testing.assert_close(ratio.log(), log_snr, rtol=0, atol=0.05)


def test_held_out_pictures_are_fixed_and_never_seen() -> None:
    mask = held_out(1870)
    assert int(mask.sum()) == 187 and torch.equal(mask, held_out(1870))


def test_a_class_whose_pictures_are_all_held_out_is_named(tmp_path: Path) -> None:
    latents = synthetic()
    last = torch.nonzero(held_out(len(latents))).flatten()[0]
    classes = latents.classes.clone()
    classes[last] = 2
    alone = replace(latents, classes=classes, labels=(*latents.labels, "Single"))
    config = ClassifierConfig(
        labels=alone.labels, latent_space="test", latent_channels=4, scaling_factor=1.0, log_snr_range=(-6.0, 6.0)
    )
    settings = LoopSettings(steps=1, learning_rate=1e-3)
    for sets, recipe, words in (
        ([alone], ClassifierRecipe(batch=4, crop=8), r"no pictures to learn 'Single' from: all of them are held out"),
        ([latents], ClassifierRecipe(batch=4, crop=9), "crop = 9 in ClassifierRecipe.*at most 8"),
        ([latents, latents], ClassifierRecipe(batch=1, crop=8), "batch = 1 in ClassifierRecipe.*at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            train_classifier(sets, tmp_path, config=config, settings=settings, recipe=recipe, progress=False)


def test_classifier_recipe_learns_and_loses_by_noise(tmp_path: Path) -> None:
    latents = synthetic(10, count=200)
    config = ClassifierConfig(
        labels=latents.labels,
        latent_space="test",
        latent_channels=4,
        scaling_factor=1.0,
        log_snr_range=(-6.0, 6.0),
        channels=(32, 32),
        layers=(1, 1),
    )
    settings = LoopSettings(steps=80, learning_rate=2e-3, warmup=5, ema_decay=0.9, bf16=False)
    recipe = ClassifierRecipe(batch=32, crop=8)
    classifier = train_classifier(
        [latents, latents], tmp_path, config=config, settings=settings, recipe=recipe, progress=False
    )
    unknown = latents.mean.clone()
    unknown[held_out(200)] = torch.nan  # a single one of them would spoil the loss
    short, spoilt = replace(settings, steps=10), [replace(latents, mean=unknown)]
    train_classifier(spoilt, tmp_path / "spoilt", config=config, settings=short, recipe=recipe, progress=False)
    accuracy = accuracy_by_noise(classifier, latents, log_snrs=(-14.0, 5.0), chosen=held_out(200))
    assert accuracy[5.0] > 0.9
    assert accuracy[-14.0] <= 0.75  # of 20 pictures; a guess is right about half of them


def test_noise_levels_come_more_often_from_where_pictures_settle() -> None:
    def drawn(settling: float, low: float = -5.37, high: float = 7.08) -> torch.Tensor:
        recipe = ClassifierRecipe(batch=20_000, settling=settling)
        return recipe.log_snrs(low, high, generator=torch.Generator().manual_seed(0))

    def inside(log_snrs: torch.Tensor) -> float:
        return float(((log_snrs > -4.5) & (log_snrs < 0.5)).float().mean())

    even = 5.0 / 12.45
    for settling in (0.0, 0.6, 1.0):
        found = drawn(settling)
        assert inside(found) == pytest.approx(settling + (1 - settling) * even, abs=0.02)
        assert float(found.min()) >= -5.37 and float(found.max()) <= 7.08
    assert float(drawn(0.0).min()) < -5.3 and float(drawn(0.6).max()) > 7.0
    short = drawn(1.0, low=-2.0, high=0.0)  # a schedule that has only a part of them
    assert -2 <= float(short.min()) < -1.9 and -0.1 < float(short.max()) <= 0
    assert drawn(1.0, low=2.0, high=3.0).tolist() == [2.0] * 20_000
