r"""A reference picture, as its latent: the estimate is pulled towards it, as a whole or in its coarse structure only.

    loss(D) = 1/2 sum (L D - L r)^2 / mean(r^2)

with r the reference's latent as the VAE made it, D the estimate in the same scale, and L the identity or a low-pass filter that
averages over blocks of ``low_pass`` latent pixels (and leaves each average where it was), as in ILVR.

Reference: arXiv 2108.02938 (ILVR, sec. 3: low-frequency content of a reference).
Space: the VAE's latents; no decoding is needed. In units of the reference's own mean square, so that scales carry over from VAE to VAE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..base import NodeText
from ..knobs import Socket, Whole
from .base import ReadyLoss, sum_over


def low_passed(latents: Tensor, block: int) -> Tensor:
    """Averages of (B, ..., h, w) over blocks of ``block`` x ``block``, the last ones smaller where sizes do not divide."""
    if block == 1:
        return latents
    flat = latents.flatten(0, -3)[:, None]  # (N, 1, h, w)
    pooled = nn.functional.avg_pool2d(flat, block, ceil_mode=True, count_include_pad=False)
    return pooled.reshape(*latents.shape[:-2], *pooled.shape[-2:])


@dataclass(frozen=True, kw_only=True)
class ReferenceLatent(ReadyLoss):
    space: ClassVar[str] = "vae"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossReference",
        name="Loss: Reference Picture",
        name_zh="损失：参考图像",
        description="Pulls towards a reference picture, given as a latent (VAE Encode): all of it, or with low_pass only its layout "
        "and colours.",
        description_zh="拉向参考图像（以潜变量给出，见 VAE 编码）：整幅图像；设置 low_pass 后仅保留其构图与色彩。",
        search_aliases=("loss", "reference", "image", "similar", "ILVR", "structure", "img2img"),
    )

    reference: Annotated[
        Any,
        Socket(
            type="LATENT",
            made_by="VAE Encode",
            label_zh="参考潜变量",
            help="The reference, encoded by the model's own VAE; one for all pictures of a batch, or one for each.",
            help_zh="参考图像，由模型自带的 VAE 编码；整批共用一张，或每张图片各一张。",
        ),
    ]
    low_pass: Annotated[
        int,
        Whole(
            min=1,
            max=64,
            neutral=1,
            label_zh="低通",
            help="Compare averages over blocks of this many latent pixels: 1 compares every detail, larger only the coarse structure.",
            help_zh="比较边长为此数的潜变量块的平均值：1 比较全部细节，越大则只比较粗略结构。",
        ),
    ] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reference, Tensor) or not bool(torch.count_nonzero(self.reference)):
            raise UserError(
                "an empty latent as the reference",
                expected="the latent of a picture",
                mend="connect VAE Encode with the reference picture",
            )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError for latents of ``shape`` (B, ...) to which the reference cannot be resized."""
        mine = tuple(self.reference.shape)
        fits = len(mine) == len(shape) and mine[1:-2] == shape[1:-2] and mine[0] in (1, shape[0])
        if not fits or (len(mine) != 4 and mine[-2:] != shape[-2:]):
            raise UserError(
                f"a reference of shape {mine} for latents of shape {shape}",
                expected="a latent of the model's own VAE, one or as many as there are pictures",
                mend="encode the reference picture with the VAE of the model's checkpoint",
            )

    def __call__(self, estimate: Tensor) -> Tensor:
        """Half the squared distance (B,) of latents (B, ...) to the reference, in units of the reference's mean square.

        Raises:
            UserError: latents of other channels, or of another size than the reference's where it cannot be resized.
        """
        reference = self._fitted(estimate)
        unit = reference.flatten(1).square().mean(dim=1).clamp_min(1e-12)
        apart = low_passed(estimate, self.low_pass) - low_passed(reference, self.low_pass)
        share = apart[0].numel() / estimate[0].numel()  # a block's average stands for all of the block
        return sum_over(apart.square()) / (2 * unit * share)

    def _fitted(self, estimate: Tensor) -> Tensor:
        """The reference for a batch of latents (B, ...), at their height and width."""
        self.check_shape(tuple(estimate.shape))
        reference = self.reference.to(estimate).clone()
        if reference.ndim == 4 and reference.shape[-2:] != estimate.shape[-2:]:
            reference = nn.functional.interpolate(reference, size=estimate.shape[-2:], mode="bilinear", antialias=True)
        return reference.expand_as(estimate)
