r"""FreeDoM: an energy's gradient with respect to x, through the denoiser, with a strength that follows the noise level.

    x_{t-1} -= rho_t * grad_{x_t} E(D(x_t))
    rho_t = rho sqrt(alpha_bar_t),  or  rho ||w (eps_c - eps_u)|| / ||grad E|| * 0.2    (code of the authors)

Reference: arXiv 2303.09833, Algorithm 1 and eq. 14; rho_t is left open there ("learning rate"), the two forms are those of the authors'
code for pixel models (with sqrt(alpha_bar)) and for Stable Diffusion (by the size of the CFG correction; 0.08 in the place of 0.2 for
poses); a third, by the size of eps, it has for texts on pixel models. E there is the norm of a residual, not its square, and it samples
with eta = 0.5 or 1, under which a step ends farther (``Process.step_to_denoised_shift``). Its time travel is a sampler's option
(recurrence), not part of the rule.
Space: x in VP coordinates. What is added to D makes an Euler or DDIM (eta = 0) step end rho_t grad E lower, exactly: divided by 1 -
sigma_next / sigma.
Like DPS it takes p(y | x0 = D) for p(y | x); how far it goes wrong is measured in tests/guidance/test_x0_oracles.py: a scale that fits high
noise is many times too strong at low noise there.
Deviation: norms are per sample (the authors' code takes them over the batch), and without a negative estimate the correction form adds
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import expand
from .base import NodeText, Step
from .gradient import sample_norm
from .grid import next_level
from .knobs import Choice, Number
from .loss_rule import LossRule, x_step

CORRECTION_SHARE = 0.2
"""Of the length of the CFG correction in eps, at rho = 1: a constant of the authors' code."""


@dataclass(frozen=True, kw_only=True)
class FreeDoM(LossRule):
    through_denoiser: ClassVar[bool] = True
    guider_only: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGFreeDoM",
        name="FreeDoM (Energy Guidance)",
        name_zh="FreeDoM（能量引导）",
        description="Pulls the picture towards a loss through the diffusion model, with a strength that grows as the noise goes, or one "
        "measured by the CFG correction. About three times the time of a step at which it acts. In Guider only.",
        description_zh="穿过扩散模型把画面拉向损失，强度随噪声减小而增大，或按 CFG "
        "修正量的大小确定。起作用的步骤约需三倍时间。仅用于引导器。",
        search_aliases=("FreeDoM", "energy guidance", "training-free", "loss guidance", "through the UNet"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.2 to 1 (relative, correction)",
            label_zh="引导强度",
            help="Strength rho of the pull; 0 is off, below 0 pushes away. Its unit is that of scaling.",
            help_zh="拉力强度 rho；0 关闭，负值则推离。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "signal", "correction"),
            label_zh="强度换算",
            help="relative: the pull is guidance_scale times as long as x - denoised; signal: rho sqrt(alpha_bar) times the "
            "gradient; correction: a "
            "fifth of rho times the length of the CFG correction (0 where there is no CFG).",
            help_zh="relative：拉力长度为 x - denoised 的 guidance_scale 倍；signal：梯度乘以 rho "
            "sqrt(alpha_bar)；correction：长度为 CFG 修正量的 rho/5（没有 CFG 时为 0）。",
        ),
    ] = "relative"

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        process, sigma, sigma_next = step.process, step.sigma, next_level(step.sigma, sigmas)
        _, gradient = self.loss_gradient(step, step.denoised)
        lower = -self.guidance_scale * self.pulled_back(gradient, step)
        if self.scaling == "relative":
            return self.relative(x_step(process, lower, sigma, sigma_next), step)
        if self.scaling == "correction":
            lower = lower * expand(self._by_correction(step, lower), lower)
        else:
            lower = lower * expand(process.alphas_cumprod(sigma).sqrt(), lower)
        return x_step(process, lower, sigma, sigma_next)

    def _by_correction(self, step: Step, lower: Tensor) -> Tensor:
        """What brings ``lower`` (B, ...) to 0.2 |rho| times the length of w (eps_c - eps_u), as (B,); 0 without a negative estimate."""
        if "uncond" not in step.estimates:
            return torch.zeros_like(step.sigma)
        apart = sample_norm(
            step.process.eps(step.x, step.cond_denoised, step.sigma)
            - step.process.eps(step.x, step.uncond_denoised, step.sigma)
        )
        length = sample_norm(lower)
        wanted = CORRECTION_SHARE * abs(self.guidance_scale) * step.guidance_scale.abs() * apart
        return torch.where(length > 0, wanted / length, torch.zeros_like(length))
