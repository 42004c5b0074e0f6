r"""Classifier guidance: the gradient of a noisy-latent classifier's log-probability joins the score.

    D += w * sigma**2 / alpha * grad_x log p(y | x, sigma)                          (score form)
    eps -= w * sqrt(1 - alpha_bar) * grad_x_vp log p(y | x, sigma)                  (eps form, the same thing)

Reference: arXiv 2105.05233, eq. 14 and Algorithm 2. The scale w, which stands there and was lost in many notes, multiplies the
gradient. It is the gradient of the log-*probability* that is added, not of the classification loss, which has the other sign.
Space: the score; the two forms agree to rounding and both work with every sampler.

Scaling of w: *raw* is the papers'. *relative* holds the length of the added term at w times the length of x - D, for each
sample by itself, so that one setting serves every classifier and resolution (w = 0.1 adds a tenth); it is the default. *entropy*
multiplies w by log K / H(p(. | x)), which raises it where the classifier is sure and its gradient vanishes (arXiv 2206.11474).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..process import Process, expand
from .base import NodeText, Stage, Step
from .gradient import relative_scale, score_form
from .knobs import Choice, Number
from .noisy_classifier import ClassifierRule


def eps_form(process: Process, x: Tensor, denoised: Tensor, unit_gradient: Tensor, sigma: Tensor) -> Tensor:
    """The same, by way of eps: eps - sqrt(1 - alpha_bar) * w grad_u log p, as DDIM writes it (Algorithm 2)."""
    noise_part = (1 - process.alphas_cumprod(sigma)).sqrt()
    eps = process.eps(x, denoised, sigma) - expand(noise_part, x) * unit_gradient
    shifted = process.denoised_from_eps(x, eps, sigma)
    return torch.where(expand(process.alpha(sigma) == 0, x), torch.zeros_like(x), shifted - denoised)


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(ClassifierRule):
    stage: ClassVar[Stage] = Stage.GRADIENT
    node: ClassVar[NodeText] = NodeText(
        id="LGClassifierGuidance",
        name="Classifier Guidance",
        name_zh="分类器引导",
        description="Steers the picture towards a label of a noisy-latent classifier, at every step, with any sampler.",
        description_zh="在每一步把画面引向带噪潜变量分类器的某个标签，适用于任何采样器。",
        search_aliases=("classifier guidance", "gradient guidance", "steer", "label"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.1 to 0.8 relative, 1 to 10 raw",
            label_zh="引导强度",
            help="Strength of the push; 0 is off, more is clearer and less varied up to a point, below 0 steers away. Its unit is "
            "that of scaling.",
            help_zh="推动的强度：0 关闭，在一定范围内越大越明确、多样性越低，负值则远离目标。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "raw", "entropy"),
            label_zh="强度换算",
            help="relative: guidance_scale is the fraction of x - denoised that is added, for every classifier (0.1 to 0.8); raw: "
            "the papers' scale, 1 is Bayes' rule (at its best on the emoji model 30, in 30 steps); entropy: "
            "raw, raised where the classifier is already sure (about a third of raw's number).",
            help_zh="relative：所加项占 x - denoised 长度的比例，对任何分类器都适用（0.1 到 0.8）；raw：论文中的强度，1 即贝叶斯公式"
            "（emoji 模型上以 30 为佳，30 步时）；entropy：在 raw 的基础上，分类器已有把握时提高强度（数值约为 raw 的三分之一）。",
        ),
    ] = "relative"
    form: Annotated[
        str,
        Choice(
            options=("score", "eps"),
            label_zh="公式形式",
            help="The classical ways to write it, score or eps; the pictures agree to rounding.",
            help_zh="经典的两种写法：score 或 eps；结果只差舍入误差。",
        ),
    ] = "score"

    def apply(self, step: Step) -> Tensor:
        process, x, sigma = step.process, step.x, step.sigma
        gradient = self.gradient(process, x, sigma, step.index, by_entropy=self.scaling == "entropy", note=step.note)
        if self.form == "eps":
            shift = eps_form(process, x, step.denoised, gradient, sigma)
        else:
            shift = score_form(process, gradient, sigma)
        return shift if self.scaling != "relative" else relative_scale(shift, x, step.denoised, self.guidance_scale)
