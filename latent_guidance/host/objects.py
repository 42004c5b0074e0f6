"""What stands for ComfyUI's MODEL, CLIP, VAE, GUIDER, SAMPLER and NOISE where there is no ComfyUI.

Latents are handed between nodes as ``{"samples": (B, C, h, w)}``, unscaled and on the CPU; inside sampling x is scaled by the latent
space's factor. CONDITIONING is ``[[tokens (1, L, D), {"pooled_output": (1, P)}], …]``; several entries are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UserError
from ..guidance import Rule, check_chain, check_order
from ..guidance.latents import Latents
from ..guidance.record import Record
from ..noise import SeededNoise, batch_noise
from ..process import Process
from . import memory

if TYPE_CHECKING:
    from ..models.vae import VAE
    from ..schedules import Schedule

Conditioning = Sequence[Any]
Callback = Callable[[int, float, Tensor, Tensor], None]


@dataclass(frozen=True)
class LatentSpace:
    """The latents a MODEL works on. ``scaling_factor`` brings a VAE's latents to unit variance."""

    channels: int
    scaling_factor: float
    spatial_ratio: int
    name: str

    @property
    def latents(self) -> Latents:
        """What rules ask of them."""
        return Latents(self.name, self.channels, self.scaling_factor)


@dataclass(frozen=True)
class Model:
    """A MODEL: a denoiser of scaled latents, its noise schedule, and the guidance rules patched onto it.

    ``widest`` is the number of channels of the network's first stage, for the memory estimate. ``needs`` names the entries of a condition
    that the network takes, of "tokens" and "vector" (the pooled text).
    """

    denoiser: Denoiser
    schedule: Schedule
    latent_space: LatentSpace
    device: torch.device
    rules: tuple[Rule, ...] = ()
    widest: int = 0
    needs: tuple[str, ...] = ("tokens",)
    report: bool = False

    def with_rules(self, rules: Sequence[Rule], *, report: bool = False) -> Model:
        """The same model with ``rules`` after those it has; with ``report``, one whose runs keep theirs.

        Raises:
            UserError: rules that cannot act together or one after the other, or made for other latents.
        """
        self.check(rules)
        check_order(self.rules, rules)
        return replace(self, rules=(*self.rules, *rules), report=report or self.report)

    def check(self, rules: Sequence[Rule]) -> None:
        """Refuse rules that cannot act on this model together with those it has.

        Raises:
            UserError: from :func:`~latent_guidance.guidance.check_chain`, or for rules made for other latents.
        """
        check_chain((*self.rules, *rules))
        for rule in rules:
            rule.check_latents(self.latent_space.latents)


@dataclass(frozen=True)
class Clip:
    """A CLIP: ``encode(text) -> (tokens (1, L, D), pooled (1, P) or None)``."""

    encode: Callable[[str], tuple[Tensor, Tensor | None]]

    def conditioning(self, text: str) -> list[Any]:
        """CONDITIONING of ``text``, on the CPU."""
        tokens, pooled = self.encode(text)
        return [[tokens.cpu(), {} if pooled is None else {"pooled_output": pooled.cpu()}]]


