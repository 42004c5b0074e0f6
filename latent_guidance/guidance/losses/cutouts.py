r"""Random cutouts of pictures: square crops, some of them mirrored, resized to what a network looks at.

    side = round(m (s + (1 - s) u)),   m = min(height, width),   u uniform in [0, 1),   place uniform,   mirrored with probability 1/2

The crops are the same for all pictures of a batch and follow from a seed and the step, so that a picture does not depend on its
neighbours and two runs agree.

Reference: katherinecrowson/clip-guided-diffusion ("MakeCutouts"); arXiv 2103.00020, section 2.4 (crops as the one augmentation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Crop:
    """A square of a picture, in pixels; ``mirrored`` left to right."""

    top: int
    left: int
    side: int
    mirrored: bool


def drawn_crops(
    height: int, width: int, count: int, *, smallest: float, mirror: bool, seed: int, index: int | None
) -> tuple[Crop, ...]:
    """``count`` random crops of pictures of ``height`` x ``width`` pixels.

    Args:
        height: of the pictures.
        width: of the pictures.
        count: at least 1.
        smallest: the least side, as a share of the picture's shorter side, in (0, 1]; 1 crops nothing off the shorter side.
        mirror: whether half of them are mirrored.
        seed: of the draw.
        index: of the step; None draws as step 0.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + (index or 0)) % 2**63)
    draws: list[list[float]] = torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist()
    shorter = min(height, width)
    crops: list[Crop] = []
    for size, down, right, chance in draws:
        side = max(1, round(shorter * (smallest + (1 - smallest) * size)))
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        crops.append(Crop(top, left, side, mirror and chance < 0.5))
    return tuple(crops)


def cutouts(pictures: Tensor, crops: Sequence[Crop], size: int) -> Tensor:
    """The crops of pictures (B, 3, H, W) resized to ``size`` pixels across, bicubic and antialiased: (K, B, 3, size, size)."""
    return torch.stack([_cutout(pictures, crop, size) for crop in crops])


def _cutout(pictures: Tensor, crop: Crop, size: int) -> Tensor:
    part = pictures[..., crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    part = part.flip(-1) if crop.mirrored else part
    return nn.functional.interpolate(part, size=(size, size), mode="bicubic", antialias=True)
