"""From a model's latents to the pictures that losses look at, with a bounded cost.

What a VAE decodes costs most of the time and memory of guidance by a picture. Pictures of a batch are decoded one at a time and decoded
again for the gradient, so that memory is that of one picture; latents can be made smaller before they are decoded.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError


class Decoder(Protocol):
    """A VAE as rules see it; :class:`latent_guidance.models.VAE` is one, and so is what a host makes of its own.

    ``scaling_factor`` brings its latents to unit variance; None where only the model knows.
    """

    network: nn.Module | None
    scaling_factor: float | None

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of unscaled latents (B, C, h, w); gradients flow. Not clamped if ``clamp`` is False."""
        ...


def resized_latents(latents: Tensor, factor: float) -> Tensor:
    """(B, C, h, w) made ``factor`` times as large, at least one across; as they are at factor 1."""
    size = [max(1, round(side * factor)) for side in latents.shape[-2:]]
    if size == list(latents.shape[-2:]):
        return latents
    return nn.functional.interpolate(latents, size=size, mode="bilinear", antialias=True)


def check_pictures(shape: tuple[int, ...]) -> None:
    """Raise UserError unless latents of ``shape`` are those of pictures, (B, C, h, w)."""
    if len(shape) != 4:
        raise UserError(
            f"latents of shape {shape} for a loss on pictures",
            expected="latents of pictures, (batch, channels, height, width)",
            mend="use a loss in the space of latents, or a model of pictures",
        )


def pictures(decoder: Any, latents: Tensor, *, decode_at: float = 1.0) -> Tensor:
    """What ``decoder`` makes of unscaled latents (B, C, h, w): (B, 3, H, W), about [-1, 1] and not clamped, so that no gradient is cut.

    Args:
        decoder: a :class:`Decoder`.
        latents: attached to a graph or not.
        decode_at: by how much to resize the latents first, in (0, 1]; the cost falls with its square.

    Raises:
        UserError: latents that are not those of pictures.
    """
    check_pictures(tuple(latents.shape))
    small = resized_latents(latents, decode_at)
    if len(small) == 1 or not torch.is_grad_enabled():
        return torch.cat([decoder.decode(one, clamp=False).to(latents.dtype) for one in small.split(1)])
    from torch.utils.checkpoint import checkpoint

    rows = [checkpoint(_one, decoder, one, use_reentrant=False, preserve_rng_state=False) for one in small.split(1)]
    return torch.cat([row.to(latents.dtype) for row in rows])


def _one(decoder: Any, latent: Tensor) -> Tensor:
    return decoder.decode(latent, clamp=False)
