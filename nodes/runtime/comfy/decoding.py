"""A ComfyUI VAE as guidance rules see it: decoded with gradients, and loaded, moved and freed with the model that is guided."""

from __future__ import annotations

from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError


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
        self.network: torch.nn.Module = vae.first_stage_model
        self.patcher = vae.patcher
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
        decoded = self.network.decode(latent.to(self._vae.vae_dtype).to(self._vae.device)).float().to(latent.device)
        pictures = 2 * decoded - 1 if self._unit else decoded
        return pictures.clamp(-1, 1) if clamp else pictures

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return self  # ComfyUI deep-copies options; a network is never copied by accident
