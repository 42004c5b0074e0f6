"""Draws docs/results.jpg, the README's picture: prompts above, classifier guidance on an empty prompt below.

python tools/results_picture.py
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from latent_guidance.evaluation.pictures import picture_grid
from latent_guidance.guidance import CFG, ClassifierGuidance, Guider, Rule
from latent_guidance.models.checkpoint import Checkpoint, emoji_folder, load_checkpoint
from latent_guidance.models.unet import network_denoiser
from latent_guidance.noise import SeededNoise
from latent_guidance.samplers import sample_dpmpp_2m, sample_dpmpp_2m_sde
from latent_guidance.step_grids import step_grid

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "results.jpg"
PROMPTS = (
    "grinning face", "man: beard", "cat face", "red apple", "rocket", "soccer ball", "guitar", "red heart", "flag: Brazil",
)  # fmt: skip
CFG_SCALE, CLASSIFIER_SCALE, STEPS = 1.5, 0.2, 30


def draw(checkpoint: Checkpoint, prompt: str, rules: list[Rule], seeds: list[int]) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1], one per seed."""
    denoiser = network_denoiser(checkpoint.unet, checkpoint.scheduler_config)
    cond, null = (checkpoint.text_encoder.encode(text)[0] for text in (prompt, ""))
    guider = Guider(denoiser, rules, uncond=null)
    sigmas = step_grid(denoiser.schedule, "karras", STEPS)
    noise = SeededNoise(seeds)
    x = noise.initial((len(seeds), 4, 16, 16)) * (1 + sigmas[0] ** 2).sqrt()
    sample = sample_dpmpp_2m if prompt else sample_dpmpp_2m_sde
    latents = sample(guider, x, sigmas, cond, noise_sampler=noise)
    return ((checkpoint.vae.decode(latents / checkpoint.vae.scaling_factor) + 1) / 2).movedim(1, -1)


def main() -> None:
    import numpy as np
    from PIL import Image

    folder = emoji_folder()
    assert folder is not None, "models/emoji is missing"
    checkpoint = load_checkpoint(folder)
    classifier = checkpoint.classifier
    assert classifier is not None
    with torch.inference_mode():
        cells = [draw(checkpoint, prompt, [CFG(guidance_scale=CFG_SCALE)], [1, 2]) for prompt in PROMPTS]
        captions = list(PROMPTS)
        for label in classifier.config.labels:
            rule = ClassifierGuidance(classifier=classifier, label=f'"{label}"', guidance_scale=CLASSIFIER_SCALE)
            cells.append(draw(checkpoint, "", [rule], [1, 2]))
            captions.append(label)
    sheet = picture_grid(cells, captions, columns=len(PROMPTS))[0]
    partial = OUTPUT.with_name(".results.partial.jpg")
    Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8)).save(partial, quality=90)
    os.replace(partial, OUTPUT)


if __name__ == "__main__":
    main()
