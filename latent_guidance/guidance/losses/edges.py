r"""A sketch: the picture's edges are pulled towards those of a drawing or of another picture.

    loss(D) = 1/2 sum_pixels (e(D) - e_s)^2,     e = sqrt(g_x^2 + g_y^2 + 0.01) - 0.1

with g_x, g_y the Sobel derivatives of the brightness. e_s are the edges of the sketch, measured in the same way (*edges*), or its
dark strokes on
white, each stroke an edge of full strength (*strokes*).

Reference: arXiv 2211.13752 (sketch-guided diffusion). Deviation: there a small network reads edges off the UNet's features; here they are
Sobel's, read off the decoded estimate, and no network is needed.
Space: decoded pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..base import NodeText
from ..knobs import Choice, Number, Socket
from .base import ReadyLoss, sum_over

_BRIGHTNESS = (0.299, 0.587, 0.114)
_SOFT = 0.1


def brightness(pictures: Tensor) -> Tensor:
    """(B, 1, H, W) in [-1, 1] of pictures (B, 3, H, W)."""
    weights = pictures.new_tensor(_BRIGHTNESS)[:, None, None]
    return (pictures * weights).sum(dim=1, keepdim=True)


def edges(pictures: Tensor) -> Tensor:
    """How strong the edge is at each pixel, (B, 1, H, W): 0 where flat, about 1 at a step from black to white."""
    across = pictures.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    slopes = nn.functional.conv2d(nn.functional.pad(brightness(pictures), (1, 1, 1, 1), mode="replicate"), kernels)
    return (slopes.square().sum(dim=1, keepdim=True) + _SOFT**2).sqrt() - _SOFT


@dataclass(frozen=True, kw_only=True)
class SketchEdges(ReadyLoss):
    space: ClassVar[str] = "picture"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossEdges",
        name="Loss: Sketch / Edges",
        name_zh="损失：草图 / 边缘",
        description="Pulls the picture's outlines towards a sketch, or towards the outlines of another picture.",
        description_zh="把画面的轮廓拉向草图，或拉向另一幅图像的轮廓。",
        search_aliases=("loss", "sketch", "edges", "sobel", "outline", "scribble", "lineart"),
    )

    sketch: Annotated[
        Any,
        Socket(
            type="IMAGE",
            made_by="Load Image",
            label_zh="草图",
            help="A drawing or a picture; one for all pictures of a batch, or one for each. Resized to the decoded picture.",
            help_zh="草图或图像；整批共用一张，或每张图片各一张。会缩放到解码后的尺寸。",
        ),
    ]
    read_as: Annotated[
        str,
        Choice(
            options=("edges", "strokes"),
            label_zh="读取方式",
            help="edges: the outlines of what the picture shows; strokes: dark lines on white are the outlines themselves.",
            help_zh="edges：取图像内容的轮廓；strokes：白底上的深色线条本身即为轮廓。",
        ),
    ] = "edges"
    strength: Annotated[
        float,
        Number(
            min=0.0,
            max=4.0,
            step=0.05,
            neutral=1.0,
            label_zh="边缘强度",
            help="How strong the outlines are to be: times those of the sketch.",
            help_zh="期望的轮廓强度，相对于草图的倍数。",
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sketch, Tensor) or self.sketch.ndim != 4 or self.sketch.shape[1] != 3:
            raise UserError(
                "a sketch that is no picture", expected="a picture (B, 3, H, W)", mend="connect Load Image to sketch"
            )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError for a batch of another number than there are sketches, unless there is one for all."""
        if self.sketch.shape[0] not in (1, shape[0]):
            raise UserError(
                f"{self.sketch.shape[0]} sketches for {shape[0]} pictures",
                expected="one sketch, or one for each picture",
                mend="connect a single picture to sketch",
            )

    def wanted(self, pictures: Tensor) -> Tensor:
        """The edge map (1 or B, 1, H, W) that pictures (B, 3, H, W) are to have.

        Raises:
            UserError: another number of sketches than one or the batch's.
        """
        self.check_shape(tuple(pictures.shape))
        sketch = self.sketch.to(pictures).clone()
        size = pictures.shape[-2:]
        if sketch.shape[-2:] != size:
            sketch = nn.functional.interpolate(sketch, size=size, mode="bilinear", antialias=True)
        found = edges(sketch) if self.read_as == "edges" else (1 - brightness(sketch)) / 2
        return self.strength * found

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,) of pictures (B, 3, H, W) in [-1, 1]."""
        return sum_over((edges(estimate) - self.wanted(estimate)).square()) / 2
