"""From a model's latents to the pictures that losses look at, with a bounded cost.

What a VAE decodes costs most of the time and memory of guidance by a picture. Pictures of a batch are decoded one at a time and decoded
again for the gradient, so that memory is that of one picture, or of one tile of it where latents are decoded in tiles; and they can be made
smaller before they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
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


def resized(sides: Sequence[int], factor: float) -> list[int]:
    """Sides made ``factor`` times as long, at least one."""
    return [max(1, round(side * factor)) for side in sides]


def resized_latents(latents: Tensor, factor: float) -> Tensor:
    """(B, C, h, w) made ``factor`` times as large, at least one across; as they are at factor 1."""
    size = resized(latents.shape[-2:], factor)
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


def pictures(decoder: Any, latents: Tensor, *, decode_at: float = 1.0, tile: int = 0) -> Tensor:
    """What ``decoder`` makes of unscaled latents (B, C, h, w): (B, 3, H, W), about [-1, 1] and not clamped, so that no gradient is cut.

    Args:
        decoder: a :class:`Decoder`.
        latents: attached to a graph or not.
        decode_at: by how much to resize the latents first, in (0, 1]; the cost falls with its square.
        tile: latents longer than this on a side are decoded in overlapping tiles; 0 for never.

    Raises:
        UserError: latents that are not those of pictures.
    """
    check_pictures(tuple(latents.shape))
    small = resized_latents(latents, decode_at)
    tiled = 0 < tile < max(small.shape[-2:])
    if torch.is_grad_enabled() and (tiled or len(small) > 1):
        from torch.utils.checkpoint import checkpoint

        decode = partial(checkpoint, _decoded, decoder, use_reentrant=False, preserve_rng_state=False)
    else:
        decode = partial(_decoded, decoder)
    rows = [_in_tiles(decode, one, tile) if tiled else decode(one) for one in small.split(1)]
    return torch.cat([row.to(latents.dtype) for row in rows])


def _decoded(decoder: Any, latent: Tensor) -> Tensor:
    return decoder.decode(latent, clamp=False)


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles of ``tile`` latent pixels begin that cover ``length``, evenly, neighbours sharing at least a quarter of one."""
    if length <= tile:
        return [0]
    shared = tile // 4
    count = math.ceil((length - shared) / (tile - shared))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, rise: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise over the first and fall over the last ``rise`` pixels, above 0 and at most 1.

    In the dtype of ``like``, which has to count to ``length`` in halves: float32 or wider.
    """
    place = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(place, length - place) / max(rise, 1)).clamp(max=1)


def _in_tiles(decode: Callable[[Tensor], Tensor], latent: Tensor, tile: int) -> Tensor:
    """The picture (1, 3, H, W) of a latent (1, C, h, w), decoded in tiles that fade into one another; float32 or wider."""
    height, width = latent.shape[-2:]
    picture = weights = None
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            piece = decode(latent[..., top : top + tile, left : left + tile])
            piece = piece.to(torch.promote_types(piece.dtype, torch.float32))  # where bfloat16 counts no pixels
            scale = piece.shape[-1] // min(tile, width)
            rise = scale * (tile // 4)
            weight = _ramp(piece.shape[-2], rise, piece)[:, None] * _ramp(piece.shape[-1], rise, piece)
            below, right = (
                scale * height - scale * top - piece.shape[-2],
                scale * width - scale * left - piece.shape[-1],
            )
            around = (scale * left, right, scale * top, below)
            placed, weight = (nn.functional.pad(each, around) for each in (piece * weight, weight))
            picture = placed if picture is None else picture + placed
            weights = weight if weights is None else weights + weight
    assert picture is not None and weights is not None
    return picture / weights
