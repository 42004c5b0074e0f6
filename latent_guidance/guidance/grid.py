"""Where a noise level lies on a run's grid.

Read from the grid and not counted, since some samplers call the denoiser twice a step, and for each sample by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5
"""How far, relatively, two noise levels may lie apart and still be one: sigma comes in x's dtype, the grid in float64."""


def levels_above(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """How many levels of the grid ``sigmas`` (M,) are above each of ``sigma`` (B,), as (B,) int64: 0 at the first step."""
    grid = sigmas.to(sigma)
    return (grid > sigma[:, None] * (1 + ROUNDING)).sum(dim=1)


def progress(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """How much of a run lies behind each of ``sigma`` (B,), counted in steps: 0 at the first step and 1 at the last.

    Between two levels of the grid it is in between (linearly in sigma), so that a sampler's intermediate evaluations are
    placed too. A run of a single step is in the middle of itself, at 0.5.

    Args:
        sigma: noise levels (B,).
        sigmas: the run's grid (N + 1,), descending; the last level is where it ends, and no estimate is made there.
    """
    levels = sigmas[:-1].to(sigma)
    last = len(levels) - 1
    if last == 0:
        return torch.full_like(sigma, 0.5)
    index = levels_above(sigma, levels)
    upper, lower = levels[(index - 1).clamp(min=0)], levels[index.clamp(max=last)]
    gap = torch.where(upper > lower, upper - lower, torch.ones_like(sigma))
    between = torch.where(sigma <= lower * (1 + ROUNDING), torch.ones_like(sigma), (upper - sigma) / gap)
    return (index - 1 + between).clamp(0, last) / last


def next_level(sigma: Tensor, sigmas: Tensor | None) -> Tensor:
    """The level of the grid ``sigmas`` (N + 1,) that comes after each of ``sigma`` (B,); 0 at its end, and without a grid."""
    if sigmas is None:
        return torch.zeros_like(sigma)
    grid = sigmas.to(sigma)
    below = grid < sigma[:, None] * (1 - ROUNDING)
    return torch.where(below, grid, torch.zeros_like(grid)).amax(dim=1)
