r"""Frequency-decoupled guidance: the difference between the branches is guided by one scale for each band of frequencies.

    D = sum over bands k of psi_k[D_u] + w_k (psi_k[D_c] - psi_k[D_u]),      psi = Laplacian pyramid, L_k = G_k - up(G_{k+1})

computed as D_u + w_K Delta + (the pyramid of Delta with its bands scaled by w_k - w_K, put together), Delta = D_c - D_u, which is the
same since psi is linear, and which is exactly plain CFG where all scales are equal and exactly D_c where they are 1. Low frequencies
carry the layout, the colours and the loss of variety of strong guidance, high ones the details: guide the low ones gently.

These scales take the place of CFG's. A rule for the scale acts on all of them alike: where it brings w from ``guidance_scale``
(the one that is farthest from 1) a fraction of the way to 1, each w_k goes the same fraction of its way; at w = 1 no second pass is paid.

The pyramid is Burt and Adelson's kernel (1 4 6 4 1)/16 with mirrored borders, and halving and doubling by linear interpolation, as in
the paper's code. Levels of odd size are halved upwards and doubled back to the size they came from, so that every size is kept. Video
latents (B, C, T, H, W) are guided frame by frame.

Reference: arXiv 2506.19713, eq. 5 and 6, algorithms 1 and 2, app. B for the pyramid; the scales of its table 8.
Space: D, as in the paper's app. D (any affine one gives the same, since psi is linear).
Deviations: between the lowest and the highest band the scales are interpolated linearly, where the paper's multi-level form has a
free one for each (so has the function here); its optional projection onto the conditional estimate is another rule (APG).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..process import expand
from .base import NodeText, Rule, Stage, Step
from .cfg import cfg
from .knobs import Number, Whole

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def blur(x: Tensor) -> Tensor:
    """x (B, N, H, W) convolved with the pyramid's kernel along both axes; borders are mirrored without repeating the edge."""
    for axis in (2, 3):
        size = x.shape[axis]
        period = max(2 * (size - 1), 1)
        index = torch.arange(-2, size + 2, device=x.device).remainder(period)
        padded = x.index_select(axis, torch.minimum(index, period - index) if size > 1 else index)
        x = sum((weight * padded.narrow(axis, i, size) for i, weight in enumerate(KERNEL)), start=torch.zeros_like(x))
    return x


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """x (B, N, H, W) at another size, by linear interpolation between the centres of its cells."""
    return functional.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def scaled_bands(x: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """x (B, N, H, W) with the bands of its Laplacian pyramid scaled, put together again; the lowest band is left out.

    Args:
        x: any height and width.
        scales: (B,) for each band but the lowest, from fine to coarse.
    """
    levels = [x]
    for _ in scales:
        height, width = levels[-1].shape[2:]
        levels.append(resized(blur(levels[-1]), (height + 1) // 2, (width + 1) // 2))
    bands = [fine - blur(resized(coarse, *fine.shape[2:])) for fine, coarse in pairwise(levels)]
    total = torch.zeros_like(levels[-1])
    for band, scale in reversed(list(zip(bands, scales, strict=True))):
        total = blur(resized(total, *band.shape[2:])) + expand(scale, band) * band
    return total


def frequency_decoupled(cond_denoised: Tensor, uncond_denoised: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """CFG with a scale for each band of frequencies; exactly plain CFG where the scales are equal.

    Args:
        cond_denoised: D_c (B, C, H, W), (B, C, T, H, W) frame by frame, or (B, C, L) along L.
        uncond_denoised: D_u, of the same shape.
        scales: w (B,) for each band, from fine to coarse; the last one is for everything below the others.
    """
    delta = cond_denoised - uncond_denoised
    height, width = delta.shape[-2:] if delta.ndim > 3 else (1, delta.shape[-1])
    planes = delta.reshape(delta.shape[0], -1, height, width)
    above = scaled_bands(planes, [scale - scales[-1] for scale in scales[:-1]])
    return cfg(cond_denoised, uncond_denoised, scales[-1]) + above.reshape(delta.shape)


@dataclass(frozen=True, kw_only=True)
class FrequencyDecoupledGuidance(Rule):
    stage: ClassVar[Stage] = Stage.COMBINE
    node: ClassVar[NodeText] = NodeText(
        id="LGFrequencyDecoupled",
        name="Frequency-Decoupled Guidance",
        name_zh="频率解耦引导 (FDG)",
        description="Guides layout and details by scales of their own. It takes the place of Classifier-Free Guidance and its scale.",
        description_zh="对整体布局和细节分别使用各自的引导强度。它取代无分类器引导及其强度。",
        search_aliases=("fdg", "frequency decoupled guidance", "laplacian pyramid guidance", "low high frequency cfg"),
    )

    scale_low: Annotated[
        float,
        Number(
            min=-100.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="1 to 5",
            label_zh="低频强度",
            help="Guidance scale of the lowest frequencies: layout and colours; 1 is the prompt alone.",
            help_zh="最低频率的引导强度：布局和色彩；1 只用提示词。",
        ),
    ] = 3.0
    scale_high: Annotated[
        float,
        Number(
            min=-100.0,
            max=100.0,
            step=0.1,
            neutral=1.0,
            paper_range="2 to 12",
            label_zh="高频强度",
            help="Guidance scale of the highest frequencies: details; 1 is the prompt alone.",
            help_zh="最高频率的引导强度：细节；1 只用提示词。",
        ),
    ] = 7.0
    bands: Annotated[
        int,
        Whole(
            min=2,
            max=6,
            label_zh="频带数",
            help="How many bands of frequencies there are, each half as fine as the one before; 2 is the paper's.",
            help_zh="频带的数量，每个频带比前一个粗一倍；论文使用 2。",
        ),
    ] = 2

    @property
    def guidance_scale(self) -> float:
        """The scale that is farthest from 1: the w which rules for the scale are given and change."""
        return max(self.scale_low, self.scale_high, key=lambda scale: abs(scale - 1))

    def scales(self, share: Tensor) -> list[Tensor]:
        """w_k (B,) of every band from fine to coarse, where other rules left ``share`` (B,) of guidance: all of it at 1."""
        rise = (self.scale_high - self.scale_low) / (self.bands - 1)
        full = [self.scale_low + rise * above for above in reversed(range(self.bands))]
        return [torch.where(share == 1, scale, 1 + (scale - 1) * share) for scale in full]

    def apply(self, step: Step) -> Tensor:
        return frequency_decoupled(
            step.cond_denoised, step.uncond_denoised, self.scales(step.share_of(self.guidance_scale))
        )
