"""Classifiers for the rules' tests: a small random network in float64, and recording wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.errors import UserError

LABELS = ("cat", "dog", "bird", "fish")


@dataclass(frozen=True)
class Config:
    labels: tuple[str, ...] = LABELS
    head: str = "classes"
    latent_channels: int = 4
    scaling_factor: float = 0.5
    shift_factor: float = 0.0
    log_snr_range: tuple[float, float] = (-12.0, 12.0)
    latent_space: str = "test"


class SmallClassifier:
    """A smooth random function of unit-variance x and log-SNR, per sample, for any height and width."""

    def __init__(self, config: Config | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.config = config or Config()
        generator = torch.Generator().manual_seed(7)
        outputs = 1 if self.config.head == "regression" else len(self.config.labels)
        self.network = nn.Sequential(
            nn.Conv2d(self.config.latent_channels + 1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, outputs, 3, padding=1)
        ).to(dtype)
        for parameter in self.network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3
        self.network.requires_grad_(False).eval()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def logits(self, x: Tensor, log_snr: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), log_snr.clone()))
        dtype = next(self.network.parameters()).dtype
        level = (log_snr / 10).to(dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.network(torch.cat([x.to(dtype), level], dim=1)).mean(dim=(2, 3)) * 8

    def with_config(self, **changes: object) -> SmallClassifier:
        return SmallClassifier(replace(self.config, **changes))


class SmallCLIP:
    """Unit vectors of unit-variance x at log-SNR, and of tokens (B, L, 6), by small smooth random functions."""

    def __init__(self, config: Config | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.config = config or Config()
        self.image = SmallClassifier(replace(self.config, labels=tuple("abcdefgh")), dtype)
        self.network = self.image.network
        self.text = drawn(6, 8, seed=3).to(dtype)
        self.logit_scale = torch.tensor(20.0, dtype=dtype)
        self.calls = self.image.calls

    def check_text(self, tokens: Tensor) -> None:
        if tokens.shape[-1] != len(self.text):
            raise UserError("tokens of another width", expected="6", mend="use the right text encoder")

    def text_features(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(torch.tanh(tokens.to(self.text) @ self.text).mean(dim=1), dim=1)

    def image_features(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return nn.functional.normalize(self.image.logits(x, log_snr), dim=1)

    def with_config(self, **changes: object) -> SmallCLIP:
        return SmallCLIP(replace(self.config, **changes))


class SmallPictureCLIP:
    """A smooth random function of pictures of 4 pixels, and texts by their bytes, as a CLIP on clean pictures."""

    image_size, mean, std = 4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self) -> None:
        self.network = nn.Linear(48, 8, dtype=torch.float64).requires_grad_(False)
        self.network.weight.data = drawn(8, 48, seed=9) / 10
        self.network.bias.data = drawn(8, seed=10) / 10
        self.read: list[list[str]] = []

    def image_features(self, pictures: Tensor) -> Tensor:
        return nn.functional.normalize(self.network(torch.tanh(pictures.flatten(1))), dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        self.read.append(list(texts))
        return nn.functional.normalize(torch.stack([drawn(8, seed=sum(text.encode())) for text in texts]), dim=1)


def prompt(seed: int = 0) -> list[list[Any]]:
    """A CONDITIONING of one encoded prompt, for SmallCLIP."""
    return [[drawn(1, 5, 6, seed=seed), {}]]


@pytest.fixture
def classifier() -> SmallClassifier:
    return SmallClassifier()


def latents(batch: int = 3, channels: int = 4, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


SHAPES = [(4, 6, 5), (1, 24, 40), (16, 3, 7), (4, 1, 1), (1, 1, 1), (4, 3, 6, 5)]
"""Shapes of one sample: of different channels and sizes, a single number, and a video's (C, T, H, W)."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
