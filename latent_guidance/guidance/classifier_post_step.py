r"""Classifier guidance after the step: the plainest form, as tutorials write it.

    x_{t-1} += w * grad_x_vp log p(y | x_{t-1})

Space: VP coordinates. The step's variance does not enter, so w has no common scale with the other forms: it is kept to compare.
(Many tutorials add "the gradient of the classification loss", which has the wrong sign.)
Reference: none; compare arXiv 2105.05233, Algorithm 1, which has Sigma before the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from .base import NodeText
from .classifier_step import ClassifierStepRule
from .knobs import Number


@dataclass(frozen=True, kw_only=True)
class ClassifierPostStep(ClassifierStepRule):
    sampler_option: ClassVar[str] = "post_step"
    node: ClassVar[NodeText] = NodeText(
        id="LGClassifierPostStep",
        name="Classifier Post-Step (DDPM)",
        name_zh="分类器步后修正 (DDPM)",
        description="Adds the classifier's gradient after each DDPM step. Its scale compares with no other form's (try 0.01 to 0.5). "
        "Connect it to the DDPM sampler, not to the guider.",
        description_zh="在每个 DDPM 步之后加上分类器梯度。其强度与其他形式不可比（可从 0.01 到 0.5 试起）。"
        "请连接到 DDPM 采样器，而不是引导器。",
        search_aliases=("classifier guidance", "post step"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.01 to 0.5",
            label_zh="引导强度",
            help="What the gradient is multiplied by after each step; 0 is off, below 0 steers away. It has no unit in common with the "
            "other forms.",
            help_zh="每步之后梯度所乘的系数；0 关闭，负值则远离目标。与其他形式没有共同的单位。",
        ),
    ] = 0.1
