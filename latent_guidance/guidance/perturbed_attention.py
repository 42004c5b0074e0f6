r"""Perturbed attention (PAG): away from an estimate for which no place of the picture looks at any other.

    D' = D + s (D_cond - D_p),    in the pass of D_p:  softmax(Q K^T / sqrt(d)) V  becomes  I V = V

in the self-attention of the layers chosen; attention to the prompt stays. What the pass then gets wrong is the structure of the picture.

It needs a U-Net with transformer blocks (Stable Diffusion 1 and 2, SDXL, the emoji model). Transformers (SD3, Flux) and networks whose
attention cannot be reached are refused before the first step.

Reference: arXiv 2403.17377 (the identity in the place of the attention map), in the form of the authors' pipeline
(hyoungwoncho/sd_perturbed_attention_guidance); s = 3 on the middle block is what diffusers and ComfyUI take for Stable Diffusion.
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: none. With classifier-free guidance the two add up, as in the authors' pipeline; without it s counts from the same zero,
where diffusers' PerturbedAttentionGuidance counts from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..attention import AttentionPatch, split_layers
from .base import NodeText
from .knobs import Number, Text
from .weakened import WeakenedPass


@dataclass(frozen=True, kw_only=True)
class PerturbedAttention(WeakenedPass):
    node: ClassVar[NodeText] = NodeText(
        id="LGPerturbedAttention",
        name="Perturbed Attention (PAG)",
        name_zh="扰动注意力引导 (PAG)",
        description="Improves structure without a negative prompt: guides away from a pass in which no part of the picture sees the "
        "others. Adds up with CFG; costs one pass. U-Nets only (SD 1 and 2, SDXL, emoji); SD3 and "
        "Flux are refused.",
        description_zh="无需反向提示词即可改善结构：远离画面各处互不可见的一次计算。可与 CFG 叠加；每步多一次计算。"
        "仅限 U-Net（SD 1/2、SDXL、emoji）；SD3、Flux 会被拒绝。",
        search_aliases=("pag", "perturbed attention guidance", "identity attention", "structure"),
    )

    scale: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.1,
            neutral=0.0,
            paper_range="1 to 5",
            label_zh="强度 s",
            help="How far to go away from the perturbed pass; it adds to other guidance.",
            help_zh="远离扰动计算的程度；与其他引导相加。",
        ),
    ] = 3.0
    layers: Annotated[
        str,
        Text(
            placeholder="middle",
            label_zh="层",
            help="Transformer blocks of the U-Net whose self-attention is perturbed: middle, down, up, all, or by name, such as m0, "
            "d0-d2, u3.",
            help_zh="自注意力被扰动的 U-Net Transformer 块：middle、down、up、all，或按名称，如 m0、d0-d2、u3。",
        ),
    ] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        split_layers(self.layers)

    def patch(self) -> AttentionPatch:
        return AttentionPatch("identity", self.layers)
