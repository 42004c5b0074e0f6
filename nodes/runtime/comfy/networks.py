"""Networks on noisy latents inside ComfyUI: loaded, moved and freed with the model that they guide."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from .model import WholeModelPatcher


class NetworkHandle:
    """A library network whose module ComfyUI's memory management knows of.

    Rules see ``config``, ``network`` and ``fingerprint``, as of the library's own, and what the subclasses add.
    """

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded
        self.config = loaded.config
        self.fingerprint = loaded.fingerprint
        self.network: torch.nn.Module = loaded.network
        self.patcher = WholeModelPatcher(
            self.network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkHandle:
        return self  # ComfyUI deep-copies options; a network is never copied by accident


class ClassifierHandle(NetworkHandle):
    """A noisy-latent classifier."""

    def logits(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Logits (B, K) of unit-variance latents x (B, C, h, w) at log-SNR (B,)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.loaded.logits(x, log_snr)


class NoisyCLIPHandle(NetworkHandle):
    """A noisy-latent CLIP."""

    @property
    def logit_scale(self) -> Tensor:
        """What similarities are multiplied by to be logits, ()."""
        return self.loaded.logit_scale

    def check_text(self, tokens: Tensor) -> None:
        """Raise UserError if encoded prompts (B, L, D) are another text encoder's."""
        self.loaded.check_text(tokens)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, E) of encoded prompts (B, L, D)."""
        return self.loaded.text_features(tokens)

    def image_features(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Unit vectors (B, E) of unit-variance latents x (B, C, h, w) at log-SNR (B,)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.loaded.image_features(x, log_snr)
