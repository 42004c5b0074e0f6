"""Changes of attention as descriptions: which layers are meant, and what blurring and shuffling do to tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from latent_guidance.attention import AttentionPatch, blurred, gaussian_kernel, permutation, select_layers, shuffled
from latent_guidance.errors import UserError

UNET = ["d0", "d1", "d2", "m0", "u0", "u1", "u2", "u3"]
FLUX = ["0", "1", "2", "3", "s0", "s1", "s2"]


@pytest.mark.parametrize(
    ("layers", "available", "expected"),
    [
        ("middle", UNET, ["m0"]),
        ("down", UNET, ["d0", "d1", "d2"]),
        (" UP , m0", UNET, ["m0", "u0", "u1", "u2", "u3"]),
        ("all", UNET, UNET),
        ("u2, d1-d2", UNET, ["d1", "d2", "u2"]),
        ("d1-2", UNET, ["d1", "d2"]),
        ("middle", FLUX, ["3"]),
        ("middle", FLUX[:4], ["1", "2"]),
        ("1 - 2, s0", FLUX, ["1", "2", "s0"]),
        ("all", FLUX, FLUX),
    ],
)
def test_layers_by_group_by_name_and_by_range(layers: str, available: list[str], expected: list[str]) -> None:
    assert select_layers(layers, available) == expected


@pytest.mark.parametrize("layers", ["", "left", "d", "d3-d1", "d1-u2", "1.5", "d1,,d2", "d" + "9" * 5000, "d0-d99999"])
def test_what_is_no_layer_is_refused(layers: str) -> None:
    with pytest.raises(UserError, match="middle, down, up or all"):
        select_layers(layers, UNET)


@pytest.mark.parametrize(
    ("layers", "available"),
    [("d3", UNET), ("d1-d3", UNET), ("7", UNET), ("down", FLUX), ("s3", FLUX), ("up", ["m0"]), ("middle", ["d0"])],
)
def test_layers_that_a_model_has_not_got_are_refused_with_those_it_has(layers: str, available: list[str]) -> None:
    with pytest.raises(UserError, match="that has not got them") as error:
        select_layers(f"all, {layers}", available)
    text = str(error.value)
    assert ("d0 to d2, m0, u0 to u3" in text) == (available is UNET) and ("0 to 3, s0 to s2" in text) == (
        available is FLUX
    )


def seg_blur(picture: Tensor, sigma: float) -> Tensor:
    """The blur of a square picture (B, C, H, H) as SEG's paper has it, in two dimensions at once."""
    side = picture.shape[-1]
    size = min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side - (side % 2 - 1))
    x = torch.linspace(-(size - 1) / 2, (size - 1) / 2, size, dtype=picture.dtype)
    line = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = functional.pad(picture, [size // 2] * 4, mode="reflect")
    return functional.conv2d(padded, kernel.expand(picture.shape[1], 1, size, size), groups=picture.shape[1])


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_a_square_blur_is_the_papers(sigma: float, side: int) -> None:
    tokens = torch.randn(2, side * side, 3, dtype=torch.float64)
    picture = tokens.movedim(1, -1).reshape(2, 3, side, side)
    expected = seg_blur(picture, sigma).reshape(2, 3, -1).movedim(-1, 1)
    torch.testing.assert_close(blurred(tokens, side, side, sigma), expected, rtol=1e-12, atol=1e-12)


def test_a_blur_of_pictures_that_are_not_square_mirrors_each_side_by_itself() -> None:
    """The authors' code takes the height for both sides, and every latent for square."""
    tokens = torch.randn(2, 4 * 12, 3, dtype=torch.float64)
    picture = tokens.reshape(2, 4, 12, 3)
    rows, columns = (torch.zeros(n, n, dtype=torch.float64) for n in (4, 12))
    for matrix in (rows, columns):
        kernel = gaussian_kernel(1.5, len(matrix)).tolist()
        for i in range(len(matrix)):
            for offset, weight in enumerate(kernel, -(len(kernel) // 2)):
                place = abs(i + offset)
                matrix[i, min(place, 2 * (len(matrix) - 1) - place)] += weight
    expected = torch.einsum("ij,kl,bjlc->bikc", rows, columns, picture).reshape(2, 48, 3)
    torch.testing.assert_close(blurred(tokens, 4, 12, 1.5), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(blurred(tokens, 12, 4, 1.5), expected, atol=1e-3)


def test_no_blur_and_a_blur_without_limit() -> None:
    tokens = torch.randn(2, 30, 3, dtype=torch.float64)
    assert torch.equal(blurred(tokens, 5, 6, 0.0), tokens)
    torch.testing.assert_close(blurred(tokens, 5, 6, math.inf), tokens.mean(1, keepdim=True).expand(2, 30, 3))
    assert blurred(tokens.half(), 5, 6, 2.0).dtype == torch.float16
    assert torch.isfinite(blurred(tokens, 5, 6, 1000.0)).all() and torch.isfinite(blurred(tokens, 5, 6, 0.01)).all()


def test_permutations_differ_by_seed_step_and_layer_and_by_nothing_else() -> None:
    patch = AttentionPatch("shuffle")
    order = permutation(64, patch, "d0")
    assert sorted(order.tolist()) == list(range(64))
    torch.manual_seed(5)  # torch's global generator has no say
    assert torch.equal(permutation(64, AttentionPatch("shuffle", "all"), "d0"), order)
    others = [(AttentionPatch("shuffle", seed=1), "d0"), (AttentionPatch("shuffle", step=1), "d0"), (patch, "d1")]
    assert all(not torch.equal(permutation(64, *other), order) for other in others)
    tokens = torch.randn(3, 64, 2)
    mixed = shuffled(tokens, patch, "d0")
    assert torch.equal(mixed, tokens[:, order]) and torch.equal(shuffled(tokens[1:2], patch, "d0"), mixed[1:2])
