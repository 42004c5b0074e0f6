"""The noisy-latent CLIP: how well noisy latents go with a text, as the angle between two vectors.

The image side is the tower of :mod:`.noisy_tower` with a linear projection. The text side reads a prompt's *encoding*, the tokens
that a text encoder hands to the UNet (a CONDITIONING in a node graph), so that it brings no vocabulary of its own and fits
the text encoder that a model has anyway: one learned query attends to all tokens, and a small network projects what it gathers.

It belongs to one text encoder, as it belongs to one latent space. In a causal text encoder the start token sees only itself, so
its encoding is the same for all prompts: it is kept with the weights, and encodings that start otherwise are refused.

Reference: arXiv 2112.10741, section 2.4 and appendix ("noised CLIP"); 2103.00020 for the loss and the two projections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from .noisy_tower import MAX_CHANNELS, Check, NoisyLatentTower, TowerConfig, check_unit_latents, whole

START_TOLERANCE = 0.05
"""How far a prompt's first token may be from the one of the training, as a share of its length: room for half precision and small
changes of a text encoder, not for another one."""


@dataclass(frozen=True, kw_only=True)
class NoisyCLIPConfig(TowerConfig):
    """What a noisy-latent CLIP is and what it was trained on.

    Attributes:
        text_width: Channels of a token of the text encoder's.
        embed_width: Length of the vectors that are compared.
        text_encoder: Name of the text encoder that it was trained on, for people.
    """

    what: ClassVar[str] = "noisy-latent CLIP"
    checks: ClassVar[Mapping[str, Check]] = {
        **TowerConfig.checks,
        "text_width": whole(1, MAX_CHANNELS),
        "embed_width": whole(1, MAX_CHANNELS),
        "text_encoder": (lambda value: isinstance(value, str), "a text"),
    }

    text_width: int
    embed_width: int = 128
    text_encoder: str = ""


class TextPool(nn.Module):
    """Tokens (B, L, text_width) -> (B, width): a learned query attends to all of them, whatever their number."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.key = nn.Linear(text_width, width)
        self.value = nn.Linear(text_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        weights = (self.key(tokens) @ self.query * len(self.query) ** -0.5).softmax(dim=1)
        return (weights[:, :, None] * self.value(tokens)).sum(dim=1)


class NoisyLatentCLIP(NoisyLatentTower):
    """The network; see the module's docstring.

    Args:
        config: Its shape.
    """

    text_start: Tensor

    def __init__(self, config: NoisyCLIPConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.embed_width
        self.image_projection = nn.Linear(config.channels[1], width, bias=False)
        self.text_pool = TextPool(config.text_width, 2 * width)
        self.text_projection = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("text_start", torch.zeros(config.text_width))

    def image_embedding(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Vectors (B, embed_width) of any length, of unit-variance x (B, latent_channels, H, W) at log-SNR (B,)."""
        return self.image_projection(self.pooled(x, log_snr))

    def text_embedding(self, tokens: Tensor) -> Tensor:
        """Vectors (B, embed_width) of any length, of encoded prompts (B, L, text_width)."""
        return self.text_projection(self.text_pool(tokens))

    def trial(self, x: Tensor, log_snr: Tensor) -> None:
        self.image_embedding(x, log_snr)
        self.text_embedding(x.new_zeros(1, 2, self.config.text_width))


class NoisyCLIP:
    """A trained noisy-latent CLIP as guidance rules see it.

    Args:
        network: In fp32 and eval mode.
        fingerprint: Of the file it was loaded from, by which rules know that two nodes loaded the same; None for a new one.
    """

    def __init__(self, network: NoisyLatentCLIP, *, fingerprint: str | None = None) -> None:
        self.network = network.float().eval()
        self.fingerprint = fingerprint
        self.config = network.config

    @property
    def logit_scale(self) -> Tensor:
        """What similarities are multiplied by to be logits, (): the inverse temperature of the training."""
        return self.network.logit_scale.detach().exp()

    def image_features(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Unit-variance x (B, C, H, W) and log-SNR (B,) -> unit vectors (B, E) in fp32, differentiable in x.

        Raises:
            UserError: x has another number of channels, or is too small.
        """
        check_unit_latents(x, self.config, self.network.smallest)
        weight = self.network.conv_in.weight
        x, log_snr = (value.to(weight.device, torch.float32) for value in (x, log_snr))
        return functional.normalize(self.network.image_embedding(x, log_snr), dim=1)

    def check_text(self, tokens: Tensor) -> None:
        """Refuse encoded prompts (B, L, D) of another width, or by another text encoder.

        Raises:
            UserError: saying so.
        """
        check_tokens(tokens, self.config, self.network.text_start)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Encoded prompts (B, L, text_width) -> unit vectors (B, E) in fp32."""
        tokens = tokens.to(self.network.text_start.device, torch.float32)
        return functional.normalize(self.network.text_embedding(tokens), dim=1)


def check_tokens(tokens: Tensor, config: NoisyCLIPConfig, start: Tensor) -> None:
    """Refuse a prompt's encoding by another text encoder than that of the training.

    Args:
        tokens: (B, L, D).
        config: of the CLIP.
        start: (text_width,) the encoding of the start token; zeros where the text encoder has none of its own.

    Raises:
        UserError: D is another width, or the first tokens are not ``start``.
    """
    trained_on = config.text_encoder or "the one of its training"
    mend = "encode the prompt with the text encoder that this CLIP was trained on, or train one with this text encoder"
    if tokens.ndim != 3 or tokens.shape[-1] != config.text_width:
        raise UserError(
            f"a prompt's encoding of shape {tuple(tokens.shape)} for a {config.what} that reads tokens of {config.text_width} numbers",
            expected=f"an encoding by its text encoder ({trained_on})",
            mend=mend,
        )
    if not bool(start.any()):
        return
    first = tokens[:, 0].to(start.device, torch.float32)
    apart = float(((first - start).norm(dim=1) / start.norm()).max())
    if not apart <= START_TOLERANCE:
        raise UserError(
            f"a prompt's encoding whose start token is {apart:.2f} of its length away from the one that this {config.what} knows",
            expected=f"an encoding by its text encoder ({trained_on})",
            mend=mend,
        )


def new_noisy_clip(config: NoisyCLIPConfig) -> NoisyLatentCLIP:
    """A noisy-latent CLIP with fresh random weights (from torch's global generator)."""
    return NoisyLatentCLIP(config)
