r"""Sliding-mode CFG (SMC-CFG): a switching correction of what the branches differ by, as a sliding-mode controller would make it.

With the difference e = u_c - u_u as the error that guidance feeds back, and e' the corrected error of the noise level before (e itself at
the first level of a run),

    s = (e - e') + lambda e'                     the sliding surface
    e <- e - k sign(s)                           the switching correction, which is remembered as the next e'
    u = u_u + w e

Where there is no unconditional branch (w = 1, or outside a limited interval) nothing is corrected and nothing is remembered.

Reference: arXiv 2603.03281, in the form of the authors' code (hanyang-21/CFG-Ctrl, pipeline/common_cfg_ctrl.py) and its README.
Space: the flow velocity u = eps - D, the network's own output in rectified flow, for which the rule was made.
Deviations: VE-scaled models, which the paper does not treat, are guided in the flow velocity of the same estimate, so that k means the
same in both; in eps a correction would move D by sigma k w, fifteen times too far at the first step. The conditional branch carries the
correction, and at w = 1 there is none, where the authors' form would leave one. ``switching``: their code takes the sign of each
element; *unit* divides s by its length, so that the whole correction of a sample has length k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import expand
from .base import NodeText, Rule, Stage, Step
from .gradient import sample_norm
from .knobs import Choice, Number
from .memory import LevelMemory


def switching_correction(error: Tensor, previous: Tensor, *, slope: float, gain: float, switching: str) -> Tensor:
    """-gain sign(s), s = (error - previous) + slope * previous, each sample of (B, ...) by itself.

    Args:
        error: e (B, ...).
        previous: the corrected error of the noise level before (B, ...); ``error`` itself at the first one.
        slope: lambda of the sliding surface.
        gain: k.
        switching: "sign" of each element, or "unit": s over its length, 0 where that is 0.
    """
    surface = (error - previous) + slope * previous
    if switching == "sign":
        return -gain * surface.sign()
    length = sample_norm(surface)
    return -gain * surface / expand(torch.where(length == 0, torch.ones_like(length), length), surface)


@dataclass(frozen=True, kw_only=True)
class SlidingModeCFG(Rule):
    stage: ClassVar[Stage] = Stage.BRANCHES
    node: ClassVar[NodeText] = NodeText(
        id="LGSlidingModeCFG",
        name="Sliding-Mode CFG",
        name_zh="滑模 CFG (SMC-CFG)",
        description="Corrects the guidance direction from step to step by a switching controller, against overshoot at strong scales.",
        description_zh="用切换控制器逐步修正引导方向，抑制高强度下的过冲。",
        search_aliases=("smc-cfg", "smc cfg", "cfg-ctrl", "sliding mode control"),
    )

    gain: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.1 to 0.7",
            label_zh="切换增益 k",
            help="How far the correction moves each element of the difference between the estimates (or, with unit, all of it together).",
            help_zh="修正量使两个估计之差的每个元素移动多少（选 unit 时为整体移动的长度）。",
        ),
    ] = 0.1
    slope: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.5,
            neutral=1.0,
            paper_range="3 to 6",
            label_zh="滑模面斜率 λ",
            help="How much the difference of the step before weighs in the sliding surface; 1 forgets it.",
            help_zh="上一步的差值在滑模面中的权重；1 表示忘掉它。",
        ),
    ] = 5.0
    switching: Annotated[
        str,
        Choice(
            options=("sign", "unit"),
            label_zh="切换方式",
            help="sign: every element is moved by k, as in the authors' code; unit: the whole correction has length k.",
            help_zh="sign：每个元素都移动 k，与作者代码相同；unit：整个修正量的长度为 k。",
        ),
    ] = "sign"

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Mapping[str, Tensor]]:
        memory = LevelMemory()

        def apply(step: Step) -> Mapping[str, Tensor]:
            if "uncond" not in step.estimates:
                return {}
            cond, uncond = (
                step.process.flow_velocity(step.x, denoised, step.sigma)
                for denoised in (step.cond_denoised, step.uncond_denoised)
            )
            error = cond - uncond
            kept, known = memory.recall(step.sigma, error)
            before = torch.where(expand(known, error), kept, error.detach())
            correction = switching_correction(error, before, slope=self.slope, gain=self.gain, switching=self.switching)
            memory.keep(error + correction)
            # D moves by -sigma / (alpha + sigma) for each unit of u
            noise_share = step.sigma / (step.process.alpha(step.sigma) + step.sigma)
            return {"cond": step.cond_denoised - expand(noise_share, error) * correction}

        return apply
