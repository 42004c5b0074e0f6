r"""Magnitude-aware guidance (MAMBO-G): the scale is damped where the two branches are far apart.

    w' = 1 + (w - 1) exp(-alpha r),      r = ||u_c - u_u|| / ||u_u||,      u = eps - D

each sample by itself. Early in a run the difference between the branches is large and points the same way whatever the noise is, and a
strong guidance overshoots; late it is small and w returns. At w = 1 (or outside a limited interval) nothing is changed, and no second
pass is paid for.

Reference: arXiv 2508.03442: the ratio r and w = 1 + w_max exp(-alpha r), so that the paper's w_max is w - 1 here.
Space: u = eps - D, which in rectified flow, for which the rule was made, is the network's velocity and d = (x - D) / sigma. In D the ratio
means nothing at high noise levels, where D_u may be close to zero.
Deviations: the paper has flow models only. For VE-scaled models its own quantity is taken, the flow velocity of the same estimate, so that
one model gives the same w in either coordinates. There d is eps, and with it the rule would be turned round: on the bundled model (20
steps, "grinning face", scale 4) r in d rises from 0.05 at the first step to 0.11 at the last, in u it falls from 0.59 to 0.09.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from .base import NodeText, Rule, Stage, Step
from .gradient import sample_norm
from .knobs import Number


def magnitude_aware(guidance_scale: Tensor, cond: Tensor, uncond: Tensor, *, alpha: float) -> Tensor:
    """w' (B,) = 1 + (w - 1) exp(-alpha ||cond - uncond|| / ||uncond||); exactly w where alpha = 0.

    Args:
        guidance_scale: w (B,).
        cond: the flow velocity of the conditional branch (B, ...).
        uncond: that of the unconditional branch (B, ...).
        alpha: how strongly to damp, at least 0.
    """
    apart, size = sample_norm(cond - uncond), sample_norm(uncond)
    ratio = torch.where(
        apart == 0, torch.zeros_like(apart), apart / size
    )  # inf where only the unconditional one is zero
    damped = 1 + (guidance_scale - 1) * (-alpha * ratio).exp()
    return damped if alpha else guidance_scale


@dataclass(frozen=True, kw_only=True)
class MagnitudeAwareGuidance(Rule):
    stage: ClassVar[Stage] = Stage.SCALE
    rests_at_one: ClassVar[bool] = True
    looks_at_branches: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGMagnitudeAware",
        name="Magnitude-Aware Guidance",
        name_zh="幅度感知引导 (MAMBO-G)",
        description="Weakens guidance at the steps where prompt and negative prompt are far apart, so that strong scales do not overshoot.",
        description_zh="在正向与反向估计相差很大的步骤减弱引导，使较高的强度不致过冲。",
        search_aliases=("mambo-g", "mambo", "magnitude aware guidance", "adaptive guidance scale"),
    )

    alpha: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.5,
            neutral=0.0,
            paper_range="8 (Qwen-Image, guidance scale 10) to 12 (SD 3.5, guidance scale 18)",
            paper_range_zh="8（Qwen-Image，引导强度 10）到 12（SD 3.5，引导强度 18）",
            label_zh="阻尼强度",
            help="How strongly guidance is weakened by the distance between the estimates; raise the guidance scale along with it.",
            help_zh="两个估计之间的距离使引导减弱的程度；提高它时宜同时提高引导强度。",
        ),
    ] = 8.0

    def apply(self, step: Step) -> Tensor:
        if "uncond" not in step.estimates:
            return step.guidance_scale
        cond, uncond = (
            step.process.flow_velocity(step.x, denoised, step.sigma)
            for denoised in (step.cond_denoised, step.uncond_denoised)
        )
        return magnitude_aware(step.guidance_scale, cond, uncond, alpha=self.alpha)
