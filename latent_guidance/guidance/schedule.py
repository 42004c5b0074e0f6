r"""Guidance schedules: a guidance scale that changes along the run.

    w(u) = 1 + (w - 1) * f(u),   u from 0 (the first step) to 1 (the last)

    constant         f = 1
    linear           f = 2 u
    cosine           f = 1 - cos(pi u)
    power law        f = (p + 1) u**p                       (p = 1 is linear)
    powered cosine   f = (1 - cos(pi u**p)) / 2             (w is reached at the end: the most, not the mean)

*falling* puts 1 - u in the place of u. Where w > 1 the scale never goes below ``floor`` (the paper's clamp: max(c, w)).

Reference: arXiv 2404.13040, eq. 4 with its heuristic schedulers (linear, cosine; their mirror images invlinear, sine) and its
parametrized ones (clamp, and the powered cosine pcs).
Its t / T, which is 1 for noise, is our 1 - u: *rising* shapes guide little at first and most at the end, and are the ones that
it found to help. Its w stands in D_c + w (D_c - D_u) and is ours minus 1, so f acts on w - 1 and f = 0 is the plain conditional
model, which costs no second pass. The shapes without a parameter have mean 1 (its "normalized": the integral of f is 1).
The power law is not in the paper; it is given the same mean.
u is counted in steps of the run, as samplers' interfaces do; on a grid uniform in t that is the paper's 1 - t / T. Or it is read
off the noise level, u = 1 - (2 / pi) atan(sigma / alpha), which is 1 - t / T of the cosine noise schedule (arXiv 2102.09672
without its offset) and the same for every sampler, number of steps and starting level; so it is, too, where the run's grid is unknown.
Space: acts on the scale alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import Process
from .base import NodeText, Rule, Stage, Step
from .grid import progress
from .knobs import Choice, Number

SHAPES = ("constant", "linear", "cosine", "power law", "powered cosine")


def shape_factor(u: Tensor, shape: str, exponent: float) -> Tensor:
    """f(u), at least 0, for u (B,) in [0, 1]; ``exponent`` counts for the last two shapes only."""
    match shape:
        case "constant":
            return torch.ones_like(u)
        case "linear":
            return 2 * u
        case "cosine":
            return 1 - (math.pi * u).cos()
        case "power law":
            return (exponent + 1) * u**exponent
        case "powered cosine":
            return (1 - (math.pi * u**exponent).cos()) / 2
    raise ValueError(f"no shape {shape!r} among {SHAPES}")


def noise_progress(process: Process, sigma: Tensor) -> Tensor:
    """1 - (2 / pi) atan(sigma / alpha) (B,): 0 for pure noise, 1 at sigma = 0."""
    return 1 - torch.atan2(sigma, process.alpha(sigma)) * (2 / math.pi)


def scheduled_scale(guidance_scale: Tensor, factor: Tensor, floor: float) -> Tensor:
    """1 + (w - 1) f for w, f (B,); where w > 1 at least ``floor``, and exactly 1 where w = 1."""
    scaled = torch.where(factor == 1, guidance_scale, 1 + (guidance_scale - 1) * factor)
    return torch.where(guidance_scale > 1, scaled.clamp(min=floor), scaled)


@dataclass(frozen=True, kw_only=True)
class GuidanceSchedule(Rule):
    stage: ClassVar[Stage] = Stage.SCALE
    rests_at_one: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGGuidanceSchedule",
        name="Guidance Schedule",
        name_zh="引导强度调度",
        description="Lets the guidance scale rise or fall along the run, around the scale that is set elsewhere.",
        description_zh="让引导强度随采样过程上升或下降，以别处设定的强度为基准。",
        search_aliases=("cfg schedule", "cfg scheduler", "dynamic cfg", "guidance weight scheduler", "cfg curve"),
    )

    shape: Annotated[
        str,
        Choice(
            options=SHAPES,
            neutral="constant",
            label_zh="形状",
            help="How the scale changes: constant, linear, cosine and power law keep its mean; powered cosine reaches it at the end.",
            help_zh="强度如何变化：constant、linear、cosine、power law 保持平均强度；powered cosine 在末尾达到设定强度。",
        ),
    ] = "linear"
    direction: Annotated[
        str,
        Choice(
            options=("rising", "falling"),
            label_zh="方向",
            help="Rising: little guidance at first and most at the end, as the paper found best; falling: the other way round.",
            help_zh="rising：开始弱、末尾强（论文认为最好）；falling：相反。",
        ),
    ] = "rising"
    exponent: Annotated[
        float,
        Number(
            min=0.0,
            max=10.0,
            step=0.1,
            neutral=0.0,
            label_zh="指数",
            help="Exponent of the power law and of the powered cosine: the larger, the more guidance gathers at the strong end of the run, "
            "and 0 is constant; other shapes ignore it.",
            help_zh="power law 与 powered cosine 的指数：越大，引导越集中在强的一端，0 即恒定；其他形状忽略此值。",
        ),
    ] = 2.0
    floor: Annotated[
        float,
        Number(
            min=1.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="3 (SD 1.5), 5 (SDXL)",
            label_zh="下限",
            help="The scale never falls below this, so that the composition is guided from the start; 1 is no floor.",
            help_zh="强度不会低于此值，使构图从一开始就受到引导；1 表示没有下限。",
        ),
    ] = 1.0
    over: Annotated[
        str,
        Choice(
            options=("steps", "noise level"),
            label_zh="沿何变化",
            help="Steps: along the run's steps, wherever it starts; noise level: the same scale at the same noise for every sampler.",
            help_zh="steps：按本次采样的步数；noise level：相同噪声水平强度相同，与采样器和步数无关。",
        ),
    ] = "steps"

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Tensor]:
        def apply(step: Step) -> Tensor:
            if sigmas is None or self.over == "noise level":
                u = noise_progress(step.process, step.sigma)
            else:
                u = progress(step.sigma, sigmas)
            factor = shape_factor(u if self.direction == "rising" else 1 - u, self.shape, self.exponent)
            return scheduled_scale(step.guidance_scale, factor.to(step.guidance_scale), self.floor)

        return apply
