"""Windows that slide over a picture: its crops, and the picture that is made of what came of each.

Reference: arXiv 2411.10257: N crops of fixed size at a fixed stride, put back where they were and averaged where they overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Windows:
    """``count`` x ``count`` windows, each of ``size`` of the height and of the width, spread evenly from border to border.

    Attributes:
        size: share of each side, in (0, 1].
        count: windows along each side, at least 2 and enough to leave no gap.
    """

    size: float
    count: int

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """(top, left, height, width) of every window on a picture of height x width, row by row."""
        rows, columns = (self._places(length) for length in (height, width))
        return [(top, left, tall, wide) for top, tall in rows for left, wide in columns]

    def _places(self, length: int) -> list[tuple[int, int]]:
        """(start, size) along one side; the last window ends at the border."""
        size = min(length, math.ceil(self.size * length - 1e-9))
        room, gaps = length - size, self.count - 1
        return [(room * i // gaps, size) for i in range(self.count)]

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError unless ``shape`` has height and width: (B, ..., H, W)."""
        if len(shape) < 4:
            raise UserError(
                f"sliding windows over a latent of shape {shape}",
                expected="latents of pictures or videos, (B, C, H, W) or (B, C, T, H, W)",
                mend="take Sliding Window Guidance out of the chain",
            )

    def crops(self, x: Tensor) -> Tensor:
        """What is in each window of x (B, ..., H, W), (N * B, ..., h, w), window by window.

        Raises:
            UserError: x without height and width.
        """
        self.check_shape(tuple(x.shape))
        return torch.cat([x[..., t : t + h, s : s + w] for t, s, h, w in self.boxes(x.shape[-2], x.shape[-1])])

    def joined(self, parts: Tensor, height: int, width: int) -> Tensor:
        """The picture (B, ..., height, width) of ``parts`` (N * B, ..., h, w), the mean of the windows at every place."""
        boxes = self.boxes(height, width)
        chunks = parts.chunk(len(boxes))
        total = parts.new_zeros(*chunks[0].shape[:-2], height, width)
        for part, (t, s, h, w) in zip(chunks, boxes, strict=True):
            total[..., t : t + h, s : s + w] += part
        return total / self.covered(height, width).to(total)

    def covered(self, height: int, width: int) -> Tensor:
        """By how many windows each place of a picture is covered, (height, width), at least 1."""
        count = torch.zeros(height, width)
        for t, s, h, w in self.boxes(height, width):
            count[t : t + h, s : s + w] += 1
        return count
