r"""Texts, by a clean CLIP that looks at random cutouts of the decoded picture.

    loss(D) = mean_k sum_i w_i d(image(cutout_k(D)), text_i)
    d = 1 - <a, b>                                                                                      (cosine)
    d = 2 asin(|a - b| / 2)^2 = angle(a, b)^2 / 2                                                       (spherical)

image and text_i are CLIP's unit vectors; texts of weight w_i < 0 are gone away from. The cutouts are drawn anew at each step. asin is
written as atan2(|a - b|, |a + b|), which is the same for unit vectors and has a finite slope where they are alike or opposite.

Reference: katherinecrowson/clip-guided-diffusion (spherical distance, cutouts, weighted prompts); arXiv 2112.10741, section 2.4 (CLIP
guidance by the cosine); 2103.00020 (CLIP).
Space: decoded pictures, RGB in about [-1, 1].
Deviations: sides of the cutouts are uniform from the least to the whole, their cut_pow 1; weights are not divided by their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...errors import UserError, shown
from ..base import NodeText
from ..knobs import Choice, Number, Socket, Switch, Text, Whole
from .base import ReadyLoss
from .cutouts import Crop, cutouts, drawn_crops

AT_ONCE = 8
"""Cutouts that go through the network together; more are evaluated again for the gradient, so that memory is that of these."""
MAX_TEXTS, MAX_WEIGHT = 64, 1000.0


class PictureCLIP(Protocol):
    """A CLIP on clean pictures as the loss sees it; ``network`` is the module that looks at them."""

    network: nn.Module | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def image_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors (B, E) of pictures (B, 3, image_size, image_size), with mean taken off and divided by std; differentiable."""
        ...

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, E) of texts."""
        ...


def parse_texts(written: str) -> tuple[tuple[str, float], ...]:
    """(text, weight) of "a red apple | a lamp:0.5 | blurry:-1"; the weight is 1 where none is given.

    Raises:
        UserError: no text, an empty one, more than 64, or a weight of 0 or beyond 1000.
    """
    found = [_weighted(part.strip()) for part in written.split("|")]
    wrong = [f"the text {shown(text)}" for text, _ in found if not text]
    wrong += [f"the weight {weight:g}" for _, weight in found if not 0 < abs(weight) <= MAX_WEIGHT]
    wrong += [f"{len(found)} texts"] if len(found) > MAX_TEXTS else []
    if wrong:
        raise UserError(
            f"{wrong[0]} in the texts for a CLIP, {shown(written)}",
            expected=f"1 to {MAX_TEXTS} texts separated by |, with weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not 0, after a colon",
            mend='write for example "a red apple | blurry:-0.5"',
        )
    return tuple(found)


def _weighted(part: str) -> tuple[str, float]:
    text, colon, number = part.rpartition(":")
    if colon:
        try:
            return text.strip(), float(number)
        except ValueError:
            pass
    return part, 1.0


def cosine_distance(image: Tensor, text: Tensor) -> Tensor:
    """1 - <a, b> (..., N) of unit vectors a (..., E) and b (N, E), in [0, 2]."""
    return 1 - image @ text.T


def spherical_distance(image: Tensor, text: Tensor) -> Tensor:
    """Half the squared angle (..., N) between unit vectors a (..., E) and b (N, E), in [0, pi^2 / 2]."""
    apart, together = image[..., None, :] - text, image[..., None, :] + text
    half_angle = torch.atan2(torch.linalg.vector_norm(apart, dim=-1), torch.linalg.vector_norm(together, dim=-1))
    return 2 * half_angle.square()


DISTANCES = {"spherical": spherical_distance, "cosine": cosine_distance}


@dataclass(frozen=True, kw_only=True)
class CLIPText(ReadyLoss):
    space: ClassVar[str] = "picture"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossCLIPText",
        name="Loss: Text (CLIP)",
        name_zh="损失：文字（CLIP）",
        description="Pulls towards texts, or away from them, by a CLIP that looks at random cutouts of the decoded picture. No training is "
        "needed; a step costs the VAE and the CLIP, forwards and backwards.",
        description_zh="用 CLIP 读取解码后图像的随机裁块，拉向（或推离）若干文字。无需训练；每步都要对 VAE 和 CLIP 做前向与反向计算。",
        search_aliases=("loss", "clip", "clip guidance", "text", "prompt", "cutouts", "clip guided diffusion"),
    )

    clip: Annotated[
        Any,
        Socket(
            type="LG_PICTURE_CLIP",
            made_by="Load Picture CLIP or Picture CLIP from CLIP Vision",
            label_zh="图像 CLIP",
            help="The CLIP that looks at the picture and reads the texts.",
            help_zh="用于读取图像与文字的 CLIP。",
        ),
    ]
    texts: Annotated[
        str,
        Text(
            placeholder="a red apple | a lamp:0.5 | blurry:-1",
            label_zh="文字",
            help="What to pull to: texts separated by |, with a weight after a colon where it is not 1; below 0 pushes away: "
            '"an apple | blurry:-0.5".',
            help_zh="目标：以 | 分隔的文字，权重不为 1 时写在冒号之后，负值表示推离，例如 “an apple | blurry:-0.5”。",
        ),
    ] = "a red apple"
    distance: Annotated[
        str,
        Choice(
            options=tuple(DISTANCES),
            label_zh="距离",
            help="spherical: half the squared angle between picture and text, which pulls less as they meet; cosine: 1 - cosine.",
            help_zh="spherical：图像与文字夹角平方的一半，越接近拉力越弱；cosine：1 减余弦。",
        ),
    ] = "spherical"
    crops: Annotated[
        int,
        Whole(
            min=1,
            max=256,
            label_zh="裁块数",
            help="Cutouts per picture and step, over which the loss is averaged; each costs a pass of the CLIP.",
            help_zh="每张图片每步的裁块数，损失取其平均；每个裁块都要经过一次 CLIP。",
        ),
    ] = 8
    smallest_crop: Annotated[
        float,
        Number(
            min=0.05,
            max=1.0,
            step=0.05,
            neutral=1.0,
            label_zh="最小裁块",
            help="Least side of a cutout, as a share of the picture's shorter side; 1 cuts nothing off a square picture.",
            help_zh="裁块的最小边长，占图片短边的比例；1 时不裁剪正方形图片。",
        ),
    ] = 0.4
    mirror: Annotated[
        bool,
        Switch(
            neutral=False,
            label_zh="镜像",
            help="Mirror every other cutout, at random, left to right; switch it off where writing or sides matter.",
            help_zh="随机左右镜像一半裁块；画面中的文字或左右方向重要时请关闭。",
        ),
    ] = True
    seed: Annotated[
        int,
        Whole(
            min=0,
            max=2**31,
            label_zh="随机种子",
            help="Of the cutouts, which are new at each step and the same for every picture of a batch.",
            help_zh="裁块的随机种子；裁块每步更换，同一批的每张图片相同。",
        ),
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._text_features  # wrong texts are said when the loss is made, and no step waits for the text encoder

    @cached_property
    def _text_features(self) -> Tensor:
        texts = [text for text, _ in parse_texts(self.texts)]
        with torch.no_grad():
            return self.clip.text_features(texts)

    def networks(self) -> tuple[Any, ...]:
        """The CLIP."""
        return (self.clip,)

    def graph_used(self) -> float:
        """Bytes that looking at one picture takes with a graph, as far as the CLIP says: of the cutouts that go through it together."""
        used = getattr(self.clip, "graph_used", None)
        return 0.0 if used is None else float(used(min(self.crops, AT_ONCE)))

    def at_step(self, index: int | None) -> CLIPTextAtStep:
        """The loss by the cutouts of the step ``index``."""
        return CLIPTextAtStep(self, index)

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,) of pictures (B, 3, H, W) in about [-1, 1], by the cutouts of the first step."""
        return self.at_step(None)(estimate)


