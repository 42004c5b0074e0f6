"""Latents of two classes, and a recipe for a network small enough for a test."""

from __future__ import annotations

import torch

from latent_guidance.training.latents import LatentSet
from latent_guidance.training.unet import UNetRecipe

UNET = UNetRecipe(
    batch=16,
    text_width=64,
    text_layers=1,
    unet={"channels": (32, 32), "attention": (False, True), "heads": 2},
)


def synthetic(side: int = 8, *, count: int = 40, spread: float = 0.5) -> LatentSet:
    """Two classes of latents that differ in the mean of one channel."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(count) % 2
    mean = torch.randn(count, 4, side, side, generator=generator) * spread
    mean[:, 0] += 2.0 * classes.reshape(-1, 1, 1) - 1
    texts = tuple(f"thing {number}" for number in range(count))
    return LatentSet(mean, torch.full_like(mean, 0.01), texts, classes, ("Low & Dim", "High"))
