"""What all rules that follow a noisy-latent classifier share: target, strength, gates, and the gradient itself.

A noisy-latent classifier sees x brought to unit variance, ``u = x / sqrt(alpha**2 + sigma**2)``, and the log signal-to-noise
ratio ``log(alpha**2 / sigma**2)``, so that one classifier guides every model on its VAE: eps, v or flow. The gradient is taken
with respect to u, which is x in VP coordinates, and brought back by the chain rule, grad_x = grad_u / sqrt(alpha**2 + sigma**2).
Outside the noise range that the classifier was trained on the gradient is zero by definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..process import Process, expand
from .base import Rule
from .gradient import clip_norm, finite_or_unguided, input_gradient, normal_parameters_
from .knobs import UNLIMITED, Choice, Number, Socket, Text, Whole
from .latents import Latents
from .limited_interval import check_window, inside_window
from .targets import COMBINE, class_target, parse_target, regression_target


class ClassifierConfig(Protocol):
    """What a rule must know of a classifier."""

    labels: tuple[str, ...]
    head: str  # "classes" or "regression"
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    log_snr_range: tuple[float, float]
    latent_space: str


class NoisyClassifier(Protocol):
    """A classifier as rules see it; ``network`` is the module behind it, None for one in closed form.

    One loaded from a file has a ``fingerprint`` too (see :func:`.base.network_key`).
    """

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
class ClassifierRule(Rule):
    """Base of the classifier rules: their common knobs and :meth:`gradient`."""

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
            help="Strength of the push; 0 is off, 1 is Bayes' rule, more is clearer and less varied, below 0 steers away.",
            help_zh="推动的强度：0 关闭，1 即贝叶斯公式，越大越明确但多样性越低，负值则远离目标。",
        ),
    ] = 5.0
    combine: Annotated[
        str,
        Choice(
            options=COMBINE,
            label_zh="多标签组合",
            help="With several labels: any of them is right (log-sum), or all at once (sum of logs, soft labels).",
            help_zh="有多个标签时：任一即可（对数求和），或同时满足（对数之和，软标签）。",
        ),
    ] = "any"
    sigma_lo: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=0.0,
            label_zh="sigma 下限",
            help="The classifier acts at noise levels sigma above this one; 0 is no lower limit.",
            help_zh="噪声水平 sigma 高于此值时分类器才起作用；0 表示没有下限。",
        ),
    ] = 0.0
    sigma_hi: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=UNLIMITED,
            label_zh="sigma 上限",
            help="The classifier acts at noise levels sigma up to and including this one; 1000 is no upper limit.",
            help_zh="噪声水平 sigma 不高于此值时分类器才起作用；1000 表示没有上限。",
        ),
    ] = UNLIMITED
    every_k: Annotated[
        int,
        Whole(
            min=1,
            max=100,
            neutral=1,
            label_zh="每 k 步",
            help="Follow the classifier at every k-th noise level of the run only; 1 is every one. Not for Heun, which visits each twice.",
            help_zh="只在每第 k 个噪声水平使用分类器；1 表示每一个。不适用于每个水平求值两次的 Heun。",
        ),
    ] = 1
    clip: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.1,
            neutral=UNLIMITED,
            label_zh="梯度裁剪",
            help="Largest norm of the gradient of log p for one picture, in unit-variance latents; 1000 clips nothing.",
            help_zh="单张图片 log p 梯度的最大范数（单位方差潜空间）；1000 表示不裁剪。",
        ),
    ] = UNLIMITED
    mask: Annotated[
        Any,
        Socket(
            type="MASK",
            optional=True,
            label_zh="遮罩",
            help="Where to push, 0 to 1 over the picture; without one, everywhere.",
            help_zh="在画面的哪些位置推动（0 到 1）；不连接则作用于整个画面。",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)
        self.log_prob()  # an unknown label is said when the rule is made, not at the first step
        if self.classifier.config.head == "regression" and getattr(self, "scaling", "") == "entropy":
            raise UserError(
                f"scaling 'entropy' of {self.node.name} with a classifier that has a regression head",
                expected="a classifier of several classes, whose answer has an entropy",
                mend="set scaling to 'raw'",
            )

    def networks(self) -> tuple[Any, ...]:
        return (self.classifier,)

    def log_prob(self) -> Callable[[Tensor], Tensor]:
        """log p of the target, as a function of the classifier's logits (B, K) -> (B,)."""
        if self.classifier.config.head == "regression":
            return regression_target(self.label)
        return class_target(parse_target(self.label, self.classifier.config.labels), self.combine)

    def check_latents(self, latents: Latents) -> None:
        config = self.classifier.config
        mine = Latents(config.latent_space, config.latent_channels, config.scaling_factor, config.shift_factor)
        if not mine.same_as(latents):
            raise UserError(
                f"a classifier for the latents of {mine} in {self.node.name}, on a model with the latents of {latents}",
                expected=f"a classifier trained on the latents of {latents.name!r}",
                mend=f"choose one in the node Load Noisy-Latent Classifier, train one on these latents, or load a model on {mine.name!r}",
            )

    def active(self, process: Process, sigma: Tensor, index: int | None) -> Tensor:
        """Which samples (B,) the rule acts on: sigma window, every k-th step, the classifier's own noise range."""
        low, high = self.classifier.config.log_snr_range
        log_snr = process.log_snr(sigma)
        on_turn = index is None or index % self.every_k == 0
        trained = (log_snr >= low) & (log_snr <= high)
        return inside_window(sigma, self.sigma_lo, self.sigma_hi) & trained & on_turn

    def closed(self, process: Process, sigmas: Tensor) -> str:
        if self.guidance_scale == 0 or any(bool(self.active(process, s[None], i).any()) for i, s in enumerate(sigmas)):
            return ""
        low, high = (
            float(process.sigma_from_alphas_cumprod(torch.tensor(bound, dtype=torch.float64).sigmoid()))
            for bound in reversed(self.classifier.config.log_snr_range)
        )
        every = f", every {self.every_k} steps" if self.every_k > 1 else ""
        window = f"its window is ({self.sigma_lo:g}, {self.sigma_hi:g}]{every}"
        return f"{window}, the classifier was trained at {low:.3g} to {high:.3g}"

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
        if x.ndim != 4 or x.shape[1] != self.classifier.config.latent_channels:
            raise UserError(
                f"a latent of shape {tuple(x.shape)} for a classifier of {self.classifier.config.latent_channels} channels",
                expected=f"(batch, {self.classifier.config.latent_channels}, height, width)",
                mend="use the classifier with the model it was trained for (the node Load Noisy-Latent Classifier)",
            )
        result = torch.zeros_like(x)
        active = self.active(process, sigma, index)
        if self.guidance_scale == 0 or not bool(active.any()):
            return result
        if (network := self.classifier.network) is not None:
            normal_parameters_(network)
        log_prob = self.log_prob()
        log_snr = process.log_snr(sigma)[active].clone()

        def values_and_logits(u: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.classifier.logits(u, log_snr)
            return log_prob(logits), logits

        with torch.inference_mode(False):
            log_snr = log_snr.clone()  # what autograd saves must not be an inference tensor
            u = (x * expand(process.unit_scale(sigma), x))[active]
            gradient, logits = input_gradient(values_and_logits, u)
        if note is not None:
            self._note(note, log_prob, logits, active)
        gradient = self.guidance_scale * clip_norm(gradient, self.clip)
        if by_entropy:
            gradient = gradient * expand(entropy_scale(logits).to(gradient), gradient)
        result[active] = finite_or_unguided(gradient.to(x.dtype), rule=self.node.name, index=index, sigma=sigma[active])
        return result if self.mask is None else result * resized_mask(self.mask, x)

    def _note(
        self, note: Callable[[str, Tensor], None], log_prob: Callable[[Tensor], Tensor], logits: Tensor, active: Tensor
    ) -> None:
        """Notes what the classifier says of the target, by the logits that the gradient was taken from."""
        regression = self.classifier.config.head == "regression"
        values = torch.full(active.shape, torch.nan, dtype=logits.dtype, device=logits.device)
        values[active] = logits[:, 0] if regression else log_prob(logits).exp()
        note("score" if regression else "probability", values)


def resized_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (H, W) or (B, H, W) in [0, 1] at x's own height and width, (1 or B, 1, h, w) in x's dtype.

    Raises:
        UserError: the mask's batch is neither 1 nor x's.
    """
    mask = mask if mask.ndim == 3 else mask[None]
    if mask.shape[0] not in (1, x.shape[0]):
        raise UserError(
            f"{mask.shape[0]} masks for a batch of {x.shape[0]}",
            expected="one mask, or one for each picture",
            mend="connect a single mask",
        )
    return nn.functional.interpolate(mask[:, None].to(x), size=x.shape[-2:], mode="bilinear", antialias=True)