@dataclass(frozen=True)
class Vae:
    """A VAE. ``widest`` is the number of channels at full size, for the memory estimate."""

    autoencoder: VAE
    latent_space: LatentSpace
    device: torch.device
    widest: int = 0

    def encode(self, image: Tensor, *, sample: bool = False, seed: int = 0) -> Tensor:
        """Unscaled latents (B, C, h, w) of ``image`` (B, H, W, 3 or more) in [0, 1].

        With ``sample``, item i is drawn from the posterior with seed + i (modulo 2**64); else its mode.

        Raises:
            UserError: a size that the VAE cannot divide (see :meth:`cropped`).
        """
        count, height, width = image.shape[:3]
        memory.check_pictures(count, width, height, self.widest, self.device)
        latents = []
        for index, picture in enumerate(image[..., :3]):
            pixels = (picture.movedim(-1, 0)[None] * 2 - 1).to(self.device)
            generator = torch.Generator().manual_seed((seed + index) % 2**64) if sample else None
            latents.append(self.autoencoder.encode(pixels, sample=sample, generator=generator).float().cpu())
        return torch.cat(latents)

    def cropped(self, image: Tensor) -> Tensor:
        """``image`` (B, H, W, C) cut around the middle to sizes that the VAE can divide, as ComfyUI does.

        Raises:
            UserError: a picture smaller than one latent.
        """
        ratio = self.latent_space.spatial_ratio
        height, width = image.shape[1:3]
        if height < ratio or width < ratio:
            raise UserError(
                f"a picture of {width}x{height}",
                expected=f"at least {ratio}x{ratio} for this VAE",
                mend="use a larger picture",
            )
        top, left = height % ratio // 2, width % ratio // 2
        return image[:, top : top + height // ratio * ratio, left : left + width // ratio * ratio]

    def decode(self, samples: Tensor) -> Tensor:
        """IMAGE (B, H, W, 3) in [0, 1] of unscaled latents (B, C, h, w), one picture at a time.

        Raises:
            UserError: latents of another number of channels, or pictures that cannot fit in memory.
        """
        space = self.latent_space
        if samples.shape[1] != space.channels:
            raise UserError(
                f"latents of {samples.shape[1]} channels for a VAE of {space.channels}",
                expected=f"latents of {space.channels} channels, made for {space.name}",
                mend="use the VAE of the checkpoint that made the latents",
            )
        height, width = (size * space.spatial_ratio for size in samples.shape[-2:])
        memory.check_pictures(len(samples), width, height, self.widest, self.device)
        pictures = []
        for latent in samples:
            pictures.append(self.autoencoder.decode(latent[None].to(self.device)).float().cpu())
        return ((torch.cat(pictures) + 1) / 2).clamp(0, 1).movedim(1, -1)


@dataclass(frozen=True)
class Noise:
    """A NOISE. With ``seeds`` item i depends on seeds[i] alone; else it is ComfyUI's, one draw for the whole batch."""

    seed: int
    seeds: tuple[int, ...] | None = None

    def generate(self, latent: Mapping[str, Tensor]) -> Tensor:
        """Unit Gaussian noise of the shape of ``latent["samples"]``, on the CPU.

        Raises:
            UserError: another number of pictures than seeds.
        """
        shape = tuple(latent["samples"].shape)
        if self.seeds is None:
            return batch_noise(shape, self.seed)
        return SeededNoise(self.step_seeds(shape[0])).initial(shape)

    def step_seeds(self, batch: int) -> list[int]:
        """The seeds for the noise of a sampler's steps, one per item."""
        if self.seeds is None:
            return [(self.seed + item) % 2**64 for item in range(batch)]
        if batch != len(self.seeds):
            raise UserError(
                f"noise for {len(self.seeds)} pictures and a latent of {batch}",
                expected="one seed for every picture",
                mend=f"set batch_size of Seeded Noise to {batch}",
            )
        return list(self.seeds)


@dataclass(frozen=True)
class Sampler:
    """A SAMPLER: a library ``sample_*`` function, its options, and rules that act inside its step.

    ``noise`` makes the noise of the steps, ``noise(x, sigmas, NOISE) -> noise sampler``; None for samplers that add none.
    ``step_options(process, sigmas, record)`` makes the options that ``step_rules`` come to. ``levels(sigmas, schedule)`` makes the levels
    that the function itself goes through, where they are not those at which the run starts and its noise is laid out.
    """

    function: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    step_rules: tuple[Any, ...] = ()
    noise: Callable[[Tensor, Tensor, Noise], Any] | None = None
    step_options: Callable[[Process, Tensor, Record | None], Mapping[str, Any]] | None = None
    levels: Callable[[Tensor, Schedule], Tensor] | None = None


@dataclass(frozen=True)
class GuiderNode:
    """A GUIDER: a model, its conditions and the rules of this guider, which act before those patched onto the model.

    ``cfg`` is the scale that a stock guider brings; a rule that combines the branches replaces it. With ``report`` every run keeps
    its report, as it does if the model says so.
    """

    model: Model
    positive: Conditioning
    negative: Conditioning | None = None
    rules: tuple[Rule, ...] = ()
    cfg: float = 1.0
    report: bool = False

    @property
    def chain(self) -> tuple[Rule, ...]:
        return (*self.rules, *self.model.rules)
