"""Sliding windows: they cover a picture up to its borders, and what comes of them is averaged where they overlap."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.windows import Windows


def test_the_papers_windows() -> None:
    """2 x 2 windows of 40 on a latent of 64: a stride of 24."""
    boxes = Windows(0.625, 2).boxes(64, 64)
    assert boxes == [(0, 0, 40, 40), (0, 24, 40, 40), (24, 0, 40, 40), (24, 24, 40, 40)]


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("size", [0.5, 0.625, 0.9, 1.0, None])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (63, 17), (7, 3), (1, 1)])
def test_every_place_is_covered(height: int, width: int, size: float | None, count: int) -> None:
    """A stride that is rounded down, as in the authors' code, stops short of the border and divides by zero there."""
    windows = Windows(1 / count if size is None else size, count)
    covered = windows.covered(height, width)
    assert covered.shape == (height, width) and covered.min() >= 1 and covered.max() <= count**2
    top, left, tall, wide = windows.boxes(height, width)[-1]
    assert (top + tall, left + wide) == (height, width)


def test_a_stride_that_is_rounded_down_leaves_a_gap() -> None:
    side, crop, steps = 64, 41, 3
    assert (side - crop) // (steps - 1) * (steps - 1) + crop < side
    assert Windows(crop / side, steps).boxes(side, side)[-1] == (23, 23, 41, 41)


@pytest.mark.parametrize("shape", [(2, 4, 9, 14), (1, 3, 5, 8, 8)])
def test_crops_and_their_join(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    windows = Windows(0.6, 3)
    crops = windows.crops(x)
    boxes = windows.boxes(*shape[-2:])
    assert crops.shape == (9 * shape[0], *shape[1:-2], *boxes[0][2:])
    top, left, height, width = boxes[5]
    assert torch.equal(crops[5 * shape[0] : 6 * shape[0]], x[..., top : top + height, left : left + width])
    torch.testing.assert_close(windows.joined(crops, *shape[-2:]), x, rtol=1e-14, atol=1e-14)
    means = crops.flatten(1).mean(1).reshape(-1, *[1] * (len(shape) - 1)).expand_as(crops)
    joined = windows.joined(means, *shape[-2:])
    at = [i for i, (t, s, h, w) in enumerate(boxes) if t <= 4 < t + h and s <= 6 < s + w]
    expected = means.reshape(9, shape[0], -1)[at, :, 0].mean(0)
    torch.testing.assert_close(joined.reshape(shape[0], -1, *shape[-2:])[:, 0, 4, 6], expected)
    assert len(at) > 1


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(UserError, match="sliding windows over a latent"):
        Windows(0.5, 2).crops(torch.zeros(2, 3))
