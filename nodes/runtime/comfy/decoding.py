"""A ComfyUI VAE as guidance rules see it: decoded with gradients, and loaded, moved and freed with the model that is guided."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from .gradients import plain_patcher


class Decoder:
    """A VAE that decodes unscaled latents to pictures in [-1, 1]; how they are scaled only the model knows.

    Args:
        vae: a ComfyUI VAE of pictures.

    Raises:
        UserError: one that holds nothing, or whose outputs are not pictures.
    """

    scaling_factor = None

    def __init__(self, vae: comfy.sd.VAE) -> None:
        vae.throw_exception_if_invalid()
        self._vae = vae
        self.patcher = plain_patcher(vae.patcher, "guidance by decoded pictures and a VAE")
        self.network: torch.nn.Module = self.patcher.model
        self.latent_channels = vae.latent_channels
        shown = vae.process_output(torch.tensor([-3.0, 0.5, 3.0])).tolist()
        if shown not in ([0.0, 0.75, 1.0], [-3.0, 0.5, 3.0]):
            raise UserError(
                "a VAE that decodes to something else than pictures",
                expected="the VAE of a model of pictures",
                mend="connect the VAE of the model's own checkpoint",
            )
        self._unit = shown[0] == -3.0  # decodes to [0, 1]

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of unscaled latents (B, C, h, w), on their device; not clamped if ``clamp`` is False."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        decoded = self.network.decode(latent.to(self._vae.vae_dtype).to(self._vae.device)).float().to(latent.device)
        pictures = 2 * decoded - 1 if self._unit else decoded
        return pictures.clamp(-1, 1) if clamp else pictures

    def memory_used(self, shape: tuple[int, ...]) -> float:
        """Bytes that ComfyUI reckons with to decode latents of ``shape`` (B, C, h, w), without a graph."""
        return float(self._vae.memory_used_decode(shape, self._vae.vae_dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return self  # ComfyUI deep-copies options; a network is never copied by accident
