"""A tiny seeded random checkpoint, valid in every format, for tests and for trying things without a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, save_checkpoint
from .classifier import Classifier, ClassifierConfig, new_classifier
from .files import write_json, write_safetensors
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig, new_noisy_clip
from .picture_clip import CONFIG, WEIGHTS, new_picture_clip, parse_config
from .text_encoder import TextEncoder, new_text_encoder, text_config
from .unet import new_unet, unet_config
from .vae import new_vae

TINY_LABELS = ("animals", "flags", "food", "smileys")

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.30.0",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
"""v-prediction on Stable Diffusion's schedule."""

LOG_SNR_RANGE = (-5.37, 7.08)
"""log(alpha**2 / sigma**2) at the last and the first step of that schedule, rounded outwards."""


def make_tiny_checkpoint(folder: Path | str, *, seed: int = 0, labels: tuple[str, ...] = TINY_LABELS) -> Path:
    """Write a checkpoint folder with all components and random weights (fp32, some 15 MB), and return it.

    The same seed gives the same bytes. Its VAE has spatial ratio 8 and 4 latent channels, so that stock nodes and
    native loaders take it.
    """
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = new_vae(
            {
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "block_out_channels": [32, 32, 32, 32],
                "layers_per_block": 1,
                "latent_channels": 4,
                "norm_num_groups": 32,
                "sample_size": 64,
                "scaling_factor": 0.8,
            }
        )
        encoder = new_text_encoder(text_config(width=64, layers=1))
        unet = new_unet(unet_config(channels=(32, 64), attention=(False, True), heads=2, token_width=64, sample_size=8))
        config = ClassifierConfig(
            labels=labels,
            latent_space="tiny",
            latent_channels=4,
            scaling_factor=0.8,
            log_snr_range=LOG_SNR_RANGE,
            channels=(32, 32),
            layers=(1, 1),
        )
        classifier = Classifier(new_classifier(config))
        checkpoint = Checkpoint(
            vae=vae,
            text_encoder=encoder,
            unet=unet,
            scheduler_config=dict(SCHEDULER_CONFIG),
            classifier=classifier,
            noisy_clip=_tiny_clip(encoder),
            path=folder,
            name=folder.name,
            latent_space="tiny",
        )
    save_checkpoint(checkpoint, folder, dtype=torch.float32)
    return folder


def _tiny_clip(encoder: TextEncoder) -> NoisyCLIP:
    config = NoisyCLIPConfig(
        latent_space="tiny",
        latent_channels=4,
        scaling_factor=0.8,
        log_snr_range=LOG_SNR_RANGE,
        channels=(32, 32),
        layers=(1, 1),
        text_width=encoder.width,
        embed_width=16,
        text_encoder="that of tiny",
    )
    clip = NoisyCLIP(new_noisy_clip(config))
    clip.network.text_start.copy_(encoder.encode("")[0][0, 0])
    return clip


def make_tiny_picture_clip(folder: Path | str, *, seed: int = 0) -> Path:
    """Write an open_clip folder with random weights (fp32, some 3 MB) that looks at pictures of 16 pixels, and return it."""
    folder = Path(folder)
    model = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    values = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = new_picture_clip(parse_config(values, str(folder)))
    write_json(folder / CONFIG, values)
    write_safetensors(folder / WEIGHTS[0], network.state_dict(), dtype=torch.float32)
    return folder
