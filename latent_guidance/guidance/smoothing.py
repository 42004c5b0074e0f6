r"""A loss around an estimate instead of at it: Monte Carlo over Gaussian draws.

    l~(D) = -log 1/n sum_i exp(-l(D + r z_i)),     grad l~ = sum_i softmax_i(-l(D + r z_i)) grad l(D + r z_i)

The n draws z_i are the same for all pictures of a batch and follow from a seed and the step, so that a picture does not depend on its
neighbours and two runs agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..process import expand


def draws_like(x: Tensor, count: int, seed: int, index: int | None, radius: Tensor | None = None) -> list[Tensor]:
    """``count`` unit Gaussians (1, ...) of one sample's shape, for the step ``index`` of a run; none where ``radius`` (B,) is 0 for all:
    nothing is asked of them there."""
    if radius is not None and not bool((radius > 0).any()):
        return []
    generator = torch.Generator().manual_seed((seed * 1_000_003 + (index or 0)) % 2**63)
    shape = (1, *x.shape[1:])
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(x) for _ in range(count)]


def smoothed_gradient(
    gradient_at: Callable[[Tensor], tuple[Tensor, Tensor]], at: Tensor, radius: Tensor, draws: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """l~ (B,) at ``at`` (B, ...), and its gradient.

    Args:
        gradient_at: an estimate (B, ...) -> the loss (B,) there and its gradient (B, ...).
        at: the estimate.
        radius: r (B,); where it is 0 for all samples the loss is asked once, at the estimate itself.
        draws: z_i (1, ...).
    """
    if not bool((radius > 0).any()):
        return gradient_at(at)
    found = [gradient_at(at + expand(radius, at) * draw) for draw in draws]
    losses = torch.stack([values for values, _ in found])  # (n, B)
    weights = (-losses).softmax(dim=0)
    gradient = sum(expand(weight, part).to(part) * part for weight, (_, part) in zip(weights, found, strict=True))
    count = torch.full_like(losses[0], len(draws))
    return count.log() - (-losses).logsumexp(dim=0), gradient  # type: ignore[return-value]
