"""Changes of a network's attention, described without the network: which, in which layers, and what they do to tokens.

A layer is one transformer block, and has the same name wherever the network runs. Those of a U-Net are counted from the input on,
d0, d1, ... on the way down, m0, ... in the middle and u0, u1, ... on the way up; those of a diffusion transformer are 0, 1, 2, ..., and its
single-stream blocks, where it has them, s0, s1, ...
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import UserError

OPS = {
    "identity": "attention to itself alone",
    "blur": "blurred queries",
    "shuffle": "shuffled tokens",
    "skip": "skipped layers",
}
"""What can be done to a layer: every token attends to itself alone (its value comes out), the queries are blurred over the picture, the
tokens come in in another order, the layer is left out."""

GROUPS = {"down": "d", "middle": "m", "up": "u"}
_RANGE = re.compile(r"([dmus]?)(\d{1,4})(?:\s*-\s*([dmus]?)(\d{1,4}))?")


@dataclass(frozen=True)
class AttentionPatch:
    """One change, the same in every layer that it names.

    Attributes:
        op: one of ``OPS``.
        layers: as :func:`select_layers` reads them.
        blur_sigma: of "blur": standard deviation in tokens; ``math.inf`` makes all queries their mean.
        seed: of "shuffle": which orders are drawn.
        step: of "shuffle": another order at every step of a run.
    """

    op: str
    layers: str = "middle"
    blur_sigma: float = math.inf
    seed: int = 0
    step: int = 0


def split_layers(layers: str) -> list[str]:
    """The items of a list of layers, in lower case.

    Raises:
        UserError: one that is neither a group, nor a layer, nor a range of layers.
    """
    items = [item.strip().lower() for item in layers.split(",")]
    for item in items:
        if item not in ("all", *GROUPS) and _range(item)[1] > _range(item)[2]:
            raise UserError(
                f"{item!r} in the layers {layers!r}",
                expected="middle, down, up or all; or layers such as d0, m0, u2 or d2-d5 of a U-Net, 7 or 7-9 of a transformer",
                mend="write one or more of these, separated by commas",
            )
    return items


def select_layers(layers: str, available: Sequence[str]) -> list[str]:
    """Those of a network's layers that are meant, in the network's order.

    Args:
        layers: "middle", "down", "up" or "all"; layers by name, or ranges such as "d2-d5" or "7-9"; several, separated by commas. Of
            a transformer "middle" is the block in the middle, or the two.
        available: the names of the network's layers.

    Raises:
        UserError: a layer that the network does not have, naming what it has.
    """
    chosen: set[str] = set()
    for item in split_layers(layers):
        if item == "all":
            found = set(available)
        elif item in GROUPS:
            found = {name for name in available if name.startswith(GROUPS[item])}
            if item == "middle" and not any(name[0] in "dmu" for name in available):
                found = set(available[(len(available) - 1) // 2 : len(available) // 2 + 1])
        else:
            kind, first, last = _range(item)
            wanted = {f"{kind}{i}" for i in range(first, last + 1)}
            found = wanted if wanted <= set(available) else set[str]()
        if not found:
            raise UserError(
                f"the layers {item!r} of a model that has not got them",
                expected=f"of this model's: {_summary(available)}",
                mend="choose among these in the rule's layers input",
            )
        chosen |= found
    return [name for name in available if name in chosen]


def _range(item: str) -> tuple[str, int, int]:
    """Kind, first and last of "d2-d5", "d2-5" or "d2"; a first that lies after the last for anything else."""
    match = _RANGE.fullmatch(item)
    if match is None or match[3] not in (None, "", match[1]):
        return "", 1, 0
    return match[1], int(match[2]), int(match[4] or match[2])


def _summary(available: Sequence[str]) -> str:
    """As in "d0 to d3, m0, u0 to u5"."""
    kinds = dict.fromkeys(name.rstrip("0123456789") for name in available)
    groups = [[name for name in available if name.rstrip("0123456789") == kind] for kind in kinds]
    return ", ".join(group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups) or "none"


def check_patch(denoiser: Any, patch: AttentionPatch) -> None:
    """Refuse a change of attention that a denoiser cannot make.

    Raises:
        UserError: a network whose attention cannot be reached, or that has no such layers.
    """
    check = getattr(denoiser, "check_patch", None)
    if check is None:
        raise unreachable(patch, type(denoiser).__name__)
    check(patch)


def unreachable(patch: AttentionPatch, what: str) -> UserError:
    """The error that ``what``, a kind of network, does not let ``patch`` in."""
    return UserError(
        f"a rule with {OPS[patch.op]} on a {what}, which does not let that be changed",
        expected="a U-Net with transformer blocks, such as Stable Diffusion's or the emoji model's",
        mend="take the rule out; Sliding Window Guidance needs no attention and acts on any model of pictures",
    )


def patched(denoiser: Any, patches: Sequence[AttentionPatch | None]) -> AbstractContextManager[Any]:
    """In this context sample i of a call of ``denoiser`` (B samples) goes through with ``patches[i]``; None leaves it as it is."""
    if all(patch is None for patch in patches):
        return nullcontext()
    return denoiser.patched(patches)


def permutation(count: int, patch: AttentionPatch, layer: str) -> Tensor:
    """An order of ``count`` tokens, (count,) int64 on the CPU, that depends on the patch's seed and step and on the layer alone."""
    seed = zlib.crc32(f"{patch.seed} {patch.step} {layer}".encode())
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def shuffled(tokens: Tensor, patch: AttentionPatch, layer: str) -> Tensor:
    """``tokens`` (B, N, C) in the order of :func:`permutation`, the same for every sample.

    Reference: arXiv 2506.10036 (a permutation matrix on the tokens, which keeps their norms).
    """
    return tokens[:, permutation(tokens.shape[1], patch, layer).to(tokens.device)]


def gaussian_kernel(sigma: float, length: int) -> Tensor:
    """Weights (K,) of a blur over ``length`` tokens, that sum to 1: K is odd, at least 6 sigma, and at most ``length`` + 1."""
    wide = math.ceil(6 * sigma)
    size = min(wide + 1 - wide % 2, length + 1 - length % 2)
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def blurred(tokens: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """``tokens`` (B, height * width, C) blurred over the picture, with mirrored borders; unchanged at sigma = 0.

    Args:
        tokens: queries, row by row of the picture.
        height: rows.
        width: columns.
        sigma: standard deviation in tokens; ``math.inf`` gives every token the mean of all.

    Reference: arXiv 2408.00760: blurring the queries blurs the attention scores.
    """
    if sigma == 0:
        return tokens
    if math.isinf(sigma):
        return tokens.mean(dim=1, keepdim=True).expand_as(tokens)
    batch, _, channels = tokens.shape
    picture = tokens.movedim(1, -1).reshape(batch * channels, 1, height, width)
    for across, length in ((False, height), (True, width)):
        kernel = gaussian_kernel(sigma, length).to(picture)
        border = len(kernel) // 2
        sides = (border, border, 0, 0) if across else (0, 0, border, border)
        picture = functional.pad(picture, sides, mode="reflect")
        picture = functional.conv2d(picture, kernel.reshape((1, 1, 1, -1) if across else (1, 1, -1, 1)))
    return picture.reshape(batch, channels, height * width).movedim(1, -1)
