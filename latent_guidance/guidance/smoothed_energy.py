r"""Smoothed energy (SEG): away from an estimate whose attention is blurred.

    D' = D + s (D_cond - D_b),    in the pass of D_b:  softmax(Q K^T / sqrt(d)) V  becomes  softmax((G * Q) K^T / sqrt(d)) V

in the self-attention of the layers chosen. G * Q is the Gaussian blur of the queries over the picture, which is a blur of the attention
scores and lowers the curvature of attention's energy. blur_sigma sets how much, from 0 (no blur, so no guidance) to 1000 (all queries are
their mean), with s left alone.

It needs a U-Net with transformer blocks (Stable Diffusion 1 and 2, SDXL, the emoji model). Transformers (SD3, Flux) and networks whose
attention cannot be reached are refused before the first step.

Reference: arXiv 2408.00760 (query blurring), in the form of the authors' code (SusungHong/SEG-SDXL, pipeline_seg.py): kernels of
6 sigma, mirrored borders, s = 3, the middle block and an infinite blur.
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: height and width are those of the picture; the authors' code takes every latent for square. The kernel is held to the length of
each side by itself. (diffusers' SmoothedEnergyGuidance has the two cases exchanged: a finite blur takes the mean, an infinite one blurs.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..attention import AttentionPatch, split_layers
from .base import NodeText
from .knobs import UNLIMITED, Number, Text
from .weakened import WeakenedPass


@dataclass(frozen=True, kw_only=True)
class SmoothedEnergy(WeakenedPass):
    node: ClassVar[NodeText] = NodeText(
        id="LGSmoothedEnergy",
        name="Smoothed Energy (SEG)",
        name_zh="平滑能量引导 (SEG)",
        description="Improves structure without a negative prompt, more gently than PAG: guides away from a pass whose attention is "
        "blurred. Adds up with CFG; costs one pass. U-Nets only (SD 1 and 2, SDXL, emoji); SD3 and "
        "Flux are refused.",
        description_zh="无需反向提示词即可改善结构，比 PAG 温和：远离注意力被模糊的一次计算。可与 CFG 叠加；每步多一次计算。"
        "仅限 U-Net（SD 1/2、SDXL、emoji）；SD3、Flux 会被拒绝。",
        search_aliases=("seg", "smoothed energy guidance", "blurred attention", "structure"),
    )

    scale: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.1,
            neutral=0.0,
            paper_range="3",
            label_zh="强度 s",
            help="How far to go away from the blurred pass; it adds to other guidance.",
            help_zh="远离模糊计算的程度；与其他引导相加。",
        ),
    ] = 3.0
    blur_sigma: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.1,
            neutral=0.0,
            paper_range="1 to 10, and 1000",
            paper_range_zh="1 到 10，以及 1000",
            label_zh="模糊标准差",
            help="Standard deviation of the blur of the queries, in tokens of the layer; 1000 blurs without limit.",
            help_zh="查询向量模糊的标准差，以该层的令牌为单位；1000 表示无限模糊。",
        ),
    ] = UNLIMITED
    layers: Annotated[
        str,
        Text(
            placeholder="middle",
            label_zh="层",
            help="Transformer blocks of the U-Net whose self-attention is blurred: middle, down, up, all, or by name, such as m0, "
            "d0-d2, u3.",
            help_zh="自注意力被模糊的 U-Net Transformer 块：middle、down、up、all，或按名称，如 m0、d0-d2、u3。",
        ),
    ] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        split_layers(self.layers)

    @property
    def idle(self) -> bool:
        return super().idle or self.blur_sigma == 0

    def patch(self) -> AttentionPatch:
        return AttentionPatch(
            "blur", self.layers, blur_sigma=self.blur_sigma if self.blur_sigma < UNLIMITED else math.inf
        )
