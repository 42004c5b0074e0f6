r"""A guidance scale drawn by hand: a curve through points of noise level and scale.

    w(sigma) = the curve's value at sigma,   wherever guidance is on (w != 1)

The points are written as ``sigma:w, sigma:w``, in any order: ``14:1, 5:7, 0.5:3``. Between two points the scale goes straight
in sigma (*linear*), straight in log sigma (*log*), or stays that of the point with the higher sigma until the next one is
reached (*steps*); beyond the first and last point it stays theirs. sigma is the model's own, as samplers and Limited Interval
have it: 0 to about 14.6 for Stable Diffusion, 0 to 1 for flow models.
A scale of exactly 1 (no guidance was asked for, or a limited interval is closed) stays 1, and no second pass is paid for.

Reference: no paper; a schedule given point by point, as users' interfaces have it. That the best scale depends on the noise level
is the finding of arXiv 2404.07724 (sec. 3) and 2404.13040.
Space: acts on the scale alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import NodeText, Rule, Stage, Step
from .grid import ROUNDING
from .knobs import Choice, Text

LARGEST_SCALE = 100.0
LONGEST = 10_000
"""Characters of a curve at most."""

Points = tuple[tuple[float, float], ...]


def parse_curve(text: str) -> Points:
    """The points (sigma, w) that ``text`` gives, by falling sigma; none for an empty text.

    Raises:
        UserError: anything but ``sigma:w`` between the commas, a sigma below 0 or given twice, a scale beyond 100.
    """
    if len(text) > LONGEST:
        raise _curve_error(f"a curve of {len(text)} characters")
    points: dict[float, float] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        left, colon, right = part.partition(":")
        try:
            sigma, scale = float(left), float(right) if colon else float("nan")
        except ValueError:
            raise _curve_error(f"the point {part[:60]!r} of a guidance curve") from None
        if not (0 <= sigma < float("inf") and abs(scale) <= LARGEST_SCALE):  # nan is in no range
            raise _curve_error(f"the point {part[:60]!r} of a guidance curve")
        if sigma in points:
            raise _curve_error(f"a guidance curve with two points at sigma {sigma:g}")
        points[sigma] = scale
    return tuple(sorted(points.items(), reverse=True))


def _curve_error(found: str) -> UserError:
    return UserError(
        found,
        expected="sigma:scale, separated by commas: each sigma once and not below 0, "
        f"scales from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}",
        mend="write for example 14:1, 5:7, 0.5:3 in the curve input",
    )


def curve_value(points: Points, sigma: Tensor, interpolation: str) -> Tensor:
    """The curve through ``points`` (K >= 1, by falling sigma) at ``sigma`` (B,), as (B,)."""
    levels, scales = (sigma.new_tensor(column) for column in zip(*points, strict=True))
    index = (levels >= sigma[:, None] * (1 - ROUNDING)).sum(dim=1)  # points that sigma has come down to
    before, after = (index - 1).clamp(min=0), index.clamp(max=len(points) - 1)
    if interpolation == "steps":
        return scales[before]
    upper, lower, here = levels[before], levels[after], sigma
    if interpolation == "log":
        upper, lower, here = upper.log(), lower.log(), here.log()
    gap = torch.where(before == after, torch.ones_like(here), upper - lower)
    share = torch.where(before == after, torch.zeros_like(here), (upper - here) / gap).clamp(0, 1)
    return scales[before] + share * (scales[after] - scales[before])


@dataclass(frozen=True, kw_only=True)
class GuidanceCurve(Rule):
    stage: ClassVar[Stage] = Stage.SCALE
    node: ClassVar[NodeText] = NodeText(
        id="LGGuidanceCurve",
        name="Guidance Curve",
        name_zh="引导强度曲线",
        description="Sets the guidance scale by noise level, on a curve through points that you write down.",
        description_zh="按噪声水平设定引导强度：沿你写下的点连成的曲线。",
        search_aliases=("cfg curve", "per-sigma cfg", "cfg per step", "guidance scale by sigma", "cfg schedule"),
    )

    curve: Annotated[
        str,
        Text(
            placeholder="14:1, 5:7, 0.5:3",
            neutral="",
            label_zh="曲线",
            help="The points as sigma:scale, separated by commas; before the first and after the last point the scale stays. "
            "Empty leaves the scale as it is. Flow models (SD3, Flux) have sigma from 1 to 0.",
            help_zh="以 sigma:强度 写下各点，用逗号分隔；首点之前与末点之后保持该端点的强度。留空则不改变强度。"
            "flow 模型（SD3、Flux）的 sigma 从 1 到 0。",
        ),
    ] = "14:1, 5:6, 1:6, 0.3:2"
    interpolation: Annotated[
        str,
        Choice(
            options=("linear", "log", "steps"),
            label_zh="插值",
            help="Between points: linear in sigma, linear in log sigma (then no point at sigma 0), or steps: held until the next point.",
            help_zh="点与点之间：对 sigma 线性、对 log sigma 线性（此时不能有 sigma 为 0 的点），或保持到下一点的阶梯。",
        ),
    ] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        ends_at_zero = any(sigma == 0 for sigma, _ in self.points)
        if self.interpolation == "log" and ends_at_zero:
            raise UserError(
                f"a point at sigma 0 in the curve {self.curve[:60]!r}, with interpolation in log sigma",
                expected="points above sigma 0",
                mend="move the last point to 0.01, or choose linear",
            )

    @cached_property
    def points(self) -> Points:
        return parse_curve(self.curve)

    def apply(self, step: Step) -> Tensor:
        w = step.guidance_scale
        if not self.points:
            return w
        return torch.where(w == 1, w, curve_value(self.points, step.sigma, self.interpolation).to(w))
