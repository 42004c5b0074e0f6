r"""Angle-domain guidance (ADG): turns the conditional estimate away from the unconditional one, where CFG would make it longer.

With the angle theta between D_c and D_u and the part of D_c at right angles to D_u,

    e      = D_c - <D_c, D_u> / |D_u|**2 D_u
    theta' = min((w - 1) theta, largest angle)
    D      = cos(theta') D_c + sin(theta') / sin(theta) e

w = 1 turns by nothing, w = 2 by the angle that lies between the two estimates already. Since e / sin(theta) is as long as D_c,

    |D|**2 = |D_c|**2 (1 + sin(2 theta') sin(theta)),

so that D is nearly as long as D_c where the two estimates are close, and never longer than sqrt(2) |D_c|; CFG's estimate grows
with w without a bound.

Reference: arXiv 2506.11039, in the form of the authors' code (jinc7461/ADG, method/ADG_SD3.py, ADG_SD3), which has 60 degrees for the
largest angle and shows w from 2 to 10; without a limit it is their ADG_SD3_wo_clip.
Space: D; angles, norms and products are over all elements of one sample.
Deviations: the authors add 0.001 to w - 1, so that their w = 1 is not quite the conditional estimate, and write 3.14 for pi. As with them
w below 1 guides as 1 does, and where sin(theta) is 0.001 or less the quotient is w - 1, its limit for small angles. A zero D_u, which has
no direction, leaves D_c as it is (theirs is not a number there). Their code is for one picture: it multiplies angles (B, 1) with latents
(B, C, H, W). Its variant ADG_SD3_w_norm, which gives every place the length of D_c again, is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import expand
from .base import NodeText, Rule, Stage, Step
from .gradient import sample_norm
from .knobs import Number
from .perp_neg import perpendicular

SMALL_SINE = 1e-3
"""Of theta: up to it sin(theta') / sin(theta) is taken to be w - 1."""


def turned(cond_denoised: Tensor, uncond_denoised: Tensor, guidance_scale: Tensor, max_angle: float) -> Tensor:
    """The guided estimate (B, ...); exactly D_c where w is 1 or below, and where D_u is zero.

    Args:
        cond_denoised: D_c (B, ...).
        uncond_denoised: D_u (B, ...).
        guidance_scale: w (B,).
        max_angle: the largest theta', in radians.
    """
    away = perpendicular(cond_denoised, uncond_denoised)
    across, length = sample_norm(away), sample_norm(uncond_denoised)
    along = (cond_denoised * uncond_denoised).flatten(1).sum(dim=1) / torch.where(
        length == 0, torch.ones_like(length), length
    )
    angle, strength = torch.atan2(across, along), guidance_scale - 1
    turn = (strength * angle).clamp(max=max_angle)
    sine = angle.sin()
    small = sine <= SMALL_SINE
    share = torch.where(small, strength, turn.sin() / torch.where(small, torch.ones_like(sine), sine))
    guided = expand(turn.cos(), away) * cond_denoised + expand(share, away) * away
    unguided = (strength <= 0) | (length == 0) | (max_angle == 0)
    return torch.where(expand(unguided, away), cond_denoised, guided)


@dataclass(frozen=True, kw_only=True)
class AngleDomainGuidance(Rule):
    stage: ClassVar[Stage] = Stage.COMBINE
    node: ClassVar[NodeText] = NodeText(
        id="LGAngleDomain",
        name="Angle-Domain Guidance (ADG)",
        name_zh="角度域引导 (ADG)",
        description="Strong guidance without burnt colours: turns the estimate away from the negative prompt instead of pushing it ever "
        "further. It takes the place of Classifier-Free Guidance and its scale.",
        description_zh="强引导也不致颜色过饱和：让估计转离反向提示词，而不是越推越远。它取代无分类器引导及其强度。",
        search_aliases=("adg", "angle domain guidance", "rotation", "oversaturation"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=1.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="2 to 10",
            label_zh="引导强度",
            help="How far to turn: 1 is the prompt alone, 2 turns further by the angle between the negative and the positive estimate.",
            help_zh="转多远：1 只用提示词，2 再多转一个反向与正向估计之间的夹角。",
        ),
    ] = 4.0
    max_angle: Annotated[
        float,
        Number(
            min=0.0,
            max=180.0,
            step=1.0,
            neutral=0.0,
            paper_range="60",
            label_zh="最大转角",
            help="Largest turn, in degrees; 0 turns by nothing, and far above 60 pictures fall apart at strong scales.",
            help_zh="最大转角（度）；0 表示不转；远大于 60 时，强引导会使画面崩坏。",
        ),
    ] = 60.0

    def apply(self, step: Step) -> Tensor:
        radians = math.radians(self.max_angle)
        return turned(step.cond_denoised, step.uncond_denoised, step.guidance_scale, radians)
