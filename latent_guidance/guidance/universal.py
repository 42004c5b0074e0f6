r"""Universal guidance: a step through the denoiser, and steps of gradient descent at the estimate itself.

    eps += s sqrt(1 - alpha_bar) grad_{x_t} l(D(x_t))                                   (forward)
    delta = m steps of gradient descent on l(D + delta), from 0;     D += delta         (backward)

Reference: arXiv 2302.07121, Algorithm 1 with eq. 6 and s(t) = s sqrt(1 - alpha_bar) as in sec. 4 (forward), eq. 7 and 9 (backward: eps -=
sqrt(alpha_bar / (1 - alpha_bar)) delta, which is D += delta). Its per-step self-recurrence is a sampler's option.
Space: forward in eps (VP coordinates), the score form; backward in the denoised estimate, with eps following. Both start from the unguided
estimate, as in the algorithm; plain gradient descent, as in the paper's text (the authors' code takes Adam, starts the descent from the
estimate after the forward part, clamps it, and has none for Stable Diffusion: m = 0).

The forward part has DPS's bias, the backward part one of its own: both are measured in tests/guidance/test_x0_oracles.py.
With scaling *relative* the forward part is guidance_scale times as long as x - D, and every step of descent step_size times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from .base import NodeText, Step
from .gradient import score_form
from .knobs import Choice, Number, Whole
from .loss_rule import LossRule


@dataclass(frozen=True, kw_only=True)
class UniversalGuidance(LossRule):
    through_denoiser: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGUniversalGuidance",
        name="Universal Guidance",
        name_zh="通用引导（Universal Guidance）",
        description="Pulls towards a loss through the diffusion model, and then by some steps of descent at the estimate itself. With "
        "guidance_scale 0 nothing goes through the model. In Guider; with guidance_scale 0 also in Apply Guidance to Model.",
        description_zh="先穿过扩散模型拉向损失，再在估计处做若干步梯度下降。guidance_scale "
        "为 0 时不经过扩散模型，此时也可用于“将引导应用于模型”。",
        search_aliases=("universal guidance", "forward", "backward", "loss guidance", "training-free"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.1 to 1 (relative)",
            label_zh="前向强度",
            help="Strength s of the pull through the diffusion model; 0 leaves it out. Its unit is that of scaling.",
            help_zh="穿过扩散模型的拉力强度 s；0 表示不使用。单位取决于强度换算。",
        ),
    ] = 0.1
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "raw"),
            label_zh="强度换算",
            help="relative: both strengths are fractions of the length of x - denoised; raw: the paper's s and rate of descent.",
            help_zh="relative：两种强度都是 x - denoised 长度的比例；raw：论文中的 s 与下降步长。",
        ),
    ] = "relative"
    steps: Annotated[
        int,
        Whole(
            min=0,
            max=100,
            neutral=0,
            label_zh="下降步数",
            help="Steps of gradient descent at the estimate (m); each costs the loss and the VAE once more.",
            help_zh="在估计处梯度下降的步数 m；每步都要再计算一次损失和 VAE。",
        ),
    ] = 2
    step_size: Annotated[
        float,
        Number(
            min=0.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            label_zh="下降步长",
            help="How far each step of descent goes, in the unit of scaling; 0 leaves descent out.",
            help_zh="每步下降的幅度，单位取决于强度换算；0 表示不下降。",
        ),
    ] = 0.1

    @property
    def off(self) -> bool:
        return self.guidance_scale == 0 and (self.steps == 0 or self.step_size == 0)

    def may_differentiate(self) -> bool:
        return self.guidance_scale != 0

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        shift, descent = torch.zeros_like(step.denoised), torch.zeros_like(step.denoised)
        if self.guidance_scale != 0:
            _, gradient = self.loss_gradient(step, step.denoised)
            shift = score_form(step.process, -self.guidance_scale * self.pulled_back(gradient, step), step.sigma)
            shift = self.relative(shift, step) if self.scaling == "relative" else shift
        for _ in range(self.steps if self.step_size else 0):
            _, gradient = self.loss_gradient(step, step.denoised + descent)
            move = -self.step_size * self.kept(gradient, step)
            descent = descent + (self.relative(move, step, self.step_size) if self.scaling == "relative" else move)
        return shift + descent
