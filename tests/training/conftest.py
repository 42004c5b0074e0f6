from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_guidance.models.checkpoint import load_vae
from latent_guidance.models.tiny import make_tiny_checkpoint
from latent_guidance.models.vae import VAE


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 32 x 32 in two classes: reds and blues."""
    folder = tmp_path_factory.mktemp("pictures") / "32"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(24):
        label = ("reds", "blues")[number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 60, (32, 32, 3), generator=generator, dtype=torch.uint8)
        pixels[8:24, 8:24, 0 if label == "reds" else 2] += 190
        name = f"{label}/{number}.png"
        Image.fromarray(pixels.numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"{label[:-1]} square {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAE:
    return load_vae(make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))
