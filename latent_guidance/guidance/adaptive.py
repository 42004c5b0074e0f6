r"""Adaptive guidance: once the two branches agree, the rest of the run goes without the unconditional one.

    gamma = <D_c, D_u> / (||D_c|| ||D_u||);      from the step after the first one with gamma > threshold on:  w = 1

each sample by itself. A sample that has agreed stays with the prompt alone until the run ends; when all samples of a batch have, the
second pass through the network is no longer paid for. (On a model under ComfyUI's KSampler the program evaluates the negative
regardless: the picture is the same, and the time is saved with the Guider node.)

Reference: arXiv 2312.12487, adaptive guidance: the policy that runs CFG while gamma is below a threshold and the conditional model after.
Space: D. The paper's gamma is the cosine of the network's outputs and its threshold 0.991 for models of its own; the cosine
of two noise predictions is close to 1 where they differ most (in eps 0.999 at the first of 20 steps on the bundled model), while that
of two denoised estimates rises to 1 in every model, since both become x. Public ComfyUI nodes compare these too.
Deviations: that space; samples are compared one by one; what is compared are the branches as rules that change them left them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .base import NodeText, Rule, Stage, Step
from .knobs import Number


def agreement(cond: Tensor, uncond: Tensor) -> Tensor:
    """The cosine (B,) of the angle between ``cond`` and ``uncond`` (B, ...), at most 1; 0 where one of them is zero."""
    return functional.cosine_similarity(cond.flatten(1), uncond.flatten(1), dim=1).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Rule):
    stage: ClassVar[Stage] = Stage.SCALE
    rests_at_one: ClassVar[bool] = True
    looks_at_branches: ClassVar[bool] = True
    may_spare: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGAdaptiveGuidance",
        name="Adaptive Guidance",
        name_zh="自适应引导",
        description="Stops guiding once prompt and negative prompt agree, which in the Guider halves the cost of the remaining steps.",
        description_zh="一旦正向与反向估计达成一致就停止引导，在引导器中其余步骤的计算量减半。",
        search_aliases=("adaptive guidance", "adaptive guider", "skip uncond", "faster cfg"),
    )

    threshold: Annotated[
        float,
        Number(
            min=0.0,
            max=1.0,
            step=0.0005,
            neutral=1.0,
            paper_range="0.99 to 0.9999; lower is faster and changes more",
            paper_range_zh="0.99 到 0.9999；越低越快，改变也越多",
            label_zh="一致阈值",
            help="Cosine similarity of the two estimates above which the rest of the run goes by the prompt alone.",
            help_zh="两个估计的余弦相似度超过此值后，其余步骤只用提示词。",
        ),
    ] = 0.999

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Tensor]:
        agreed_at: Tensor | None = None  # the noise level of each sample, NaN until it agrees

        def apply(step: Step) -> Tensor:
            nonlocal agreed_at
            w = step.guidance_scale
            if agreed_at is None or agreed_at.shape != w.shape:
                agreed_at = torch.full_like(w, torch.nan)
            if "uncond" in step.estimates:  # paid for: this step is guided as it is
                new = agreed_at.isnan() & (agreement(step.cond_denoised, step.uncond_denoised) > self.threshold)
                agreed_at = torch.where(new, step.sigma.to(w), agreed_at)
                return w
            again = agreed_at == step.sigma.to(w)  # a step that is evaluated again is guided again
            return torch.where(agreed_at.isnan() | again, w, torch.ones_like(w))

        return apply
