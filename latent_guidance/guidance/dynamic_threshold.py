r"""Dynamic thresholding: strong guidance with the range that weaker guidance would have had.

    D_m  = D_u + m * (D_c - D_u)                        what the plain scale m would have given
    c    = D - mean(D),   a = max |D_m - mean(D_m)|        mean: of each channel
    s    = max(q, a),     q = the p-quantile of |c|
    D'   = mean(D) + clamp(c, -s, s) * a / s
    out  = strength * D' + (1 - strength) * D

Maximum and quantile are over the positions of each channel of each sample, or over all of a sample. Where max |c| <= a (at m = w
always) nothing is changed; where q <= a only the values beyond a are clamped.

Reference: arXiv 2205.11487 (Imagen), sec. 2.3: clip x0 to its p-quantile s of |x0| (at least 1, the range of pixels) and divide by s.
Latents have no range of their own, so the plain scale gives one: the "mimic scale" of mcmonkey's Dynamic Thresholding for A1111 and
ComfyUI, whose full node with startpoint MEAN, variability AD and constant scales this is for each sample (there the statistic
without separate channels, which its simple node uses, is taken over the whole batch).
Space: D. It comes after the estimates were combined: a rule before it that changed them (CFG-Zero*, rescale) is thresholded too,
while D_m is plain guidance between the branches. Steps that evaluated no unconditional branch (w = 1) are left alone.
The quantile is interpolated linearly between values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from .base import NodeText, Rule, Stage, Step
from .cfg import cfg
from .knobs import Number, Switch


def quantile(values: Tensor, p: float) -> Tensor:
    """The p-quantile (..., 1) of values (..., M), linear between values; torch.quantile refuses more than 2**24 values."""
    ordered = values.sort(dim=-1).values
    place = p * (values.shape[-1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], place - below)


def dynamic_threshold(guided: Tensor, plain: Tensor, percentile: float, *, by_channel: bool) -> Tensor:
    """D' of the guided estimate D and the plain one D_m.

    Args:
        guided: D (B, C, ...).
        plain: D_m (B, C, ...).
        percentile: p in [0, 1]; 1 is the largest value.
        by_channel: the range of each channel by itself, else of the whole sample.
    """
    flat, reference = guided.flatten(2), plain.flatten(2)  # (B, C, M)
    mean = flat.mean(dim=-1, keepdim=True)
    centred = flat - mean
    sizes, wanted = centred.abs(), (reference - reference.mean(dim=-1, keepdim=True)).abs()
    if not by_channel:
        sizes, wanted = sizes.flatten(1)[:, None], wanted.flatten(1)[:, None]  # (B, 1, C M)
    target = wanted.amax(dim=-1, keepdim=True)
    limit = torch.maximum(quantile(sizes, percentile), target)
    shrink = torch.where(limit > 0, target / limit, torch.ones_like(limit))
    held = mean + centred.clamp(-limit, limit) * shrink
    return torch.where(sizes.amax(dim=-1, keepdim=True) <= target, flat, held).reshape(guided.shape)


@dataclass(frozen=True, kw_only=True)
class DynamicThresholding(Rule):
    stage: ClassVar[Stage] = Stage.POST
    looks_at_branches: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGDynamicThresholding",
        name="Dynamic Thresholding",
        name_zh="动态阈值",
        description="Strong guidance without burnt colours: holds the latent to the range that a plain guidance scale would give.",
        description_zh="强引导也不致颜色过饱和：把潜变量限制在普通引导强度所给出的范围内。",
        search_aliases=("dynthresh", "dynamic thresholding", "mimic scale", "cfg scale fix", "thresholding"),
    )

    plain_scale: Annotated[
        float,
        Number(
            min=0.0,
            max=100.0,
            step=0.5,
            paper_range="4 to 10",
            label_zh="普通引导强度",
            help="The guidance scale whose range is imitated (mimic scale): one that gives good colours on this model. "
            "Neutral: the guidance scale itself.",
            help_zh="被模仿其数值范围的引导强度（mimic scale）：在该模型上颜色正常的强度。中性值：与引导强度相同。",
        ),
    ] = 7.0
    percentile: Annotated[
        float,
        Number(
            min=0.0,
            max=1.0,
            step=0.005,
            paper_range="0.95 to 1",
            label_zh="分位数",
            help="Which quantile of the guided values counts as their range: 1 is the largest; lower ones clamp the outliers. "
            "Neutral: none by itself.",
            help_zh="以引导结果的哪个分位数作为其范围：1 为最大值；较小的值会截断离群值。本身没有中性值。",
        ),
    ] = 0.95
    by_channel: Annotated[
        bool,
        Switch(
            label_zh="分通道",
            help="Measure the range of each latent channel by itself, or of the whole latent at once.",
            help_zh="分别统计每个潜变量通道的范围，或统计整个潜变量的范围。",
        ),
    ] = True
    strength: Annotated[
        float,
        Number(
            min=0.0,
            max=1.0,
            step=0.05,
            neutral=0.0,
            label_zh="混合比例",
            help="How much of the thresholded estimate is mixed in: 0 is plain guidance, 1 all of it.",
            help_zh="阈值处理结果所占比例：0 为普通引导，1 为全部采用。",
        ),
    ] = 1.0

    def apply(self, step: Step) -> Tensor:
        guided = step.denoised
        if self.strength == 0 or "uncond" not in step.estimates:
            return guided
        scale = torch.full_like(step.guidance_scale, self.plain_scale)
        plain = cfg(step.cond_denoised, step.uncond_denoised, scale)
        held = dynamic_threshold(guided, plain, self.percentile, by_channel=self.by_channel)
        return self.strength * held + (1 - self.strength) * guided
