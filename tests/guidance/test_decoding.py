"""Decoding for a loss: in tiles, whose pictures and gradients are those of the whole, with the memory of one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.errors import UserError
from latent_guidance.guidance import MPGD
from latent_guidance.guidance.decoding import pictures, tile_starts

from .conftest import drawn
from .denoisers import Towards

SIZES = [(40, 24), (24, 40), (16, 50), (33, 33), (100, 17)]


class Upscaler:
    """A decoder to twice the size that looks ``reach`` latent pixels around; it notes the sizes it is given."""

    network: nn.Module | None = None
    scaling_factor = 1.0

    def __init__(self, reach: int = 0) -> None:
        side = 2 * reach + 1
        self.mixing = drawn(3, 4, side, side, seed=3) / side
        self.reach, self.sizes = reach, list[tuple[int, ...]]()

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        self.sizes.append(tuple(latent.shape[-2:]))
        mixed = nn.functional.conv2d(latent, self.mixing, padding=self.reach)
        return nn.functional.interpolate(torch.tanh(mixed), scale_factor=2.0, mode="nearest")


def of_whole_and_tiles(decoder: Upscaler, size: tuple[int, int], tile: int = 16) -> tuple[list[Tensor], list[Tensor]]:
    """[pictures, gradient] without and with tiles."""
    found: list[list[Tensor]] = []
    for limit in (0, tile):
        leaf = drawn(2, 4, *size).requires_grad_()
        seen = pictures(decoder, leaf, tile=limit)
        (gradient,) = torch.autograd.grad((seen * drawn(*seen.shape, seed=9)).sum(), leaf)
        found.append([seen.detach(), gradient])
    return found[0], found[1]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_a_decoder_that_looks_at_one_place_are_the_whole(size: tuple[int, int]) -> None:
    decoder = Upscaler()
    whole, tiled = of_whole_and_tiles(decoder, size)
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert max(max(size) for size in decoder.sizes[4:]) == 16, decoder.sizes


def test_tiles_fade_into_one_another_where_the_decoder_looks_around() -> None:
    decoder = Upscaler(reach=2)
    whole, tiled = of_whole_and_tiles(decoder, (40, 40))
    differ = (whole[0] - tiled[0]).abs().amax(dim=(0, 1))
    assert bool((differ[:8, :8] < 1e-12).all()), "far from every edge of a tile nothing is another"
    assert 0 < float(differ.max()) < 1
    steps = (tiled[0] - whole[0]).diff(dim=-1).abs().amax()  # a seam would be a step as high as the difference itself
    hard = torch.cat([decoder.decode(piece) for piece in drawn(2, 4, 40, 40).split(20, dim=-1)], dim=-1)
    assert steps < 0.5 * (hard - whole[0]).diff(dim=-1).abs().amax()


def test_tiles_in_bfloat16_reach_the_far_borders() -> None:
    """bfloat16 counts to 256: by it the last pixels of a long tile would have no weight, and 0 / 0 would stand there."""

    class HalfPrecision(Upscaler):
        def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
            return super().decode(latent.double(), clamp=clamp).to(torch.bfloat16)

    leaf = drawn(1, 4, 300, 272).float().requires_grad_()
    tiled = pictures(HalfPrecision(), leaf, tile=256)
    whole = pictures(HalfPrecision(), leaf)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(tiled.sum(), leaf)
    assert bool(torch.isfinite(gradient).all())
    latent = drawn(1, 4, 300, 272).to(torch.bfloat16)
    decoder = Upscaler()
    decoder.mixing = decoder.mixing.to(torch.bfloat16)
    assert torch.equal(pictures(decoder, latent, tile=256), pictures(decoder, latent)), "latents of that dtype too"


def test_memory_is_that_of_one_tile() -> None:
    """What autograd keeps at once, counted: the whole picture's activations, or hardly more than a tile's."""

    def most(tile: int) -> int:
        kept, at_most = 0, 0
        decoder, leaf = Upscaler(), drawn(1, 4, 64, 64).requires_grad_()

        def decode(latent: Tensor, *, clamp: bool = True) -> Tensor:
            nonlocal kept, at_most
            here = 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal here
                here += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = Upscaler.decode(decoder, latent, clamp=clamp)
            at_most = max(at_most, here)
            return result

        decoder.decode = decode
        torch.autograd.grad(pictures(decoder, leaf, tile=tile).sum(), leaf)
        return at_most

    assert most(16) * 8 < most(0)


def test_latents_that_fit_are_decoded_as_they_are() -> None:
    decoder = Upscaler(reach=2)
    whole, tiled = of_whole_and_tiles(decoder, (16, 9))
    assert all(torch.equal(one, other) for one, other in zip(whole, tiled, strict=True))
    pictures(decoder, drawn(1, 4, 64, 64), tile=16, decode_at=0.25)
    assert decoder.sizes[-1] == (16, 16), "the size after decode_at counts"


@pytest.mark.parametrize(("length", "tile"), [(17, 16), (64, 16), (65, 64), (128, 64), (1000, 64), (5, 64)])
def test_tiles_cover_every_place_and_share_a_quarter(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    assert starts[0] == 0 and starts[-1] == max(length - tile, 0)
    assert all(later - earlier <= tile - tile // 4 for earlier, later in pairwise(starts))
    assert len(starts) <= 1 + -(-length // (tile - tile // 4))


def test_a_tile_too_small_to_be_of_use_is_refused() -> None:
    with pytest.raises(UserError, match=r"decode_tile = 15 in .*0, or at least 16"):
        MPGD(loss=Towards(), decode_tile=15)
    MPGD(loss=Towards(), decode_tile=16)
