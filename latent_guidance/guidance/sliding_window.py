r"""Sliding windows (SWG, M-SWG): away from an estimate for which the network saw the picture only through small windows.

    D' = D + s M (D_cond - D_w)

D_w is made of N = windows x windows crops of x, each denoised by itself on the same prompt and put back, averaged where they overlap: what
the network knows of far-away places is missing from it. M is 1 everywhere (SWG), or, masked (M-SWG), only where windows overlap. It needs
nothing of the network but that it takes smaller latents, and works on every kind of model. The crops together are one pass of
(windows * size)**2 times the picture's area.

In ComfyUI a positive conditioning with areas, masks, ControlNets or GLIGEN boxes is refused: they mean places of the whole picture.

Reference: arXiv 2411.10257 (version 3 for the mask), as in the authors' code (HHU-MMBS/swg_bmvc2025_official, edm2/sample_edm2.py): 2 x 2
windows of 5/8 of each side, s from 0.2 (FID) to 1.1 (Frechet DINOv2), masked. Beside CFG the windows see the prompt and the mask stays, as
in their diffusion/models.py for DiT; in sample_edm2.py they are then without a label, and nothing is masked.
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: size is a share of each side, so latents need not be square. The authors' stride is rounded down, and where it does not divide
the room their last windows stop short of the border and leave NaN there; here the windows spread evenly up to both borders. Windows that
would leave gaps are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..windows import Windows
from .base import NodeText, Step
from .knobs import Number, Switch, Whole
from .weakened import WeakenedPass, away_from


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(WeakenedPass):
    node: ClassVar[NodeText] = NodeText(
        id="LGSlidingWindow",
        name="Sliding Window Guidance (SWG)",
        name_zh="滑动窗口引导 (SWG)",
        description="Strengthens what holds the whole picture together: guides away from the picture as seen through small windows. "
        "Works on every kind of model; costs about one and a half passes as it is set by default.",
        description_zh="强化整幅画面的整体关系：远离只透过小窗口看到的画面。适用于各类模型；默认设置下每步约多一次半计算。",
        search_aliases=("swg", "m-swg", "sliding window", "crops", "long range"),
    )

    scale: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.05,
            neutral=0.0,
            paper_range="0.2 to 1.5",
            label_zh="强度 s",
            help="How far to go away from the pass through windows; it adds to other guidance.",
            help_zh="远离窗口计算的程度；与其他引导相加。",
        ),
    ] = 0.5
    size: Annotated[
        float,
        Number(
            min=0.1,
            max=1.0,
            step=0.005,
            neutral=1.0,
            paper_range="0.625",
            label_zh="窗口大小",
            help="Height and width of a window, as a share of the picture's; windows times size has to be at least 1.",
            help_zh="窗口的高与宽占画面的比例；窗口数乘以大小须不小于 1。",
        ),
    ] = 0.625
    windows: Annotated[
        int,
        Whole(
            min=2,
            max=10,
            label_zh="每边窗口数",
            help="Windows along each side; the network sees their square, at the cost of (windows × size)² passes. Guider's passes output "
            "counts each window.",
            help_zh="每边的窗口数；网络计算其平方个窗口，开销约为（窗口数 × 大小）² 次计算。“引导器”的网络调用次数按窗口逐个计。",
        ),
    ] = 2
    masked: Annotated[
        bool,
        Switch(
            label_zh="仅重叠处",
            help="Whether to guide only where windows overlap (M-SWG), which saturates less.",
            help_zh="是否只在窗口重叠处引导 (M-SWG)，可减轻过饱和。",
        ),
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size * self.windows < 1 - 1e-9:
            raise UserError(
                f"{self.windows} windows of {self.size:g} of a side in {self.node.name}, which leave gaps",
                expected="windows times size of at least 1",
                mend="raise size, or take more windows",
            )

    @property
    def idle(self) -> bool:
        return super().idle or self.size == 1

    def patch(self) -> Windows:
        return Windows(self.size, self.windows)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if not self.idle:
            self.patch().check_shape(shape)

    def guided(self, step: Step, weak_denoised: Tensor, scale: Tensor) -> Tensor:
        led = away_from(step.denoised, step.evaluated["cond"], weak_denoised, scale)
        if not self.masked:
            return led
        overlap = self.patch().covered(*led.shape[-2:]).to(led.device) > 1
        return torch.where(overlap, led, step.denoised)
