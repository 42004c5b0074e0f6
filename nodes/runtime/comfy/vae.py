"""VAEs of checkpoint folders as ComfyUI VAEs, and the colours of ComfyUI's previews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.models.files import load_weights
from ....latent_guidance.noise import SeededNoise
from .model import WholeModelPatcher


def native_vae_params(config: Mapping[str, Any]) -> dict[str, Any] | str:
    """AutoencoderKL's arguments in ComfyUI for a diffusers AutoencoderKL ``config``, or a sentence saying why it does not map."""
    channels = list(config["block_out_channels"])
    fixed = {
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            return f"{key} is {config[key]!r}, ComfyUI's VAE has {value!r}"
    if len(channels) != 4 or any(c % channels[0] for c in channels):
        return f"block_out_channels {channels}, ComfyUI converts four multiples of the first"
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        return f"block types {sorted(kinds)}"
    if config.get("layers_per_block", 1) > 2:
        return f"layers_per_block is {config['layers_per_block']}, ComfyUI converts at most 2"
    latent_channels = config["latent_channels"]
    ddconfig = {
        "double_z": True,
        "z_channels": latent_channels,
        "resolution": 256,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config.get("layers_per_block", 1),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": latent_channels}


def _dtype() -> torch.dtype:
    """fp32: the VAEs of this project are small, and half precision costs them quality."""
    return torch.float32


def native_vae(config: Mapping[str, Any], weights: Mapping[str, Tensor], *, path: Path) -> comfy.sd.VAE | str:
    """A VAE in ComfyUI's AutoencoderKL, or a sentence saying what keeps this one out of it.

    Args:
        config: of diffusers' AutoencoderKL.
        weights: its state dict.
        path: where they come from; named in errors.

    Raises:
        UserError: weights that are not those of the config.
    """
    params = native_vae_params(config)
    if isinstance(params, str):
        return params
    made = _empty_vae(params)
    converted = comfy.diffusers_convert.convert_vae_state_dict(dict(weights))
    load_weights(made.first_stage_model, converted, path=path, what="VAE")
    made.latent_channels = config["latent_channels"]
    return made


def _empty_vae(params: dict[str, Any]) -> comfy.sd.VAE:
    """A ComfyUI VAE with fresh weights; handed any others, it would only log what is missing."""
    fresh = comfy.ldm.models.autoencoder.AutoencoderKL(**params).state_dict()
    return comfy.sd.VAE(sd=fresh, config={"params": params}, dtype=_dtype())


class WrappedVAE(torch.nn.Module):
    """diffusers' AutoencoderKL with the methods that ComfyUI's VAE calls: pictures (B, 3, H, W) in [-1, 1], unscaled latents."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.regularization = Posterior()

    def encode(self, image: Tensor, **_: Any) -> Tensor:
        return self.regularization(self.network.encode(image).latent_dist.parameters)[0]

    def decode(self, latent: Tensor, **_: Any) -> Tensor:
        return self.network.decode(latent).sample


class Posterior(torch.nn.Module):
    """The mode of (mean, log-variance) joined along the channels, as ComfyUI's regularization modules give it."""

    def forward(self, moments: Tensor) -> tuple[Tensor, None]:
        return moments.chunk(2, dim=1)[0], None


def wrapped_vae(network: torch.nn.Module, config: Mapping[str, Any]) -> comfy.sd.VAE:
    """A VAE around the library's network, for architectures that ComfyUI's AutoencoderKL does not have."""
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    made = _empty_vae({"ddconfig": ddconfig, "embed_dim": 4})
    ratio = 2 ** (len(config["block_out_channels"]) - 1)
    made.first_stage_model = WrappedVAE(network.to(_dtype())).eval()
    made.downscale_ratio = made.upscale_ratio = ratio
    made.latent_channels = config["latent_channels"]
    made.patcher = WholeModelPatcher(
        made.first_stage_model,
        load_device=made.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return made


def encode(vae: comfy.sd.VAE, image: Tensor, *, sample: bool, seed: int) -> Tensor:
    """Unscaled latents of image (B, H, W, 3) in [0, 1]: the posterior's mode, or item i drawn with seed + i."""
    ratio = spatial_ratio(vae)
    height, width = image.shape[1:3]
    if height % ratio or width % ratio:
        raise UserError(
            f"a picture of {width} x {height} pixels",
            expected=f"sides that are multiples of {ratio}, the VAE's spatial ratio",
            mend=f"scale or crop it (Upscale Image, Image Crop), for instance to "
            f"{max(1, width // ratio) * ratio} x {max(1, height // ratio) * ratio}",
        )
    if not sample:
        return vae.encode(image[..., :3])
    return _encode_sample(vae, image[..., :3], [(seed + item) % 2**64 for item in range(len(image))])


def _encode_sample(vae: comfy.sd.VAE, image: Tensor, seeds: Sequence[int]) -> Tensor:
    regularization = getattr(vae.first_stage_model, "regularization", None)
    if regularization is None:
        raise UserError(
            "a VAE that does not say how sure it is of a latent",
            expected="an AutoencoderKL, for a sample of the posterior",
            mend="set posterior to mode, or load a VAE of a checkpoint folder with Load VAE (Folder)",
        )
    moments: list[Tensor] = []
    handle = regularization.register_forward_pre_hook(lambda _, args: moments.append(args[0].detach().float().cpu()))
    try:
        mode = vae.encode(image)
    finally:
        handle.remove()
    whole = sum(len(part) for part in moments) == len(mode)
    if not whole or any(part.shape[2:] != mode.shape[2:] for part in moments):
        raise UserError(
            f"a picture of {image.shape[2]} x {image.shape[1]} pixels that had to be encoded in tiles",
            expected="a picture that fits into memory whole, for a sample of the posterior",
            mend="set posterior to mode, or encode a smaller picture",
        )
    mean, log_variance = torch.cat(moments).chunk(2, dim=1)
    noise = SeededNoise(seeds).initial(mean.shape)
    return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise


def spatial_ratio(vae: comfy.sd.VAE) -> int:
    """Pixels of a picture's side per latent pixel."""
    return int(vae.spacial_compression_encode())


def decode(vae: comfy.sd.VAE, samples: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] of unscaled latents (B, C, h, w)."""
    channels = getattr(vae, "latent_channels", samples.shape[1])
    if samples.shape[1] != channels:
        raise UserError(
            f"latents of {samples.shape[1]} channels",
            expected=f"{channels}, as this VAE makes them",
            mend="decode with the VAE of the checkpoint that made the latents (Load Checkpoint Folder)",
        )
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def preview_colours(vae: comfy.sd.VAE, scaling_factor: float) -> tuple[list[list[float]], list[float]]:
    """(factors (C, 3), bias (3,)) of the best linear map from scaled latents to colours in [-1, 1].

    Fitted to pictures of coloured squares, with edges between them: a VAE gives the latents of a picture in one colour, or of
    one only two latents wide, values that no real picture has.
    """
    ratio, pixels, draw = spatial_ratio(vae), 16, torch.Generator().manual_seed(0)
    squares = [
        torch.rand(6, pixels // side, pixels // side, 3, generator=draw)
        .repeat_interleave(side, 1)
        .repeat_interleave(side, 2)
        for side in (4, 8)
    ]  # (6, h, w, 3) for squares of 4 and of 8 latents
    colours = torch.cat(squares)
    latents = vae.encode(colours.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)).float() * scaling_factor
    latents = latents.movedim(1, -1).flatten(0, -2).cpu()
    design = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    solution = torch.linalg.lstsq(design.double(), (2 * colours - 1).flatten(0, -2).double(), driver="gelsd").solution
    return solution[:-1].float().tolist(), solution[-1].float().tolist()
