r"""A colour palette: every pixel is pulled towards the nearest of the given colours.

    loss(D) = 1/2 sum_pixels [-t log mean_k exp(-|p - c_k|^2 / t)] + balance N mean_k [-log(K q_k)]

with p the pixels of the decoded estimate, c_k the K colours, N the number of pixels. The bracket is a soft minimum of the squared
distances (softness t; the plain minimum at 0), by which a pixel between two colours is pulled to both. In the second term q_k is the
share of pixels that go to colour k (by softmax of -|p - c_k|^2 / t): it asks that each colour is used. With one colour it is zero.

Reference: arXiv 1704.00648 (soft-to-hard assignment to a codebook, sec. 3); none of the papers on guidance fixes this loss.
Space: decoded pictures, RGB in [-1, 1].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...errors import UserError, shown
from ..base import NodeText
from ..knobs import Number, Text
from .base import ReadyLoss, sum_over

_HEX = re.compile(r"#?([0-9a-fA-F]{6}|[0-9a-fA-F]{3})")
NAMES = {
    "black": "000000", "white": "ffffff", "grey": "808080", "red": "ff0000", "green": "00a000", "blue": "0000ff",
    "yellow": "ffff00", "orange": "ff8000", "purple": "800080", "pink": "ff80c0", "brown": "804000", "cyan": "00ffff",
}  # fmt: skip


def parse_colours(text: str) -> tuple[tuple[float, float, float], ...]:
    """Colours in [-1, 1] that ``text`` names, separated by commas or spaces: "#ff8000", "f80", or one of :data:`NAMES`.

    Raises:
        UserError: a word that is no colour, none at all, or more than 64.
    """
    words = [word for word in re.split(r"[,;\s]+", text) if word]
    found: list[tuple[float, float, float]] = []
    for word in words:
        matched = _HEX.fullmatch(NAMES.get(word.casefold(), word))
        if matched is None:
            raise _colour_error(f"the colour {shown(word)}")
        digits = matched[1] if len(matched[1]) == 6 else "".join(digit * 2 for digit in matched[1])
        red, green, blue = (int(digits[i : i + 2], 16) / 127.5 - 1 for i in (0, 2, 4))
        found.append((red, green, blue))
    if not 1 <= len(found) <= 64:
        raise _colour_error(f"{len(found)} colours")
    return tuple(found)


def _colour_error(found: str) -> UserError:
    return UserError(
        f"{found} in a palette",
        expected="1 to 64 colours as #rrggbb or #rgb, or a name: " + ", ".join(NAMES),
        mend='write for example "#1e3a5f, #f2a541, white"',
    )


def palette_loss(pixels: Tensor, colours: Tensor, softness: float, balance: float) -> Tensor:
    """The loss (B,) of pictures (B, 3, H, W) for colours (K, 3), both in [-1, 1]."""
    flat = pixels.flatten(2).mT  # (B, N, 3)
    squares = flat.square().sum(dim=2, keepdim=True) + colours.square().sum(dim=1)
    distance = (squares - 2 * flat @ colours.T).clamp_min(0)  # (B, N, K), without a (B, N, K, 3) on the way
    count = len(colours)
    if softness == 0:
        nearest, share = distance.amin(dim=2), None
    else:
        logits = -distance / softness
        nearest = -softness * (logits.logsumexp(dim=2) - torch.log(torch.full_like(logits[..., 0], count)))
        share = logits.softmax(dim=2).mean(dim=1)  # (B, K)
    loss = sum_over(nearest) / 2
    if balance == 0 or share is None or count == 1:
        return loss
    used = (count * share).clamp_min(torch.finfo(share.dtype).tiny)
    return loss - balance * flat.shape[1] * used.log().mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class ColourPalette(ReadyLoss):
    space: ClassVar[str] = "picture"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossPalette",
        name="Loss: Colour Palette",
        name_zh="损失：调色板",
        description="Pulls every pixel towards the nearest colour of a palette.",
        description_zh="把每个像素拉向调色板中最接近的颜色。",
        search_aliases=("loss", "colour", "color", "palette", "recolor", "tint"),
    )

    colours: Annotated[
        str,
        Text(
            placeholder="#1e3a5f, #f2a541, white",
            label_zh="颜色",
            help="The palette: colours as #rrggbb or #rgb or plain names, separated by commas.",
            help_zh="调色板：以逗号分隔的颜色，写作 #rrggbb、#rgb 或英文颜色名。",
        ),
    ] = "#1e3a5f, #f2a541, white"
    softness: Annotated[
        float,
        Number(
            min=0.0,
            max=4.0,
            step=0.01,
            neutral=0.0,
            label_zh="柔和度",
            help="How far a pixel looks beyond its nearest colour, in squared distance (black to white is 12); 0 is the nearest only.",
            help_zh="像素在最近颜色之外还顾及多远（平方距离，黑到白为 12）；0 表示只看最近的颜色。",
        ),
    ] = 0.2
    balance: Annotated[
        float,
        Number(
            min=0.0,
            max=10.0,
            step=0.01,
            neutral=0.0,
            label_zh="均衡",
            help="How strongly all colours are to be used, in equal shares; needs a softness above 0.",
            help_zh="各颜色被均匀使用的强度；要求柔和度大于 0。",
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_colours(self.colours)

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,) of pictures (B, 3, H, W) in [-1, 1]."""
        return palette_loss(estimate, estimate.new_tensor(parse_colours(self.colours)), self.softness, self.balance)
