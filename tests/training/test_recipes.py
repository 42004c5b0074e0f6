"""The recipes learn on two colours, and their pieces do what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from latent_guidance.errors import UserError
from latent_guidance.models.checkpoint import load_vae
from latent_guidance.models.classifier import ClassifierConfig
from latent_guidance.models.tiny import make_tiny_checkpoint
from latent_guidance.models.vae import VAE
from latent_guidance.training.classifier import (
    ClassifierRecipe,
    train_classifier,
)
from latent_guidance.training.clip import CLIPRecipe
from latent_guidance.training.data import load_image_folder, to_signed
from latent_guidance.training.latents import LatentSet, encode_folder
from latent_guidance.training.loop import STATE_FILE, LoopSettings
from latent_guidance.training.unet import UNetRecipe, averaged_unet, train_unet
from latent_guidance.training.vae import VAERecipe, reconstruction_psnr, settle_decoder, train_vae

from .samples import UNET, synthetic


def test_vae_recipe_learns(pictures: Path, tmp_path: Path) -> None:
    settings = LoopSettings(steps=100, learning_rate=3e-3, warmup=5, log_every=4, ema_decay=0.9, bf16=False)
    recipe = VAERecipe(crop=16, batch=8)
    small = {"block_out_channels": [32, 32, 32, 32]}
    vae = train_vae([pictures, pictures], tmp_path, settings=settings, recipe=recipe, config=small, progress=False)
    with pytest.raises(UserError, match="trained on other data"):
        train_vae([pictures], tmp_path, settings=settings, recipe=recipe, config=small, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 100 and lines[-1]["psnr"] > lines[0]["psnr"] + 1
    latents = encode_folder(vae, pictures, progress=False)
    assert float(latents.mean.std()) == pytest.approx(1.0, abs=1e-3)


def test_settling_changes_the_decoder_alone(pictures: Path, tmp_path: Path) -> None:
    vae = load_vae(make_tiny_checkpoint(tmp_path / "tiny"))
    data = load_image_folder(pictures)
    latents = encode_folder(vae, pictures, progress=False)
    before = {name: value.clone() for name, value in vae.network.state_dict().items()}
    blurred = reconstruction_psnr(vae, data).mean()
    settings = LoopSettings(steps=40, learning_rate=2e-3, warmup=5, ema_decay=0.9, bf16=False)
    settle_decoder(vae, latents, pictures, tmp_path / "run", settings=settings, progress=False)
    changed = {name for name, value in vae.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert not any(".attentions." in name for name in changed)
    assert reconstruction_psnr(vae, data).mean() > blurred + 1
    assert torch.equal(encode_folder(vae, pictures, progress=False).mean, latents.mean)


def test_a_decoder_settled_with_jitter_bears_noise_on_its_latents(pictures: Path, tmp_path: Path) -> None:
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    settings = LoopSettings(steps=60, learning_rate=2e-3, warmup=5, ema_decay=0.9, bf16=False)
    target = to_signed(load_image_folder(pictures).images)
    harm = []
    for jitter in (0.0, 4.0):
        vae = load_vae(tiny)
        latents = encode_folder(vae, pictures, progress=False)
        settle_decoder(vae, latents, pictures, tmp_path / f"{jitter}", settings=settings, jitter=jitter, progress=False)
        noise = torch.randn(latents.mean.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            clean, noisy = (vae.decode(x / vae.scaling_factor) for x in (latents.mean, latents.mean + 4 * noise))
        harm.append(float((noisy - target).square().mean() - (clean - target).square().mean()))
    assert 0 < harm[1] < 0.5 * harm[0]


def test_a_state_of_another_vae_is_refused_and_its_encoder_is_not_kept(pictures: Path, tmp_path: Path) -> None:
    """A finished run would else count as one of the new VAE, train no step, and write the old VAE over the new."""
    settings = LoopSettings(steps=2, learning_rate=2e-3, bf16=False)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")

    def settle(vae: VAE, folder: Path = tmp_path / "run") -> None:
        latents = encode_folder(vae, pictures, progress=False)
        settle_decoder(vae, latents, pictures, folder, settings=settings, progress=False)

    settle(load_vae(tiny))
    state = tmp_path / "run" / STATE_FILE
    with safe_open(state, "pt") as file:
        assert not [name for name in file.keys() if "encoder." in name]  # noqa: SIM118 (it is no mapping)
    settle(load_vae(tiny))
    other = load_vae(tiny)
    with torch.no_grad():
        other.network.encoder.conv_in.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"run.state\.safetensors was trained on other data") as refused:
        settle(other)
    assert "another folder for the runs, or delete the file" in str(refused.value)
    settle(other, tmp_path / "another")
    state.unlink()
    settle(other)


def test_networks_on_latents_refuse_the_state_of_other_latents(tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3, bf16=False)
    first, second = (replace(synthetic(), mark=mark) for mark in ("one VAE", "another VAE"))
    config = ClassifierConfig(
        labels=first.labels, latent_space="test", latent_channels=4, scaling_factor=1.0, log_snr_range=(-6.0, 6.0),
        channels=(32, 32), layers=(1, 1),
    )  # fmt: skip
    recipe = ClassifierRecipe(batch=4, crop=8)

    def classify(*sets: LatentSet) -> None:
        train_classifier(sets, tmp_path / "c", config=config, settings=settings, recipe=recipe, progress=False)

    def unet(latents: LatentSet) -> None:
        train_unet(latents, tmp_path / "u", settings=settings, recipe=UNET, progress=False)

    classify(first, first)
    unet(first)
    classify(first, first)
    unet(first)
    for refused in (lambda: classify(first, second), lambda: unet(second)):
        with pytest.raises(UserError, match="trained on other data"):
            refused()
    with pytest.raises(UserError, match="trained on other data"):
        averaged_unet(second, tmp_path / "u", settings=settings, recipe=UNET)


def test_crops_larger_than_the_pictures_and_empty_batches_are_refused(pictures: Path, vae: VAE, tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"crop = 40 in VAERecipe.*at most 32"):
        train_vae([pictures], tmp_path, settings=settings, recipe=VAERecipe(crop=40), progress=False)
    latents = encode_folder(vae, pictures, progress=False)
    for wrong in ({"batch": 0}, {"jitter": -0.1}, {"jitter": float("nan")}, {"jitter": float("inf")}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
            settle_decoder(vae, latents, pictures, tmp_path, settings=settings, progress=False, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (VAERecipe, {"crop": 100}), (VAERecipe, {"crop": 0}), (VAERecipe, {"batch": 0}), (VAERecipe, {"kl_weight": -1.0}),
        (ClassifierRecipe, {"batch": 0}), (ClassifierRecipe, {"crop": 0}), (ClassifierRecipe, {"first": 0}),
        (ClassifierRecipe, {"first": 1.5}), (ClassifierRecipe, {"settling": -0.5}), (ClassifierRecipe, {"settling": 2}),
        (CLIPRecipe, {"batch": 0}), (CLIPRecipe, {"crop": 0}),
        (UNetRecipe, {"batch": 0}), (UNetRecipe, {"time_power": 0.0}), (UNetRecipe, {"text_width": 100}),
        (UNetRecipe, {"text_layers": 0}), (UNetRecipe, {"sharpness": math.inf}), (UNetRecipe, {"sharp_below": math.nan}),
    ],
)  # fmt: skip
def test_recipes_refuse_what_is_out_of_range(kind: Callable[..., Any], wrong: dict[str, Any]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name} = {value}"):
        kind(**wrong)


@pytest.mark.parametrize("kind", [UNetRecipe, CLIPRecipe])
def test_shares_of_captions_are_none_below_0_and_at_most_1_in_all(kind: Callable[..., Any]) -> None:
    kind(group_only=0.0)
    for wrong, words in (({"by_other": -0.1}, "other -0.1"), ({"by_keywords": 0.9}, "caption -0")):
        with pytest.raises(UserError, match=words):
            kind(**wrong)
