"""What all networks on noisy latents share: the description of the latents, and the tower that reads them.

The tower is the encoder half of a small UNet: residual blocks with AdaGN on an embedding of the log-SNR, and an attention pool
after the second level. It sees x at *unit variance*, ``x / sqrt(alpha**2 + sigma**2)``, and ``log(alpha**2 / sigma**2)``, so one
network serves eps-, v- and flow-models on the same latents. Any latent size goes in.

Reference: arXiv 2105.05233, section 4 (the down-sampling half of the UNet with an attention pool).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError, shown
from .configs import is_number, is_whole, smallest_side, too_small

MAX_CHANNELS = 8192

Config = TypeVar("Config", bound="TowerConfig")
Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what is expected in words."""


def is_pair(value: object, fits: Callable[[Any], bool]) -> bool:
    """Whether ``value`` is a tuple of two that both fit."""
    return isinstance(value, tuple) and len(value) == 2 and all(map(fits, value))


MAX_NAME = 200
"""Characters of a name in a config at most: it is drawn into pictures and shown in menus."""


def is_name(value: object) -> bool:
    """Whether ``value`` is a text with something in it, of at most ``MAX_NAME`` characters."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_NAME


def whole(low: int, high: int) -> Check:
    """The check for a whole number from ``low`` to ``high``."""
    return (lambda value: is_whole(value, low, high)), f"a whole number from {low} to {high}"


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What a network on noisy latents is, and what it was trained on.

    Attributes:
        latent_space: Name of the latents it was trained on.
        latent_channels: Their channels.
        scaling_factor: What the VAE's latents were multiplied by.
        shift_factor: What was subtracted from them before (Stable Diffusion 3 and Flux; 0 for most).
        log_snr_range: Smallest and largest log(alpha**2 / sigma**2) of its training.
        channels: Of the two levels, multiples of 32.
        layers: Residual blocks of the two levels.
        heads: Attention heads of the pool.
        grid: Side of the pool's table of positions, which is interpolated to other sizes.
    """

    what: ClassVar[str] = "network"
    """What errors call it."""
    checks: ClassVar[Mapping[str, Check]] = {
        "latent_space": (is_name, f"the name of the latents, of at most {MAX_NAME} characters"),
        "latent_channels": whole(1, MAX_CHANNELS),
        "scaling_factor": (lambda value: is_number(value) and 0 < value <= 1e6, "a number above 0, at most 1000000"),
        "shift_factor": (lambda value: is_number(value) and abs(value) <= 1e6, "a number, mostly 0"),
        "log_snr_range": (
            lambda value: is_pair(value, is_number) and value[0] < value[1],
            "two finite numbers, low and high",
        ),
        "channels": (
            lambda value: is_pair(value, lambda count: is_whole(count, 32, MAX_CHANNELS) and count % 32 == 0),
            f"two multiples of 32, at most {MAX_CHANNELS}",
        ),
        "layers": (
            lambda value: is_pair(value, lambda count: is_whole(count, 1, 64)),
            "two whole numbers from 1 to 64",
        ),
        "heads": whole(1, MAX_CHANNELS),
        "grid": whole(1, 256),
    }

    latent_space: str
    latent_channels: int
    scaling_factor: float
    log_snr_range: tuple[float, float]
    channels: tuple[int, int] = (64, 128)
    layers: tuple[int, int] = (1, 1)
    heads: int = 4
    grid: int = 8
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        for name, (fits, expected) in self.checks.items():
            value = getattr(self, name)
            if not fits(value):
                raise UserError(
                    f"A {self.what}'s config whose {name} is {shown(value)}",
                    expected=expected,
                    mend=f"correct the {self.what}'s config.json, or use a {self.what} that this library wrote",
                )
        if self.channels[1] % self.heads:
            raise UserError(
                f"A {self.what}'s config with {self.heads} heads for {self.channels[1]} channels",
                expected="heads that divide the second level's channels",
                mend=f"correct heads in the {self.what}'s config.json",
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls: type[Config], value: object) -> Config:
        """The config from :meth:`to_json`'s values, a mapping.

        Raises:
            UserError: A field is missing, unknown, or of the wrong kind.
        """
        if not isinstance(value, Mapping):
            raise UserError(
                f"A {cls.what}'s config that is a {type(value).__name__}",
                expected="an object with its fields",
                mend=f"use a {cls.what} that this library wrote",
            )
        fields: dict[str, Any] = {
            name: tuple(field) if isinstance(field, list) else field
            for name, field in value.items()
            if not str(name).startswith("_")
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise UserError(
                f"The {cls.what}'s config has the fields {', '.join(sorted(fields))} ({error})",
                expected=f"the fields {', '.join(cls.__dataclass_fields__)}",
                mend=f"use a {cls.what} that this library wrote",
            ) from error


class NoisyLatentTower(nn.Module):
    """The tower; see the module's docstring.

    Args:
        config: Its shape.
    """

    def __init__(self, config: TowerConfig) -> None:
        from diffusers.models.resnet import Downsample2D, ResnetBlock2D

        super().__init__()
        self.smallest = smallest_side(config.channels, 32)
        first, second = config.channels
        width = 2 * second
        self.level = LogSNREmbedding(width)
        self.conv_in = nn.Conv2d(config.latent_channels, first, 3, padding=1)

        def blocks(count: int, before: int, after: int) -> list[nn.Module]:
            return [
                ResnetBlock2D(
                    in_channels=before if number == 0 else after,
                    out_channels=after,
                    temb_channels=width,
                    groups=32,
                    eps=1e-5,
                    time_embedding_norm="scale_shift",
                )
                for number in range(count)
            ]

        down = Downsample2D(first, use_conv=True, out_channels=second, padding=1, name="op")
        self.blocks = nn.ModuleList(
            [*blocks(config.layers[0], first, first), down, *blocks(config.layers[1], second, second)]
        )
        self.norm = nn.GroupNorm(32, second)
        self.pool = AttentionPool(second, heads=config.heads, grid=config.grid)

    def pooled(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """What the tower sees, (B, channels[1]).

        Args:
            x: (B, latent_channels, H, W) at unit variance; H and W at least :attr:`smallest`.
            log_snr: (B,) log(alpha**2 / sigma**2).
        """
        level = functional.silu(self.level(log_snr))
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h) if type(block).__name__ == "Downsample2D" else block(h, level)
        return self.pool(functional.silu(self.norm(h)))

    def trial(self, x: Tensor, log_snr: Tensor) -> None:
        """Run every part once; whoever loads a file does this without memory, to find out whether its shapes fit."""
        self.pooled(x, log_snr)


def check_unit_latents(x: Tensor, config: TowerConfig, smallest: int) -> None:
    """Refuse latents that a network was not made for.

    Raises:
        UserError: x (B, C, H, W) has another number of channels, or is too small.
    """
    if x.ndim != 4 or x.shape[1] != config.latent_channels:
        raise UserError(
            f"A {config.what} of {config.latent_space!r} latents was given x of shape {tuple(x.shape)}",
            expected=f"(B, {config.latent_channels}, H, W)",
            mend=f"use a {config.what} that was trained on this model's latents",
        )
    if min(x.shape[-2:]) < smallest:
        raise too_small(config.what, x.shape[-2], x.shape[-1], smallest)


class LogSNREmbedding(nn.Module):
    """log-SNR (B,) -> (B, width): sines and cosines at fixed frequencies, then two linear layers."""

    def __init__(self, width: int, *, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(2 * frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, log_snr: Tensor) -> Tensor:
        powers = torch.linspace(math.log(0.05), math.log(3.0), self.frequencies, device=log_snr.device)
        angles = log_snr.float()[:, None] * powers.exp()
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(features)))


class AttentionPool(nn.Module):
    """(B, C, h, w) -> (B, C): the mean attends once to all places, as in CLIP's image tower.

    Places have a learned table of positions of ``grid`` x ``grid``, interpolated to h x w.
    Reference: arXiv 2103.00020, section 2.4.
    """

    def __init__(self, channels: int, *, heads: int, grid: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(1, channels, grid, grid) * channels**-0.5)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        positions = self.positions
        if h.shape[-2:] != positions.shape[-2:]:
            positions = functional.interpolate(positions, size=h.shape[-2:], mode="bilinear", align_corners=False)
        mean = h.mean((2, 3), keepdim=True).flatten(2)
        tokens = torch.cat([mean, (h + positions).flatten(2)], dim=2).transpose(1, 2)
        batch, _, channels = tokens.shape

        def by_head(value: Tensor) -> Tensor:
            return value.reshape(batch, -1, self.heads, channels // self.heads).transpose(1, 2)

        key, value = self.key_value(tokens).chunk(2, dim=2)
        attended = functional.scaled_dot_product_attention(
            by_head(self.query(tokens[:, :1])), by_head(key), by_head(value)
        )
        return self.out(attended.transpose(1, 2).reshape(batch, channels))
