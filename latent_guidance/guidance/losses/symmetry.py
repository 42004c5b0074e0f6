r"""Symmetry: the picture is pulled towards its own mirror image.

    loss(D) = 1/8 sum (D - M D)^2

with M the mirror. At scale 1 a step along its gradient gives exactly the mean of D and its mirror image.

Reference: arXiv 2409.15761 (training-free guidance by an equivariance of the picture); the loss itself is the plain squared difference.
Space: the model's latents, whose layout is that of the picture, or decoded pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..base import NodeText
from ..knobs import Choice
from .base import ReadyLoss, sum_over

_FLIPPED = {"left and right": (-1,), "top and bottom": (-2,), "half turn": (-2, -1)}


@dataclass(frozen=True, kw_only=True)
class Symmetry(ReadyLoss):
    space: ClassVar[str] = "picture"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossSymmetry",
        name="Loss: Symmetry",
        name_zh="损失：对称",
        description="Makes the picture symmetric: a mirror image of itself, or the same after half a turn.",
        description_zh="使画面对称：左右或上下镜像，或旋转半圈后不变。",
        search_aliases=("loss", "symmetry", "symmetric", "mirror", "flip", "rotation"),
    )

    kind: Annotated[
        str,
        Choice(
            options=tuple(_FLIPPED),
            label_zh="对称方式",
            help="What the picture is to look the same under: a mirror from left to right, from top to bottom, or half a turn.",
            help_zh="画面在何种变换下保持不变：左右镜像、上下镜像或旋转半圈。",
        ),
    ] = "left and right"

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,) of pictures or latents (B, ..., H, W)."""
        return sum_over((estimate - torch.flip(estimate, _FLIPPED[self.kind])).square()) / 8
