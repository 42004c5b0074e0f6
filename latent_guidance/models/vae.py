"""The autoencoder: pictures <-> latents.

A thin class around diffusers' AutoencoderKL that says at every boundary what is scaled: pictures are BCHW in [-1, 1],
latents are *unscaled*, as the encoder makes them. Multiply by :attr:`VAE.scaling_factor` to get the unit-variance
latents that networks see.

Networks are trained without attention in the middle block. Stock loaders expect one, so it is added when a VAE is
saved, with an output projection of zeros: it adds nothing, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .configs import smallest_side, too_small

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class VAE:
    """Encode and decode pictures.

    Args:
        network: diffusers' AutoencoderKL; used in eval mode.
    """

    def __init__(self, network: AutoencoderKL) -> None:
        self.network: Any = network  # diffusers' own annotations leave out the outputs' attributes

    @property
    def scaling_factor(self) -> float:
        """1 / standard deviation of the training set's latents."""
        return float(self.network.config["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        """What is taken off latents before they are scaled: 0 but for those of SD3 and Flux."""
        return float(self.network.config.get("shift_factor") or 0.0)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.network.config["latent_channels"])

    @property
    def spatial_ratio(self) -> int:
        """Pixels of a picture's side per latent pixel."""
        return 2 ** (len(self.network.config["block_out_channels"]) - 1)

    @property
    def smallest(self) -> int:
        """Side of the smallest latents that the network takes."""
        return smallest_side([self.network.config["block_out_channels"][-1]], self.network.config["norm_num_groups"])

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.network.parameters()).dtype

    def encode(self, image: Tensor, *, sample: bool, generator: torch.Generator | None = None) -> Tensor:
        """Pictures -> unscaled latents.

        Args:
            image: (B, 3, H, W) in [-1, 1]; H and W multiples of :attr:`spatial_ratio`.
            sample: Draw from the posterior; otherwise its mode (mean).
            generator: Where the draw's noise comes from; None for the global one.

        Returns:
            (B, latent_channels, H / ratio, W / ratio), unscaled.

        Raises:
            UserError: The picture's shape does not fit.
        """
        ratio = self.spatial_ratio
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(
                f"The VAE was given a picture of shape {tuple(image.shape)}",
                expected="(B, 3, H, W)",
                mend="give RGB pictures, channels first",
            )
        height, width = image.shape[-2:]
        if height % ratio or width % ratio or not (height and width):
            fitting = (max(ratio, round(width / ratio) * ratio), max(ratio, round(height / ratio) * ratio))
            raise UserError(
                f"A picture of {width} x {height} pixels cannot be encoded",
                expected=f"sides that are multiples of {ratio}",
                mend=f"scale or crop it, for instance to {fitting[0]} x {fitting[1]}",
            )
        if min(height, width) < ratio * self.smallest:
            raise too_small("VAE", height // ratio, width // ratio, self.smallest, ratio=ratio)
        with torch.no_grad():
            posterior = self.network.encode(image.to(self.device, self.dtype)).latent_dist
        return posterior.sample(generator=generator) if sample else posterior.mode()

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        """Unscaled latents (B, latent_channels, h, w) -> pictures (B, 3, h * ratio, w * ratio), clamped to [-1, 1].

        Gradients flow through (outside ``torch.no_grad``), so that losses on decoded pictures can use it; ``clamp=False`` for those,
        since nothing flows back from what was clamped.

        Raises:
            UserError: The latents have another number of channels, or are too small.
        """
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels:
            raise UserError(
                f"The VAE was given latents of shape {tuple(latent.shape)}",
                expected=f"(B, {self.latent_channels}, h, w)",
                mend="use the VAE that made these latents",
            )
        if min(latent.shape[-2:]) < self.smallest:
            raise too_small("VAE", latent.shape[-2], latent.shape[-1], self.smallest, ratio=self.spatial_ratio)
        pictures = self.network.decode(latent.to(self.device, self.dtype)).sample
        return pictures.clamp(-1, 1) if clamp else pictures


def new_vae(config: Mapping[str, Any]) -> VAE:
    """A VAE with fresh random weights (from torch's global generator).

    Args:
        config: AutoencoderKL's arguments.
    """
    from diffusers import AutoencoderKL

    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return VAE(AutoencoderKL(**known))


def with_middle_attention(vae: VAE) -> VAE:
    """The same VAE with attention in its middle blocks that adds exactly nothing; itself if it has attention."""
    config = {name: value for name, value in vae.network.config.items() if not name.startswith("_")}
    if config.get("mid_block_add_attention", True):
        return vae
    wider = new_vae({**config, "mid_block_add_attention": True})
    weights = wider.network.state_dict()
    for name, value in weights.items():
        if ".attentions." in name and ".group_norm." not in name:
            value.zero_()
    wider.network.load_state_dict({**weights, **vae.network.state_dict()})
    nn.Module.to(wider.network, vae.device, vae.dtype).train(vae.network.training)
    return VAE(wider.network)
