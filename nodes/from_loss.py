"""A node made from a ready-made loss: its inputs are the loss's knobs, its output is the loss."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from ..latent_guidance.guidance.knobs import Socket, default, knobs
from ..latent_guidance.guidance.losses import ReadyLoss
from .from_rule import input_of, taken, tooltip_zh

CATEGORY = "latent guidance/guidance/losses"

OUTPUT_HELP = (
    "The loss: connect it to a rule that follows one (MPGD, DPS, FreeDoM), or to Loss: Weighted Sum or Loss: Mask."
)
OUTPUT_ZH = "损失：连接到遵循损失的规则（MPGD、DPS、FreeDoM），或“损失：加权和”“损失：遮罩”。"


def node_from_loss(loss_class: type[ReadyLoss]) -> type:
    """The node class of a loss; its id is ``loss_class.node.id``."""
    text = loss_class.node
    described = {name: input_of(knob, default(loss_class, name)) for name, knob in knobs(loss_class).items()}
    optional = {name for name, knob in knobs(loss_class).items() if isinstance(knob, Socket) and knob.optional}

    class LossNode:
        DISPLAY_NAME = text.name
        CATEGORY = CATEGORY
        DESCRIPTION = text.description
        SEARCH_ALIASES: ClassVar[list[str]] = list(text.search_aliases)
        RETURN_TYPES = ("LG_LOSS",)
        RETURN_NAMES = ("loss",)
        OUTPUT_TOOLTIPS = (OUTPUT_HELP,)
        FUNCTION = "make"
        RULE = loss_class
        ZH: ClassVar[dict[str, Any]] = {
            "display_name": text.name_zh,
            "description": text.description_zh,
            "inputs": {name: (knob.label_zh, tooltip_zh(knob)) for name, knob in knobs(loss_class).items()},
            "outputs": (("损失", OUTPUT_ZH),),
        }

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {
                "required": {name: spec for name, spec in described.items() if name not in optional},
                "optional": {name: spec for name, spec in described.items() if name in optional},
            }

        def make(self, **inputs: Any) -> tuple[ReadyLoss]:
            return (cast(Any, loss_class)(**taken(loss_class, inputs)),)

    LossNode.__name__ = LossNode.__qualname__ = text.id
    LossNode.__doc__ = text.description
    return LossNode
