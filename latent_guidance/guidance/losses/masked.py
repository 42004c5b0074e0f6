r"""A loss that pulls in one part of the picture only.

    loss'(D) = loss(m D + (1 - m) stop(D))

The loss sees the whole estimate, and its value is unchanged; outside the mask m nothing flows back to the estimate.

Reference: arXiv 2112.05744 (region-wise guidance by a masked gradient).
Space: that of the loss it holds. In the space of pictures the mask cuts at the pixels; a latent just outside its border still feels the
pixels that it helped to decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ..base import NodeText
from ..knobs import Socket
from ..latents import Latents
from ..noisy_network import batch_of_masks, resized_mask
from .base import ReadyLoss, at_step, check_shape, name_of, networks_of, parts_of


@dataclass(frozen=True)
class MaskedPart:
    """One simple loss behind a mask."""

    loss: Any
    mask: Tensor

    @property
    def space(self) -> str:
        return self.loss.space

    @property
    def name(self) -> str:
        return name_of(self.loss)

    def networks(self) -> tuple[Any, ...]:
        return networks_of(self.loss)

    def check_latents(self, latents: Latents) -> None:
        """Raise UserError if the loss inside was made for other latents than a model's."""
        check: Callable[[Latents], None] | None = getattr(self.loss, "check_latents", None)
        if check is not None:
            check(latents)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError for latents of another batch than the masks', or of a shape that the loss inside refuses."""
        batch_of_masks(self.mask, shape[0])
        check_shape(self.loss, shape)

    def at_step(self, index: int | None) -> MaskedPart:
        """The loss inside as it is at step ``index``, behind the same mask."""
        return replace(self, loss=at_step(self.loss, index))

    def __call__(self, estimate: Tensor) -> Tensor:
        """The loss (B,), with a gradient inside the mask only; estimates (B, ..., h, w) of any number of dimensions from four on."""
        frames = estimate.movedim(1, -3).flatten(1, -4) if estimate.ndim > 4 else estimate
        mask = resized_mask(self.mask, frames).clone()  # (1 or B, 1, h, w)
        mask = mask.reshape(mask.shape[0], *(1,) * (estimate.ndim - 3), *mask.shape[-2:])
        return self.loss(mask * estimate + (1 - mask) * estimate.detach())


@dataclass(frozen=True, kw_only=True)
class MaskedLoss(ReadyLoss):
    space: ClassVar[str] = ""  # that of the loss it holds
    node: ClassVar[NodeText] = NodeText(
        id="LGLossMask",
        name="Loss: Mask",
        name_zh="损失：遮罩",
        description="Lets a loss pull in one part of the picture only.",
        description_zh="让损失只在画面的一部分起作用。",
        search_aliases=("loss", "mask", "region", "area", "spatial", "local"),
    )

    loss: Annotated[
        Any,
        Socket(
            type="LG_LOSS",
            made_by="a Loss node",
            label_zh="损失",
            help="The loss to confine; it still sees the whole picture.",
            help_zh="要限制作用范围的损失；它仍能看到整幅画面。",
        ),
    ]
    mask: Annotated[
        Any,
        Socket(
            type="MASK",
            made_by="a mask, such as Solid Mask or Load Image (as Mask)",
            label_zh="遮罩",
            help="Where to pull, 0 to 1 over the picture; resized to whatever the loss looks at.",
            help_zh="在画面的哪些位置拉动（0 到 1）；会缩放到损失所用的尺寸。",
        ),
    ]

    def parts(self) -> list[tuple[float, Any]]:
        """(weight, loss) of the simple losses inside, each behind the mask."""
        return [(weight, MaskedPart(part, self.mask)) for weight, part in parts_of(self.loss)]

    @property
    def name(self) -> str:
        return f"{name_of(self.loss)} behind a mask"

    def __call__(self, estimate: Tensor) -> Tensor:
        """Not to be called: its parts are, each in its own space."""
        raise TypeError("a masked loss is evaluated by its parts()")
