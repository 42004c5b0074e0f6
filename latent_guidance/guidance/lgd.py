r"""LGD-MC: the loss averaged over a Gaussian around the estimate, and its gradient through the denoiser.

    D -= w sigma^2 / alpha * grad_x l~(D(x)),     l~(D) = -log 1/n sum_i exp(-l(D + r z_i))
    r = sigma / sqrt(alpha^2 + sigma^2)

Reference: Song et al., "Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation" (ICML 2023), eq. 8-10 and sec. 4.1
(r_t = sigma_t / sqrt(1 + sigma_t^2)), and
arXiv 2409.15761, sec. 3.2 (the same as "implicit dynamics").
Space: x, in the score form. p(x0 | x) is taken as N(D, r^2), which is right for data of unit variance without structure: on such a
Gaussian the
loss of a Gaussian measurement is guided exactly as n grows, where DPS (r = 0) is biased (tests/guidance/test_x0_oracles.py).
*spread* scales r; at 0 this is DPS
in its score form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from .base import NodeText, Step
from .gradient import score_form
from .knobs import Choice, Number, Whole
from .loss_rule import LossRule
from .smoothing import draws_like, smoothed_gradient


@dataclass(frozen=True, kw_only=True)
class LossGuidedDiffusion(LossRule):
    through_denoiser: ClassVar[bool] = True
    guider_only: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGLossGuidedDiffusion",
        name="LGD-MC (Smoothed Loss)",
        name_zh="LGD-MC（平滑损失引导）",
        description="As DPS, with the loss looked at in several places around the estimate, which steadies it at high noise. The "
        "loss and the VAE "
        "are paid for once for each draw. In Guider only.",
        description_zh="与 DPS 相同，但在估计附近的多个位置计算损失，高噪声时更稳定。损失和 VAE 的开销按抽样数增加。仅用于引导器。",
        search_aliases=("LGD", "loss-guided diffusion", "Monte Carlo", "plug and play", "through the UNet"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="1 (score)",
            label_zh="引导强度",
            help="Strength of the pull; 0 is off, below 0 pushes away. Its unit is that of scaling.",
            help_zh="拉力强度；0 关闭，负值则推离。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "score"),
            label_zh="强度换算",
            help="relative: the pull is guidance_scale times as long as x - denoised; score: the loss is taken as a negative "
            "log-likelihood, 1 is "
            "Bayes' rule.",
            help_zh="relative：拉力长度为 x - denoised 的 guidance_scale 倍；score：把损失当作负对数似然，1 即贝叶斯公式。",
        ),
    ] = "relative"
    draws: Annotated[
        int,
        Whole(
            min=1,
            max=64,
            label_zh="抽样数",
            help="In how many places around the estimate the loss is looked at; the paper takes 1 to 10.",
            help_zh="在估计附近计算损失的位置数；论文取 1 到 10。",
        ),
    ] = 4
    spread: Annotated[
        float,
        Number(
            min=0.0,
            max=4.0,
            step=0.05,
            neutral=0.0,
            paper_range="1",
            label_zh="展宽",
            help="How far around the estimate, times sigma / sqrt(alpha^2 + sigma^2); 0 looks at the estimate itself, as DPS does.",
            help_zh="抽样半径，相对于 sigma / sqrt(alpha^2 + sigma^2) 的倍数；0 表示只看估计本身，即 DPS。",
        ),
    ] = 1.0
    seed: Annotated[
        int,
        Whole(
            min=0,
            max=2**31,
            label_zh="随机种子",
            help="Of the draws; they are the same for every picture of a batch.",
            help_zh="抽样的随机种子；同一批的每张图片使用相同的抽样。",
        ),
    ] = 0

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        radius = self.spread * step.sigma * step.process.unit_scale(step.sigma)
        around = draws_like(step.denoised, self.draws, self.seed, step.index, radius)
        _, gradient = smoothed_gradient(lambda at: self.loss_gradient(step, at), step.denoised, radius, around)
        shift = score_form(step.process, -self.guidance_scale * self.pulled_back(gradient, step), step.sigma)
        return self.relative(shift, step) if self.scaling == "relative" else shift
