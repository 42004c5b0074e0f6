"""Checkpoint folders, component by component, as ComfyUI's objects."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....latent_guidance.models.configs import (
    DEFAULT_SCALING_FACTOR,
    read_text_config,
    read_unet_config,
    read_vae_config,
)
from ....latent_guidance.models.files import component_folder, read_json, read_safetensors, weights_file
from ....latent_guidance.schedules import schedule_from_config
from . import model, text, vae

log = logging.getLogger("latent_guidance")


def _weights(folder: Path) -> dict[str, Tensor]:
    weights, _ = read_safetensors(weights_file(folder))
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def load_vae(checkpoint: Path) -> Any:
    """VAE of a checkpoint folder or its ``vae/``: in ComfyUI's own class where it maps, else wrapped."""
    folder = component_folder(checkpoint, "vae")
    config, weights = read_vae_config(folder), _weights(folder)
    made = vae.native_vae(config, weights, path=folder)
    if not isinstance(made, str):
        return made
    log.info("The VAE in %s is used through the library's own network: %s.", folder, made)
    return vae.wrapped_vae(_vae_network(folder), config)


def _vae_network(folder: Path) -> torch.nn.Module:
    from ....latent_guidance.models.checkpoint import load_vae

    return load_vae(folder).network


def load_clip(checkpoint: Path) -> Any:
    """CLIP of a checkpoint folder or its ``text_encoder/``."""
    from ....latent_guidance.models.tokenizer import Tokenizer, load_tokenizer

    folder = component_folder(checkpoint, "text_encoder")
    near = [place / "tokenizer" for place in (folder, folder.parent) if (place / "tokenizer").is_dir()]
    pad = (load_tokenizer(near[0]) if near else Tokenizer()).pad
    return text.native_clip(read_text_config(folder), _weights(folder), pad=pad, path=folder)


def load_model(checkpoint: Path) -> Any:
    """MODEL of a checkpoint folder: in ComfyUI's own network class where it maps, else wrapped."""
    folder = component_folder(checkpoint, "unet")
    scheduler = read_json(checkpoint / "scheduler" / "scheduler_config.json")
    schedule_from_config(scheduler)  # refuses one that is garbled
    config, weights = read_unet_config(folder), _weights(folder)
    space = _latent_space(checkpoint, config)
    made = model.native_model(config, weights, scheduler, space, path=folder)
    if not isinstance(made, str):
        return made
    log.info("The UNet in %s is used through the library's own network: %s.", folder, made)
    from ....latent_guidance.models.checkpoint import load_unet

    return model.wrapped_model(load_unet(folder), scheduler, space)


def _latent_space(checkpoint: Path, unet: Mapping[str, Any]) -> model.LatentSpace:
    from ....latent_guidance.models.checkpoint import latent_space_of

    vae_config = read_vae_config(component_folder(checkpoint, "vae"))
    factor = float(vae_config.get("scaling_factor", DEFAULT_SCALING_FACTOR))

    def preview() -> tuple[list[list[float]], list[float]]:
        with torch.inference_mode():
            return vae.preview_colours(load_vae(checkpoint), factor)

    return model.LatentSpace(int(unet["in_channels"]), factor, preview, latent_space_of(checkpoint))


def load_classifier(path: Path) -> Any:
    """A classifier that ComfyUI loads and frees with the model it guides."""
    from ....latent_guidance.models.checkpoint import load_classifier
    from .networks import ClassifierHandle

    return ClassifierHandle(load_classifier(path))


def load_noisy_clip(path: Path) -> Any:
    """A noisy-latent CLIP that ComfyUI loads and frees with the model it guides."""
    from ....latent_guidance.models.checkpoint import load_noisy_clip
    from .networks import NoisyCLIPHandle

    return NoisyCLIPHandle(load_noisy_clip(path))
