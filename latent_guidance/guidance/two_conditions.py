r"""Two conditions, each with a scale of its own: that of the prompt, and that of another condition which the prompt's includes or not.

    D = D_u + w_1 (D_1 - D_u) + w_2 (D_2 - D_1)    (nested)
    D = D_u + w_1 (D_1 - D_u) + w_2 (D_2 - D_u)    (sum)

D_2 is the estimate of the guider's positive condition, D_u that of its negative, D_1 that of the condition connected here. In
nested form D_2 goes by *both* conditions and D_1 by the first alone: for a model that edits pictures, the picture without the
instruction, while D_u has neither. In the sum each of D_1 and D_2 goes by one condition. Neutral is the prompt alone:
w_1 = w_2 = 1 nested, w_1 = 0 and w_2 = 1 summed.

All three go through the network in one call. Nested with w_1 = 1 the negative cancels and is not evaluated; where rules for the scale
leave guidance closed, the prompt alone is.

Reference: arXiv 2211.09800, eq. 3 (nested; w_1 is its s_I, w_2 its s_T); the sum is the composition of arXiv 2206.01714.
Space: any affine one (D, eps and v give the same result); computed in D.
Deviations: none in the formulas. Rules for the scale move both scales towards neutral in the same proportion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..process import expand
from .base import Branch, NodeText, Rule, Stage, Step
from .knobs import Choice, Number, Socket


def nested(uncond: Tensor | None, first: Tensor, second: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """D_u + w_1 (D_1 - D_u) + w_2 (D_2 - D_1), exactly D_2 where both scales are 1.

    Args:
        uncond: D_u (B, ...); None where w_1 is 1 everywhere, since it cancels.
        first: D_1 (B, ...).
        second: D_2 (B, ...).
        w1: (B,).
        w2: (B,).
    """
    by_first, by_second = expand(w1, second), expand(w2, second)
    base = first if uncond is None else torch.where(by_first == 1, first, uncond + by_first * (first - uncond))
    guided = base + by_second * (second - first)
    return torch.where((by_first == 1) & (by_second == 1), second, guided)


def summed(uncond: Tensor, first: Tensor, second: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """D_u + w_1 (D_1 - D_u) + w_2 (D_2 - D_u), exactly D_2 where w_1 = 0 and w_2 = 1. Shapes as in :func:`nested`."""
    by_first, by_second = expand(w1, second), expand(w2, second)
    guided = uncond + by_first * (first - uncond) + by_second * (second - uncond)
    return torch.where((by_first == 0) & (by_second == 1), second, guided)


@dataclass(frozen=True, kw_only=True)
class TwoConditions(Rule):
    stage: ClassVar[Stage] = Stage.COMBINE
    node: ClassVar[NodeText] = NodeText(
        id="LGTwoConditions",
        name="Two-Condition Guidance",
        name_zh="双条件引导",
        description="Guides by two conditions with a scale each, as InstructPix2Pix does with its picture and its instruction.",
        description_zh="用两个条件引导，各有强度，如 InstructPix2Pix 的图片与指令。",
        search_aliases=("instructpix2pix", "ip2p", "dual cfg", "two prompts", "image cfg", "composable"),
    )

    condition: Annotated[
        Any,
        Socket(
            type="CONDITIONING",
            made_by="the encoding of the first condition",
            label_zh="第一条件",
            help="The first condition; the guider's positive is the second one, and in nested form has this one in it.",
            help_zh="第一个条件；引导器的正向条件是第二个，嵌套形式下它还应包含第一个条件。",
        ),
    ]
    first_scale: Annotated[
        float,
        Number(
            min=-100.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="1 to 1.5 for a picture",
            paper_range_zh="图片条件取 1 到 1.5",
            label_zh="第一强度",
            help="Scale of the condition connected here; in the sum form its neutral value is 0.",
            help_zh="此处所连条件的强度；求和形式下中性值为 0。",
        ),
    ] = 1.5
    second_scale: Annotated[
        float,
        Number(
            min=-100.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="5 to 10 for an instruction",
            paper_range_zh="指令条件取 5 到 10",
            label_zh="第二强度",
            help="Scale of the guider's positive condition.",
            help_zh="引导器正向条件的强度。",
        ),
    ] = 7.5
    form: Annotated[
        str,
        Choice(
            options=("nested", "sum"),
            label_zh="公式形式",
            help="nested: the positive condition includes the first one; sum: the two are apart, each against the negative.",
            help_zh="nested：正向条件包含第一个条件；sum：两个条件各自独立，都与反向条件比较。",
        ),
    ] = "nested"

    @property
    def _neutral_first(self) -> float:
        return 1.0 if self.form == "nested" else 0.0

    @property
    def guidance_scale(self) -> float:
        """1 and how far the scale that is farthest from neutral is from it: the w which rules for the scale are given and change."""
        return 1 + max(self.first_scale - self._neutral_first, self.second_scale - 1, key=abs)

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.condition),)

    def may_ask(self) -> frozenset[str]:
        if self.guidance_scale == 1:
            return frozenset()
        names = frozenset(branch.name for branch in self.branches())
        cancels = self.form == "nested" and self.first_scale == 1
        return names if cancels else names | {"uncond"}

    def asks(self, step: Step) -> frozenset[str]:
        return frozenset() if bool((step.guidance_scale == 1).all()) else self.may_ask()

    def apply(self, step: Step) -> Tensor:
        share = step.share_of(self.guidance_scale)
        neutral = self._neutral_first
        w1 = torch.where(share == 1, self.first_scale, neutral + (self.first_scale - neutral) * share)
        w2 = torch.where(share == 1, self.second_scale, 1 + (self.second_scale - 1) * share)
        [branch] = self.branches()
        first, second = step.estimates[branch.name], step.cond_denoised
        if self.form == "nested":
            return nested(step.estimates.get("uncond"), first, second, w1, w2)
        return summed(step.uncond_denoised, first, second, w1, w2)
