r"""Several losses at once, each with its weight and in its own space.

    loss(D) = sum_i weight_i loss_i(D)

Reference: arXiv 2302.07121 (sec. 4: guidance by several functions at once is guidance by their sum).
Space: that of each part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...errors import UserError
from ..base import NodeText
from ..knobs import Number, Socket
from .base import ReadyLoss, name_of, parts_of


def _part(number: int, optional: bool) -> Socket:
    return Socket(
        type="LG_LOSS",
        optional=optional,
        made_by="a Loss node",
        label_zh=f"损失 {number}",
        help=f"Loss number {number}, of any kind.",
        help_zh=f"第 {number} 个损失，任意种类。",
    )


def _weight(number: int) -> Number:
    return Number(
        min=-1000.0,
        max=1000.0,
        step=0.01,
        neutral=0.0,
        label_zh=f"权重 {number}",
        help=f"Weight of loss number {number}; 0 leaves it out, below 0 pushes away from it.",
        help_zh=f"第 {number} 个损失的权重；0 表示不使用，负值表示推离。",
    )


@dataclass(frozen=True, kw_only=True)
class WeightedSum(ReadyLoss):
    space: ClassVar[str] = ""  # a sum has none of its own
    node: ClassVar[NodeText] = NodeText(
        id="LGLossSum",
        name="Loss: Weighted Sum",
        name_zh="损失：加权和",
        description="Several losses at once, each with its weight.",
        description_zh="同时使用多个损失，各有权重。",
        search_aliases=("loss", "sum", "combine", "weights", "several"),
    )

    loss_1: Annotated[Any, _part(1, optional=False)]
    weight_1: Annotated[float, _weight(1)] = 1.0
    weight_2: Annotated[float, _weight(2)] = 1.0
    weight_3: Annotated[float, _weight(3)] = 1.0
    weight_4: Annotated[float, _weight(4)] = 1.0
    loss_2: Annotated[Any, _part(2, optional=True)] = None
    loss_3: Annotated[Any, _part(3, optional=True)] = None
    loss_4: Annotated[Any, _part(4, optional=True)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts():
            raise UserError(
                "a sum of losses whose weights are all 0",
                expected="at least one weight that is not 0",
                mend="raise weight_1, or take the rule out of the chain",
            )

    def parts(self) -> list[tuple[float, Any]]:
        """(weight, loss) of what is connected and weighs something."""
        pairs = [(getattr(self, f"weight_{i}"), getattr(self, f"loss_{i}")) for i in range(1, 5)]
        return [(weight, loss) for weight, loss in pairs if loss is not None and weight != 0]

    @property
    def name(self) -> str:
        return " + ".join(name_of(part) for _, part in parts_of(self))

    def __call__(self, estimate: Tensor) -> Tensor:
        """Not to be called: its parts are, each in its own space."""
        raise TypeError("a sum of losses is evaluated by its parts()")
