"""The noisy-latent classifier: p(label | x, noise level) for gradients.

The tower of :mod:`.noisy_tower` with a linear head.

Reference: arXiv 2105.05233, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .noisy_tower import MAX_NAME, Check, NoisyLatentTower, TowerConfig, check_unit_latents, is_name

HEADS = ("classes", "regression")
MAX_LABELS = 100_000


def _unique_words(value: object) -> bool:
    if not isinstance(value, tuple) or not 1 <= len(value) <= MAX_LABELS:
        return False
    return all(map(is_name, value)) and len(set(value)) == len(value)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TowerConfig):
    """What a noisy-latent classifier is and what it was trained on.

    Attributes:
        labels: Class names, in the order of the logits; of a regression head, the name of its score.
        head: "classes" or "regression" (one unbounded number).
    """

    what: ClassVar[str] = "classifier"
    checks: ClassVar[Mapping[str, Check]] = {
        **TowerConfig.checks,
        "labels": (
            _unique_words,
            f"1 to {MAX_LABELS} names of at most {MAX_NAME} characters, none empty and none twice",
        ),
        "head": (lambda value: value in HEADS, f"one of {', '.join(HEADS)}"),
    }

    labels: tuple[str, ...]
    head: str = "classes"

    @property
    def outputs(self) -> int:
        """Numbers per sample that the network gives: one per label, or one."""
        return len(self.labels) if self.head == "classes" else 1


class NoisyLatentClassifier(NoisyLatentTower):
    """The network; see the module's docstring.

    Args:
        config: Its shape.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.config = config
        self.head = nn.Linear(config.channels[1], config.outputs)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Logits (B, K), or (B, 1) of a regression head.

        Args:
            x: (B, latent_channels, H, W) at unit variance; H and W at least :attr:`smallest`.
            log_snr: (B,) log(alpha**2 / sigma**2).
        """
        return self.head(self.pooled(x, log_snr))

    def trial(self, x: Tensor, log_snr: Tensor) -> None:
        self(x, log_snr)


class Classifier:
    """A trained classifier as guidance rules see it: its config and its logits.

    Args:
        network: In fp32 and eval mode.
        fingerprint: Of the file it was loaded from, by which rules know that two nodes loaded the same; None for a new one.
    """

    def __init__(self, network: NoisyLatentClassifier, *, fingerprint: str | None = None) -> None:
        self.network = network.float().eval()
        self.fingerprint = fingerprint
        self.config = network.config

    def logits(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Unit-variance x (B, C, H, W) and log-SNR (B,) -> logits (B, K) in fp32, differentiable in x.

        Raises:
            UserError: x has another number of channels, or is too small.
        """
        check_unit_latents(x, self.config, self.network.smallest)
        weight = self.network.conv_in.weight
        return self.network(x.to(weight.device, torch.float32), log_snr.to(weight.device, torch.float32))


def new_classifier(config: ClassifierConfig) -> NoisyLatentClassifier:
    """A classifier with fresh random weights (from torch's global generator)."""
    return NoisyLatentClassifier(config)
