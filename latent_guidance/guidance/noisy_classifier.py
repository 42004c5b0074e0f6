"""What all rules that follow a noisy-latent classifier share: target, strength, gates, and the gradient itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..process import Process
from .gates import EveryK, GradientClip, Mask, SigmaHi, SigmaLo
from .knobs import UNLIMITED, Choice, Number, Socket, Text
from .noisy_network import NetworkConfig, NoisyNetworkRule, spread
from .targets import COMBINE, class_target, parse_target, regression_target


class ClassifierConfig(NetworkConfig, Protocol):
    """What a rule must know of a classifier."""

    labels: tuple[str, ...]
    head: str  # "classes" or "regression"


class NoisyClassifier(Protocol):
    """A classifier as rules see it; see :class:`.noisy_network.NoisyNetwork`."""

    config: ClassifierConfig
    network: nn.Module | None

    def logits(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Logits (B, K), or a regression head's value (B, 1), of unit-variance x (B, C, H, W) at log-SNR (B,)."""
        ...


def entropy_scale(logits: Tensor) -> Tensor:
    """log K / H(p): how far the classifier's entropy (B,) has fallen below that of a guess among K classes, 1 to 100.

    Reference: arXiv 2206.11474, entropy-aware scaling in sampling (there with one fixed K = 1000). The bound of 100 is
    ours: a classifier that is sure of another class than the target has no entropy but a large gradient.
    """
    if logits.shape[1] == 1:  # a single class is never in doubt
        return torch.ones_like(logits[:, 0])
    log_probs = logits.log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    guess = math.log(logits.shape[1])
    return guess / entropy.clamp_min(guess / 100)


@dataclass(frozen=True, kw_only=True)
class ClassifierRule(NoisyNetworkRule):
    """Base of the classifier rules: their common knobs and :meth:`gradient`."""

    what: ClassVar[str] = "classifier"
    loader: ClassVar[str] = "Load Noisy-Latent Classifier"

    classifier: Annotated[
        Any,
        Socket(
            type="LG_CLASSIFIER",
            made_by="the node Load Noisy-Latent Classifier",
            label_zh="分类器",
            help="The noisy-latent classifier to follow; it must have been trained on this model's latents.",
            help_zh="要遵循的带噪潜变量分类器；它必须在本模型的潜空间上训练。",
        ),
    ]
    label: Annotated[
        str,
        Text(
            placeholder="flags   or   flags:2, symbols   or   not flags",
            label_zh="标签",
            help='What to steer to: a label, several as "a, b:2", or "not a"; "up" or "down" for a score. '
            "The classifier's loader shows its labels.",
            help_zh="引导目标：一个标签，或多个标签 “a, b:2”，或 “not a”（远离）；评分头用 “up” 或 “down”。可用标签见分类器加载节点。",
        ),
    ] = ""
    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.1,
            neutral=0.0,
            paper_range="1 to 10",
            label_zh="引导强度",
            help="Strength of the push; 0 is off, 1 is Bayes' rule, more is clearer and less varied up to a point, below 0 steers away.",
            help_zh="推动的强度：0 关闭，1 即贝叶斯公式，在一定范围内越大越明确、多样性越低，负值则远离目标。",
        ),
    ] = 15.0
    combine: Annotated[
        str,
        Choice(
            options=COMBINE,
            label_zh="多标签组合",
            help="With several labels: any of them is right (log of the sum of probabilities), or all at once (sum of logs, soft labels).",
            help_zh="有多个标签时，any：任一即可（概率之和的对数）；all：同时满足（对数概率之和，可作软标签）。",
        ),
    ] = "any"
    sigma_lo: SigmaLo = 0.0
    sigma_hi: SigmaHi = UNLIMITED
    every_k: EveryK = 1
    clip: GradientClip = UNLIMITED
    mask: Mask = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log_prob()  # an unknown label is said when the rule is made, not at the first step
        if self.classifier.config.head == "regression" and getattr(self, "scaling", "") == "entropy":
            raise UserError(
                f"scaling 'entropy' of {self.node.name} with a classifier that has a regression head",
                expected="a classifier of several classes, whose answer has an entropy",
                mend="set scaling to 'raw'",
            )

    @property
    def followed(self) -> NoisyClassifier:
        return self.classifier

    def log_prob(self) -> Callable[[Tensor], Tensor]:
        """log p of the target, as a function of the classifier's logits (B, K) -> (B,)."""
        if self.classifier.config.head == "regression":
            return regression_target(self.label)
        return class_target(parse_target(self.label, self.classifier.config.labels), self.combine)

    def gradient(
        self,
        process: Process,
        x: Tensor,
        sigma: Tensor,
        index: int | None,
        *,
        by_entropy: bool = False,
        note: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """``w * grad_u log p(y | x)`` (B, C, H, W) with respect to u, the unit-variance x; gated, clipped, masked.

        Args:
            process: what x is.
            x: (B, C, H, W) in the coordinates of ``process``.
            sigma: (B,).
            index: of the step, for ``every_k``; None lets every call act.
            by_entropy: multiply each sample's w by log K / H of the classifier's answer.
            note: is given "probability", p of the target (B,), or "score" of a regression head; NaN where the rule does not act.

        Raises:
            UserError: x is not of the classifier's latents.
        """
        log_prob = self.log_prob()

        def value(u: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.classifier.logits(u, log_snr)
            return log_prob(logits), logits

        def heard(logits: Tensor, active: Tensor) -> None:
            if note is not None:
                regression = self.classifier.config.head == "regression"
                values = logits[:, 0] if regression else log_prob(logits).exp()
                note("score" if regression else "probability", spread(values, active))

        weight = entropy_scale if by_entropy else None
        return self.pushed(process, x, sigma, index, value, largest=self.clip, weight=weight, heard=heard)
