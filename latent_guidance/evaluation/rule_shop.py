"""What the rows of the table over rules are connected to: prompts, references, a weaker model; and what the network is called for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..guidance.losses import ReferenceLatent
from ..models.checkpoint import load_unet
from ..models.unet import network_denoiser
from ..process import Process, expand
from ..training.data import to_signed
from .bench import Bench
from .parts import fingerprint
from .rule_rows import GROUP, PROMPT

RULES_BLOCK = 500
WEAKENING = 0.1
"""Noise on the weights of the weaker model, in standard deviations of each weight matrix, where no weaker checkpoint is given."""


@dataclass(frozen=True)
class Ask:
    """What one set of pictures is asked to be.

    Attributes:
        number: of the set, from 0.
        index: of the picture that is named or referred to, or of the group.
        name: the picture's or the group's.
        prompt: what the model is told.
        seeds: one per picture of the set.
    """

    number: int
    index: int
    name: str
    prompt: str
    seeds: tuple[int, ...]


class Shop:
    """A bench and what rules are connected to on it.

    Args:
        bench: where samples come from.
        names: how many names are asked for.
        seeds: pictures per name or group.
        weak: folder of a weaker checkpoint with the same VAE, for autoguidance; None takes the bench's own with noise on its weights.

    Raises:
        UserError: numbers below 1, or more names than there are pictures.
    """

    def __init__(self, bench: Bench, *, names: int, seeds: int, weak: Path | None = None) -> None:
        if not 1 <= names <= len(bench.data) or seeds < 1:
            raise UserError(
                f"{names} names of {len(bench.data)} pictures, {seeds} seeds each",
                expected="at least 1 of both, and no more names than pictures",
                mend="change --names or --seeds",
            )
        self.bench, self.seeds, self._weak = bench, seeds, weak
        self._chosen = bench.names(names)

    def asks(self, task: str) -> list[Ask]:
        """Every set of pictures of a task: one per name, or one per group. The seeds of set i are the same in every task."""
        texts, labels = self.bench.data.texts, self.bench.labels
        wanted = list(enumerate(labels)) if task == GROUP else [(i, texts[i]) for i in self._chosen]
        return [
            Ask(number, index, name, name if task == PROMPT else "", self._seeds(number))
            for number, (index, name) in enumerate(wanted)
        ]

    def _seeds(self, number: int) -> tuple[int, ...]:
        return tuple(self.bench.seeds(self.seeds, block=RULES_BLOCK + number))

    def after(self, ask: Ask) -> Ask:
        """What is asked for next, the first one after the last."""
        asks = self.asks(PROMPT)
        return asks[(ask.number + 1) % len(asks)]

    def group_of(self, ask: Ask) -> str:
        """The group of a picture."""
        return self.bench.labels[int(self.bench.data.classes[ask.index])]

    def encoded(self, text: str) -> Tensor:
        """Tokens (1, L, width) of a text."""
        return self.bench.encode([text])

    def reference(self, ask: Ask) -> ReferenceLatent:
        """The loss that pulls towards the picture asked for, as its latent."""
        with torch.no_grad():
            picture = to_signed(self.bench.data.images[ask.index : ask.index + 1]).to(self.bench.device)
            return ReferenceLatent(reference=self.bench.checkpoint.vae.encode(picture, sample=False))

    def log_prob(self, ask: Ask) -> LogProb:
        """log p(group | x, sigma) by the checkpoint's classifier, as somebody else's object."""
        label = self.bench.classifier.config.labels.index(ask.name)
        return LogProb(self.bench.classifier, label, self.bench.denoiser.process)

    def lacks(self, needs: str) -> str:
        """Why what a row ``needs`` is not there; "" if it is."""
        there = needs != "noisy_clip" or self.bench.checkpoint.noisy_clip is not None
        return "" if there else "the checkpoint has no noisy-latent CLIP (clip/)"

    @cached_property
    def _weak_unet(self) -> Any:
        if self._weak is not None:
            return load_unet(self._weak, device=self.bench.device)
        generator = torch.Generator().manual_seed(0)
        unet = copy.deepcopy(self.bench.checkpoint.unet)
        with torch.no_grad():
            for weight in unet.parameters():
                if weight.ndim > 1:
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight += WEAKENING * weight.std() * noise
        return unet

    @cached_property
    def weak(self) -> Any:
        """A weaker model's denoiser."""
        return network_denoiser(self._weak_unet, self.bench.checkpoint.scheduler_config)

    @property
    def weak_mark(self) -> str:
        """What tells the weaker model from others."""
        return f"noise of {WEAKENING:g}" if self._weak is None else fingerprint(self._weak / "unet")

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """In this context the list gets the batch size of every call of the UNet, and of the weaker one if it was made."""
        calls: list[int] = []

        def heard(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append(len(arguments[0] if arguments else named["sample"]))

        unets = [self.bench.checkpoint.unet, *([self._weak_unet] if "_weak_unet" in self.__dict__ else [])]
        hooks = [unet.register_forward_pre_hook(heard, with_kwargs=True) for unet in unets]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


class LogProb:
    """log p(label | x, sigma) by a noisy-latent classifier, as the rule for log-probabilities takes it."""

    name = "the classifier's log-probability"

    def __init__(self, classifier: Any, label: int, process: Process) -> None:
        self.classifier, self.label, self.process = classifier, label, process

    def networks(self) -> tuple[Any, ...]:
        return (self.classifier,)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B,) of x (B, C, H, W) in the coordinates of the process, sigma (B,)."""
        unit = x * expand(self.process.unit_scale(sigma), x)
        return self.classifier.logits(unit, self.process.log_snr(sigma)).log_softmax(dim=1)[:, self.label]
