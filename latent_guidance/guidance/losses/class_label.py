r"""A class label, at the denoised estimate: a noisy-latent classifier is asked about the estimate as if it were clean.

    loss(D) = -log p(y | u = D, log-SNR of the cleanest level that the classifier was trained on)

Reference: arXiv 2302.07121 (a classifier of clean pictures at the estimate), with the classifier of arXiv 2105.05233 in its place.
Space: the model's latents. Classifier Guidance asks the same network about x at its own noise level; that is what it was trained for, and
cheaper. This loss is for rules that act at the estimate, and for sums with other losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..base import NodeText
from ..knobs import Choice, Socket, Text
from ..latents import Latents
from ..noisy_network import check_network_latents, check_network_shape
from ..targets import COMBINE, class_target, parse_target, regression_target
from .base import ReadyLoss

LOADER = "Load Noisy-Latent Classifier"


@dataclass(frozen=True, kw_only=True)
class ClassLabel(ReadyLoss):
    space: ClassVar[str] = "latent"
    node: ClassVar[NodeText] = NodeText(
        id="LGLossClassLabel",
        name="Loss: Class Label",
        name_zh="损失：类别标签",
        description="Pulls towards a label of a noisy-latent classifier, asked about the denoised estimate.",
        description_zh="向带噪潜变量分类器询问去噪估计，并拉向某个标签。",
        search_aliases=("loss", "class", "label", "classifier", "category"),
    )

    classifier: Annotated[
        Any,
        Socket(
            type="LG_CLASSIFIER",
            made_by="the node Load Noisy-Latent Classifier",
            label_zh="分类器",
            help="The classifier to follow; it must have been trained on this model's latents.",
            help_zh="要遵循的分类器；它必须在本模型的潜空间上训练。",
        ),
    ]
    label: Annotated[
        str,
        Text(
            placeholder="flags   or   flags:2, symbols   or   not flags",
            label_zh="标签",
            help='What to pull to: a label, several as "a, b:2", or "not a"; "up" or "down" for a score.',
            help_zh="目标：一个标签，或多个标签 “a, b:2”，或 “not a”（远离）；评分头用 “up” 或 “down”。",
        ),
    ] = ""
    combine: Annotated[
        str,
        Choice(
            options=COMBINE,
            label_zh="多标签组合",
            help="With several labels: any of them is right (log of the sum of probabilities), or all at once (sum of logs, soft labels).",
            help_zh="有多个标签时，any：任一即可（概率之和的对数）；all：同时满足（对数概率之和，可作软标签）。",
        ),
    ] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._log_prob()  # an unknown label is said when the loss is made

    def _log_prob(self) -> Callable[[Tensor], Tensor]:
        if self.classifier.config.head == "regression":
            return regression_target(self.label)
        return class_target(parse_target(self.label, self.classifier.config.labels), self.combine)

    def networks(self) -> tuple[Any, ...]:
        """The classifier."""
        return (self.classifier,)

    def check_latents(self, latents: Latents) -> None:
        """Raise UserError if the classifier was made for other latents than a model's."""
        check_network_latents(self.classifier.config, latents, "classifier", self.name, LOADER)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError unless latents of ``shape`` are those of pictures, with the classifier's channels."""
        check_network_shape(self.classifier.config, shape, "classifier", LOADER)

    def __call__(self, estimate: Tensor) -> Tensor:
        """-log p (B,) of estimates (B, C, h, w)."""
        cleanest = torch.full_like(estimate[:, 0, 0, 0], self.classifier.config.log_snr_range[1])
        return -self._log_prob()(self.classifier.logits(estimate, cleanest)).to(estimate)
