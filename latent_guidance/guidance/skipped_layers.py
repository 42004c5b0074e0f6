r"""Skipped layers (SLG, STG): away from an estimate that was made without some of the network's layers.

    D' = D + s (D_cond - D_skip)

In the pass of D_skip the transformer blocks chosen are left out, what goes into them comes out (skip = "block"): skip-layer guidance as
Stability AI has it for Stable Diffusion 3.5, and the residual skip of STG. Or only their self-attention is, every token keeps its own value
(skip = "attention"): STG's attention skip, which is perturbed attention in the layers chosen.

Blocks can be skipped in U-Nets, and in ComfyUI in the transformers (SD3, Flux, Wan, ...) that let their blocks be replaced; attention in
U-Nets alone. Networks that let neither in are refused.

Reference: Stability-AI/sd3.5, sd3_impls.py, SkipLayerCFGDenoiser (s = 2.5, layers 7 to 9 of the medium model, from 1% to 20% of the
steps); arXiv 2411.18664 (residual skip Res'(z) = z, attention skip SA'(Q, K, V) = V).
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: where in the run it acts is said by noise levels, not by a share of the steps. STG's rescaling is a rule of its own here
(Rescale Guidance, after this one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..attention import AttentionPatch, split_layers
from .base import NodeText
from .knobs import Choice, Number, Text
from .weakened import WeakenedPass


@dataclass(frozen=True, kw_only=True)
class SkippedLayers(WeakenedPass):
    node: ClassVar[NodeText] = NodeText(
        id="LGSkippedLayers",
        name="Skipped Layers (SLG)",
        name_zh="跳层引导 (SLG)",
        description="Improves anatomy and structure: guides away from a pass that leaves out some layers. Works on transformers such as "
        "SD3.5 and Flux too; costs one pass.",
        description_zh="改善人体与结构：远离跳过若干层的一次计算。也适用于 SD3.5、Flux 等 Transformer 模型；每步多一次计算。",
        search_aliases=("slg", "skip layer guidance", "stg", "spatiotemporal skip", "skip block"),
    )

    scale: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.1,
            neutral=0.0,
            paper_range="1 to 3",
            label_zh="强度 s",
            help="How far to go away from the pass with skipped layers; it adds to other guidance.",
            help_zh="远离跳层计算的程度；与其他引导相加。",
        ),
    ] = 2.5
    layers: Annotated[
        str,
        Text(
            placeholder="middle",
            label_zh="层",
            help="Layers to skip: middle or all; of a U-Net also down, up, or by name, such as m0, d0-d2; of a transformer by number, "
            "such as 7-9 (SD3.5 medium), and s0, s1 for single-stream blocks.",
            help_zh="要跳过的层：middle 或 all；U-Net 还可用 down、up 或名称，如 m0、d0-d2；"
            "Transformer 模型用编号，如 7-9（SD3.5 medium），"
            "单流块用 s0、s1。",
        ),
    ] = "middle"
    skip: Annotated[
        str,
        Choice(
            options=("block", "attention"),
            label_zh="跳过内容",
            help="block: the whole transformer block; attention: only its self-attention, which U-Nets alone allow.",
            help_zh="block：整个 Transformer 块；attention：仅自注意力（只适用于 U-Net）。",
        ),
    ] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        split_layers(self.layers)

    def patch(self) -> AttentionPatch:
        return AttentionPatch("skip" if self.skip == "block" else "identity", self.layers)
