"""A small random U-Net as a denoiser, for rules that change a network's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_guidance.denoiser import Cond, NetworkDenoiser
from latent_guidance.models.tiny import SCHEDULER_CONFIG
from latent_guidance.models.unet import network_denoiser, new_unet, unet_config

SIGMA = torch.tensor([2.0, 2.0])


def small_unet(*, attention: tuple[bool, ...] = (True, True)) -> Any:
    """d0, d1, m0, u0 to u3 with attention everywhere; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = unet_config(channels=(32, 32), attention=attention, heads=2, token_width=8, sample_size=8)
        return new_unet(config).eval().requires_grad_(False)


class Watched:
    """A ConditionedUNet that notes how many samples, of which size, every call has."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.calls: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x.shape[0], *x.shape[2:]))
        return self.network(x, timestep, cond)


def small_denoiser(unet: Any = None) -> NetworkDenoiser:
    denoiser = network_denoiser(small_unet() if unet is None else unet, SCHEDULER_CONFIG)
    denoiser.network = Watched(denoiser.network)
    return denoiser


def noisy(batch: int = 2, height: int = 6, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed)) * 2.2


def words(seed: int, length: int = 3) -> Tensor:
    return torch.randn(1, length, 8, generator=torch.Generator().manual_seed(seed))
