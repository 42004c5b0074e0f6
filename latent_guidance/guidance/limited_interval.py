r"""Guidance in a limited interval of noise levels.

    w(sigma) = w   for sigma_lo < sigma <= sigma_hi,   1 elsewhere

Outside the interval the conditional model alone is used, and in a Guider no second pass through the network is paid for. A MODEL in ComfyUI
that the rule was patched onto is still evaluated on both conditions at every step, before the rule is asked.

Reference: arXiv 2404.07724, sec. 3.
Space: acts on the scale alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..process import Process
from .base import NodeText, Rule, Stage, Step
from .knobs import UNLIMITED, Number


def limited_interval(guidance_scale: Tensor, sigma: Tensor, *, sigma_lo: float, sigma_hi: float) -> Tensor:
    """w (B,) inside (sigma_lo, sigma_hi], 1 outside; ``sigma_hi`` = 1000 is no upper bound."""
    inside = inside_window(sigma, sigma_lo, sigma_hi)
    return torch.where(inside, guidance_scale, torch.ones_like(guidance_scale))


def inside_window(sigma: Tensor, sigma_lo: float, sigma_hi: float) -> Tensor:
    """Which of ``sigma`` (B,) lie in (sigma_lo, sigma_hi]; ``sigma_hi`` = 1000 is no upper bound."""
    return (sigma > sigma_lo) & ((sigma <= sigma_hi) | (sigma_hi >= UNLIMITED))


def check_window(sigma_lo: float, sigma_hi: float, where: str) -> None:
    """Raise UserError if the window (sigma_lo, sigma_hi] is empty."""
    if sigma_lo >= sigma_hi:
        raise UserError(
            f"sigma_lo = {sigma_lo:g} and sigma_hi = {sigma_hi:g} of {where}, a window that never opens",
            expected="sigma_lo below sigma_hi",
            mend="lower sigma_lo or raise sigma_hi (0 and 1000 cover every noise level)",
        )


@dataclass(frozen=True, kw_only=True)
class LimitedInterval(Rule):
    stage: ClassVar[Stage] = Stage.SCALE
    rests_at_one: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGLimitedInterval",
        name="Limited Interval",
        name_zh="限定区间引导",
        description="Applies classifier-free guidance only at middle noise levels; elsewhere the prompt alone is used, in the Guider "
        "at half the cost.",
        description_zh="只在中间的噪声水平使用无分类器引导；其余步骤只用提示词；在引导器中这些步骤成本减半。",
        search_aliases=("guidance interval", "cfg interval", "limited interval"),
    )

    sigma_lo: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=0.0,
            paper_range="0.28 (SDXL)",
            label_zh="区间下限 sigma",
            help="Guidance acts at noise levels sigma above this one. Flow models (SD3, Flux) have sigma from 1 to 0.",
            help_zh="噪声水平 sigma 高于此值时引导才起作用。flow 模型（SD3、Flux）的 sigma 从 1 到 0。",
        ),
    ] = 0.28
    sigma_hi: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=UNLIMITED,
            paper_range="5.42 (SDXL)",
            label_zh="区间上限 sigma",
            help="Guidance acts at noise levels sigma up to and including this one; 1000 is no upper limit. Flow models (SD3, Flux) have "
            "sigma from 1 to 0.",
            help_zh="噪声水平 sigma 不高于此值时引导才起作用；1000 表示没有上限。flow 模型（SD3、Flux）的 sigma 从 1 到 0。",
        ),
    ] = 5.42

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)

    def closed(self, process: Process, sigmas: Tensor) -> str:
        opens = bool(inside_window(sigmas, self.sigma_lo, self.sigma_hi).any())
        return "" if opens else f"its window is ({self.sigma_lo:g}, {self.sigma_hi:g}]"

    def apply(self, step: Step) -> Tensor:
        return limited_interval(step.guidance_scale, step.sigma, sigma_lo=self.sigma_lo, sigma_hi=self.sigma_hi)
