r"""DPS: a loss's gradient with respect to x, through the denoiser.

    x_{t-1} -= zeta / sqrt(L(D)) * grad_{x_t} L(D(x_t))                                 (paper, Algorithm 1)
    D -= s sigma^2 / alpha * grad_x L(D(x))                                             (score form)

Reference: arXiv 2209.14687, Algorithm 1 with appendix C.2 (zeta_i = zeta' / ||y - A(x0)||); the score form is its eq. 11, where L(D) = -log
p(y | x0 = D) stands for -log p(y | x), which is biased wherever the posterior of x0 has a width (see tests/guidance/test_x0_oracles.py for
how much on a Gaussian).
Space: x in VP coordinates. Scaling *paper* is the first form, with the loss in the place of ||y - A(x0)||^2, and adds to D what makes an
Euler or DDIM (eta = 0) step end zeta / sqrt(L) grad L lower, exactly (see ``Process.step_to_denoised_shift`` for other samplers: under the
paper's own, DDPM's, it ends up to twice as far). With L = c ||r||^2 that is 2 sqrt(c) zeta' grad ||r||; the authors' code takes zeta' grad
||r||, so its scale is this one's times 2 sqrt(c): 2 for a sum of squares. *score* is the second form, which is right for a loss that is a
negative log-likelihood, and for every sampler.

The gradient passes through everything that made the guided estimate: all branches, and the rules before GRADIENT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import expand
from .base import NodeText, Step
from .gradient import score_form
from .grid import next_level
from .knobs import Choice, Number
from .loss_rule import LossRule, x_step


def by_residual(gradient: Tensor, values: Tensor) -> Tensor:
    """``gradient`` (B, ...) divided by the root of the loss (B,), for a sum of squares the norm of its residual.

    Where the loss is not above 0, the gradient stays as it is.
    """
    positive = values > 0
    root = torch.where(positive, values, torch.ones_like(values)).sqrt()
    return gradient / expand(root, gradient).to(gradient)


@dataclass(frozen=True, kw_only=True)
class DPS(LossRule):
    through_denoiser: ClassVar[bool] = True
    guider_only: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGDPS",
        name="DPS (Loss through the Denoiser)",
        name_zh="DPS（穿过去噪器的损失引导）",
        description="Pulls the picture towards a loss by its gradient with respect to x, through the diffusion model. Each step at which "
        "it acts takes about three times as long and the memory of a training step; window and every_k bound both. In Guider only.",
        description_zh="用损失对 x 的梯度（穿过扩散模型）把画面拉向目标。起作用的每一步约需三倍时间和训练一步的显存；"
        "可用 sigma 窗口和“每 k 步”限制。仅用于引导器。",
        search_aliases=("DPS", "diffusion posterior sampling", "loss guidance", "inverse problem", "through the UNet"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.1 to 1",
            label_zh="引导强度",
            help="Strength of the pull; 0 is off, below 0 pushes away. Its unit is that of scaling.",
            help_zh="拉力强度；0 关闭，负值则推离。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "paper", "score"),
            label_zh="强度换算",
            help="relative: the pull is guidance_scale times as long as x - denoised; paper: zeta', divided by the root of the loss; "
            "score: the loss is taken as a negative log-likelihood, 1 is Bayes' rule.",
            help_zh="relative：拉力长度为 x - denoised 的 guidance_scale 倍；"
            "paper：论文的 zeta'，除以损失的平方根；score：把损失当作负对数似然，1 即贝叶斯公式。",
        ),
    ] = "relative"

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        values, gradient = self.loss_gradient(step, step.denoised)
        lower = -self.guidance_scale * self.pulled_back(gradient, step)
        if self.scaling == "paper":
            return x_step(step.process, by_residual(lower, values), step.sigma, next_level(step.sigma, sigmas))
        shift = score_form(step.process, lower, step.sigma)
        return self.relative(shift, step) if self.scaling == "relative" else shift
