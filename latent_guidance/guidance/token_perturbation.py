r"""Token perturbation (TPG): away from an estimate for which the places of the picture have changed their places.

    D' = D + s (D_cond - D_t),    in the pass of D_t:  the tokens H that enter a layer become  S H,  S a permutation

Every layer chosen has a permutation of its own, and another one at every step; shuffling keeps the norm of every token. Since a U-Net's
transformer block treats all tokens alike, what comes out of it is shuffled in the same way.

It needs a U-Net with transformer blocks (Stable Diffusion 1 and 2, SDXL, the emoji model). Transformers (SD3, Flux) and networks whose
attention cannot be reached are refused before the first step.

Reference: arXiv 2506.10036 (token shuffling), as in the authors' code (TaatiTeam/Token-Perturbation-Guidance, pipeline_sdxl_tpg.py):
s = 3 in the layers of the way down (d6 to d23 of SDXL's d0 to d23).
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: the permutations are drawn from a seed, the layer and the number of the step, not from torch's global generator, so that two
runs are the same, on every device, and a picture does not depend on what else is in its batch. By default all layers of the way down are
shuffled, on SDXL d0 to d23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..attention import AttentionPatch, split_layers
from .base import NodeText
from .knobs import Number, Text, Whole
from .weakened import WeakenedPass


@dataclass(frozen=True, kw_only=True)
class TokenPerturbation(WeakenedPass):
    node: ClassVar[NodeText] = NodeText(
        id="LGTokenPerturbation",
        name="Token Perturbation (TPG)",
        name_zh="令牌扰动引导 (TPG)",
        description="Improves structure and prompt following without a negative prompt: guides away from a pass with shuffled tokens. "
        "Adds up with CFG; costs one pass. U-Nets only (SD 1 and 2, SDXL, emoji); SD3 and "
        "Flux are refused.",
        description_zh="无需反向提示词即可改善结构与提示词一致性：远离令牌被打乱的一次计算。可与 CFG 叠加；每步多一次计算。"
        "仅限 U-Net（SD 1/2、SDXL、emoji）；SD3、Flux 会被拒绝。",
        search_aliases=("tpg", "token perturbation guidance", "token shuffle", "shuffled tokens"),
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
            help="How far to go away from the shuffled pass; it adds to other guidance.",
            help_zh="远离打乱计算的程度；与其他引导相加。",
        ),
    ] = 3.0
    layers: Annotated[
        str,
        Text(
            placeholder="down",
            label_zh="层",
            help="Transformer blocks of the U-Net whose tokens are shuffled: middle, down, up, all, or by name, such as d6-d23 (SDXL).",
            help_zh="令牌被打乱的 U-Net Transformer 块：middle、down、up、all，或按名称，如 d6-d23 (SDXL)。",
        ),
    ] = "down"
    seed: Annotated[
        int,
        Whole(
            min=0,
            max=2**31 - 1,
            label_zh="种子",
            help="Which permutations are drawn; the same seed draws the same ones.",
            help_zh="抽取哪些排列；相同种子得到相同排列。",
        ),
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        split_layers(self.layers)

    def patch(self) -> AttentionPatch:
        return AttentionPatch("shuffle", self.layers, seed=self.seed)