@dataclass(frozen=True)
class CLIPTextAtStep:
    """The loss by the cutouts of one step."""

    loss: CLIPText
    index: int | None

    space: ClassVar[str] = "picture"

    @property
    def name(self) -> str:
        return self.loss.name

    def crops(self, height: int, width: int) -> tuple[Crop, ...]:
        """The cutouts of pictures of ``height`` x ``width`` pixels."""
        loss = self.loss
        return drawn_crops(
            height, width, loss.crops, smallest=loss.smallest_crop, mirror=loss.mirror, seed=loss.seed, index=self.index
        )

    def __call__(self, estimate: Tensor) -> Tensor:
        """(B,) of pictures (B, 3, H, W) in about [-1, 1]."""
        crops = self.crops(*estimate.shape[-2:])
        some = max(1, AT_ONCE // estimate.shape[0])
        groups = [crops[start : start + some] for start in range(0, len(crops), some)]
        if len(groups) == 1 or not torch.is_grad_enabled():
            return sum((self._summed(estimate, group) for group in groups), estimate.new_zeros(())) / len(crops)
        from torch.utils.checkpoint import checkpoint

        total = estimate.new_zeros(())
        for group in groups:
            total = total + checkpoint(self._summed, estimate, group, use_reentrant=False, preserve_rng_state=False)
        return total / len(crops)

    def _summed(self, estimate: Tensor, crops: Sequence[Crop]) -> Tensor:
        """The sum over ``crops`` of the weighted distances, (B,)."""
        clip, loss = self.loss.clip, self.loss
        mean, std = (estimate.new_tensor(values)[:, None, None] for values in (clip.mean, clip.std))
        seen = (cutouts(estimate / 2 + 0.5, crops, clip.image_size) - mean) / std  # (K, B, 3, S, S)
        image = clip.image_features(seen.flatten(0, 1)).to(estimate).unflatten(0, seen.shape[:2])
        text = loss._text_features.clone().to(estimate)
        weights = estimate.new_tensor([weight for _, weight in parse_texts(loss.texts)])
        return (DISTANCES[loss.distance](image, text) @ weights).sum(dim=0)
