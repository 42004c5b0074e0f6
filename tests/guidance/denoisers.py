"""A loss and smooth denoisers to differentiate through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_guidance.guidance import DPS, MPGD, FreeDoM, LossGuidedDiffusion, TrainingFreeGuidance, UniversalGuidance
from latent_guidance.process import Process

THROUGH = [DPS, FreeDoM, LossGuidedDiffusion, UniversalGuidance, TrainingFreeGuidance]
"""Rules that differentiate through the denoiser."""

EVERY = [MPGD, *THROUGH]
"""Rules that follow a loss."""


class Towards:
    """Half the squared distance to a fixed number, weighted by place: no gradient is a multiple of another."""

    space = "latent"

    def __call__(self, estimate: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, estimate[0].numel(), dtype=estimate.dtype).reshape(estimate.shape[1:])
        return (weights * (estimate - 0.7).square()).flatten(1).sum(dim=1) / 2


class Model:
    """A smooth denoiser with a Jacobian that is not symmetric, different for both branches; it counts its calls."""

    def __init__(self, process: Process, *, gradient: bool = True) -> None:
        self.process, self.gradient = process, gradient
        self.calls: list[bool] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.calls.append(x.requires_grad)
        level = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        own = 0 if cond is None else cond.reshape(-1, *(1,) * (x.ndim - 1)).to(x)
        mixed = x + 0.3 * x.roll(1, dims=-1) + 0.1 * own
        return torch.tanh(mixed / (1 + level)) if self.gradient else torch.tanh(mixed.detach())


BLOCKS = 12


class InPlace(Model):
    """The same, in layers that change what autograd has saved of the layer before, as Flux's do."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        mixed = super().__call__(x, sigma, cond)
        for _ in range(BLOCKS):  # blocks of one size, whose tensors come and go
            kept = torch.tanh(mixed)  # tanh keeps its answer for its gradient
            kept += 1.0
            squared = kept.square()  # and square what it is given
            kept[..., :1] -= 0.25  # through a view, as FreeU does
            mixed = squared.mul_(0.5).add_(kept)
            del kept, squared  # so that the next block's may lie where these were
        return mixed


class OutOfPlace(Model):
    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        mixed = super().__call__(x, sigma, cond)
        for _ in range(BLOCKS):
            kept = torch.tanh(mixed) + 1.0
            first = torch.cat([torch.full_like(kept[..., :1], 0.25), torch.zeros_like(kept[..., 1:])], dim=-1)
            mixed = kept.square() * 0.5 + kept - first
        return mixed


def conds(batch: int, value: float) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)
