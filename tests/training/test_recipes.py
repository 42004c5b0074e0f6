"""The recipes learn on two colours, and their pieces do what they say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from latent_guidance.errors import UserError
from latent_guidance.models.checkpoint import load_classifier, load_text_encoder, load_unet, load_vae
from latent_guidance.models.classifier import ClassifierConfig
from latent_guidance.models.tiny import make_tiny_checkpoint
from latent_guidance.models.vae import VAE
from latent_guidance.training import recipes
from latent_guidance.training.classifier import (
    ClassifierRecipe,
    accuracy_by_noise,
    held_out,
    noised,
    train_classifier,
)
from latent_guidance.training.clip import CLIPRecipe
from latent_guidance.training.data import load_image_folder, to_signed
from latent_guidance.training.latents import LatentSet, encode_folder
from latent_guidance.training.loop import STATE_FILE, LoopSettings
from latent_guidance.training.unet import DRAWS, KINDS, UNetRecipe, averaged_unet, caption_ids, captions, train_unet
from latent_guidance.training.vae import VAERecipe, reconstruction_psnr, settle_decoder, train_vae


def _synthetic(side: int = 8, *, count: int = 40, spread: float = 0.5) -> LatentSet:
    """Two classes of latents that differ in the mean of one channel."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(count) % 2
    mean = torch.randn(count, 4, side, side, generator=generator) * spread
    mean[:, 0] += 2.0 * classes.reshape(-1, 1, 1) - 1
    texts = tuple(f"thing {number}" for number in range(count))
    return LatentSet(mean, torch.full_like(mean, 0.01), texts, classes, ("Low & Dim", "High"))


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
    first, second = (replace(_synthetic(), mark=mark) for mark in ("one VAE", "another VAE"))
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


UNET = UNetRecipe(
    batch=16,
    text_width=64,
    text_layers=1,
    unet={"channels": (32, 32), "attention": (False, True), "heads": 2},
)


def test_unet_recipe_learns_and_the_empty_prompt_is_trained(tmp_path: Path) -> None:
    latents = _synthetic(spread=0.02)
    settings = LoopSettings(steps=80, learning_rate=3e-3, warmup=5, log_every=10, ema_decay=0.9, bf16=False)
    unet, encoder = train_unet(latents, tmp_path, settings=settings, recipe=UNET, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert not unet.training and not any(p.requires_grad for p in encoder.network.parameters())
    ids = caption_ids(encoder, latents)
    assert ids.shape == (6, 8, 40, 77)
    assert torch.equal(ids[3, 0, 0], encoder.prompt_ids([""])[0])
    assert torch.equal(ids[1, 5, 1], encoder.prompt_ids(["thing 1, high"])[0])
    again, _ = averaged_unet(latents, tmp_path, settings=settings, recipe=UNET)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), unet.parameters(), strict=True))


def test_without_a_state_nothing_is_written_for_trained(tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"state\.safetensors was not found: there are no trained weights"):
        averaged_unet(_synthetic(), tmp_path / "wrong", settings=settings, recipe=UNET)


@pytest.mark.parametrize(
    ("config", "predicted"),
    [
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({}, "epsilon"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
    ],
)
def test_only_schedules_of_v_networks_are_trained_on(config: dict[str, str], predicted: str, tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3, bf16=False)
    with pytest.raises(UserError, match=f"a network that predicts {predicted}"):
        train_unet(_synthetic(), tmp_path, settings=settings, recipe=UNET, scheduler_config=config, progress=False)


def test_a_new_run_can_start_from_a_checkpoint(tmp_path: Path) -> None:
    latents = _synthetic(spread=0.02)
    settings = LoopSettings(steps=1, learning_rate=1e-12, bf16=False)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    recipe = replace(UNET, unet={"channels": (32, 64), "attention": (False, True), "heads": 2})
    unet, encoder = train_unet(
        latents, tmp_path / "run", settings=settings, recipe=recipe, start_from=tiny, progress=False
    )
    for ours, theirs in zip(unet.parameters(), load_unet(tiny).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = load_text_encoder(tiny)
    torch.testing.assert_close(encoder.encode("thing 1")[0], before.encode("thing 1")[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="another shape"):
        train_unet(latents, tmp_path / "other", settings=settings, recipe=UNET, start_from=tiny, progress=False)


def _first_loss(folder: Path, latents: LatentSet, recipe: UNetRecipe, **folders: Path) -> float:
    """Of the first step of a run that hardly moves."""
    settings = LoopSettings(steps=1, learning_rate=1e-12, log_every=1, bf16=False)
    train_unet(latents, folder, settings=settings, recipe=recipe, progress=False, **folders)
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]


def test_a_weaker_stage_sharpens_the_empty_prompt_alone(tmp_path: Path) -> None:
    latents = _synthetic(spread=0.02)
    strong, weak = (make_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("strong", "weak")))
    tiny = replace(UNET, unet={"channels": (32, 64), "attention": (False, True), "heads": 2})
    empty, named = tiny.dropping(1.0), tiny.dropping(0.0)
    stages = {"start_from": strong, "away_from": weak}
    # the run starts as the strong stage: what is left to learn is (sharpness - 1) * (strong - weak)
    everywhere = replace(empty, sharp_below=math.inf)
    one, two, three = (
        _first_loss(tmp_path / f"{sharpness}", latents, replace(everywhere, sharpness=sharpness), **stages)
        for sharpness in (1.0, 2.0, 3.0)
    )
    assert one < 1e-6 * two and three == pytest.approx(4 * two, rel=1e-3)
    nowhere = _first_loss(tmp_path / "nowhere", latents, replace(empty, sharp_below=-math.inf), **stages)
    usual = _first_loss(tmp_path / "usual", latents, empty, **stages)
    noise = _first_loss(tmp_path / "noise", latents, empty, start_from=strong)
    assert nowhere == noise and len({two, usual, noise}) == 3
    plain = _first_loss(tmp_path / "plain", latents, named, start_from=strong)
    assert _first_loss(tmp_path / "named", latents, named, **stages) == plain
    with pytest.raises(UserError, match="starts from nothing"):
        _first_loss(tmp_path / "alone", latents, empty, away_from=weak)
    with pytest.raises(UserError, match=r"sharpness = 0\.5"):
        replace(tiny, sharpness=0.5)


def test_what_the_unet_command_is_given_reaches_its_recipe(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[LoopSettings, UNetRecipe, dict[str, Path]]] = []

    def stop(*_: Any, settings: LoopSettings, recipe: UNetRecipe, **folders: Path) -> None:
        seen.append((settings, recipe, folders))
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "train_unet_network", stop)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    shutil.copytree(pictures, tmp_path / "data" / "128")
    options = {
        "batch": 3,
        "time_power": 0.7,
        "drop": 0.5,
        "steps": 7,
        "decay": 0.5,
        "muon": False,
        "seed": 4,
        "sharpness": 3.0,
        "sharp_below": -1.0,
    }
    stages = {"start_from": tmp_path / "strong", "away_from": tmp_path / "weak"}
    with pytest.raises(KeyboardInterrupt):
        recipes.train_unet(tiny, tmp_path / "runs", pictures=tmp_path / "data", **options, **stages)
    [(settings, recipe, folders)] = seen
    assert folders == stages
    for name, value in options.items():
        assert getattr(recipe if hasattr(recipe, name) else settings, name) == value


def test_what_the_decoder_command_is_given_reaches_its_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def stop(*_: Any, settings: LoopSettings, **options: Any) -> None:
        seen.update(options, muon=settings.muon, compile=settings.compile, learning_rate=settings.learning_rate)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "settle_decoder_network", stop)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    shutil.copytree(pictures, tmp_path / "data" / "128")
    given = {"batch": 3, "jitter": 0.7, "muon": False, "compile": True, "learning_rate": 3e-3}
    with pytest.raises(KeyboardInterrupt):
        recipes.settle_decoder(tiny, tmp_path / "runs", pictures=tmp_path / "data", **given)
    assert seen == given


def test_captions_of_every_kind() -> None:
    plain = _synthetic(count=3)
    kinds = captions(plain)
    assert kinds[4] == kinds[5] == [list(plain.texts)] * DRAWS  # without keywords and other captions: the caption
    words = (("a", "b", "c", "d", "e"), (), ("f",))
    described = replace(plain, keywords=words, other_texts=(("甲", "🎸"), ("乙",), ()))
    assert torch.allclose(UNetRecipe().shares().sum(), torch.tensor(1.0))
    _, _, groups, null, keywords, others = captions(described)
    assert groups == [["low & dim", "high", "low & dim"]] and null == [[""] * 3]
    drawn = [draw[0].split(", ") for draw in keywords]
    assert all(1 <= len(set(some)) == len(some) <= 4 and set(some) <= set(words[0]) for some in drawn)
    assert len({tuple(some) for some in drawn}) > 3
    assert {draw[1] for draw in keywords} == {"thing 1"} and {draw[2] for draw in keywords} == {"f"}
    assert {draw[0] for draw in others} == {"甲", "🎸"} and {draw[2] for draw in others} == {"thing 2"}


def test_other_captions_share_what_the_empty_prompt_leaves_as_they_did() -> None:
    usual = UNetRecipe()
    much = usual.dropping(0.85)
    empty = KINDS.index("")
    named = [kind for kind in range(len(KINDS)) if kind != empty]
    assert much.drop == 0.85 and abs(float(much.shares()[empty]) - 0.85) < 1e-6
    torch.testing.assert_close(much.shares()[named] / 0.15, usual.shares()[named] / 0.9)
    torch.testing.assert_close(much.dropping(usual.drop).shares(), usual.shares())
    assert usual.dropping(1.0).dropping(0.5).shares().tolist() == [0.5, 0, 0, 0.5, 0, 0]
    for drop in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"empty prompt {drop}.*none below 0"):
            usual.dropping(drop)


def test_subgroups_as_classes() -> None:
    latents = _synthetic(count=4)
    with pytest.raises(UserError, match="no subgroups"):
        replace(latents, subgroups=("a", "", "b", "b")).by_subgroup()
    finer = replace(latents, subgroups=("cats", "dogs", "cats", "rain")).by_subgroup()
    assert finer.labels == ("cats", "dogs", "rain") and finer.classes.tolist() == [0, 1, 0, 2]


def test_noised_has_unit_variance_and_the_named_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 200, 200, generator=generator)
    log_snr = torch.tensor([-2.0, 3.0])
    x = noised(x0, log_snr, generator=generator)
    torch.testing.assert_close(x.var((1, 2, 3)), torch.ones(2), rtol=0.02, atol=0)
    signal = (x * x0).mean((1, 2, 3))
    ratio = signal.square() / (1 - signal.square())
    torch.testing.assert_close(ratio.log(), log_snr, rtol=0, atol=0.05)


def test_held_out_pictures_are_fixed_and_never_seen() -> None:
    mask = held_out(1870)
    assert int(mask.sum()) == 187 and torch.equal(mask, held_out(1870))


def test_a_class_whose_pictures_are_all_held_out_is_named(tmp_path: Path) -> None:
    latents = _synthetic()
    last = torch.nonzero(held_out(len(latents))).flatten()[0]
    classes = latents.classes.clone()
    classes[last] = 2
    alone = replace(latents, classes=classes, labels=(*latents.labels, "Single"))
    config = ClassifierConfig(
        labels=alone.labels, latent_space="test", latent_channels=4, scaling_factor=1.0, log_snr_range=(-6.0, 6.0)
    )
    settings = LoopSettings(steps=1, learning_rate=1e-3)
    for sets, recipe, words in (
        ([alone], ClassifierRecipe(batch=4, crop=8), r"no pictures to learn 'Single' from: all of them are held out"),
        ([latents], ClassifierRecipe(batch=4, crop=9), "crop = 9 in ClassifierRecipe.*at most 8"),
        ([latents, latents], ClassifierRecipe(batch=1, crop=8), "batch = 1 in ClassifierRecipe.*at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            train_classifier(sets, tmp_path, config=config, settings=settings, recipe=recipe, progress=False)


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


def test_classifier_recipe_learns_and_loses_by_noise(tmp_path: Path) -> None:
    latents = _synthetic(10, count=200)
    config = ClassifierConfig(
        labels=latents.labels,
        latent_space="test",
        latent_channels=4,
        scaling_factor=1.0,
        log_snr_range=(-6.0, 6.0),
        channels=(32, 32),
        layers=(1, 1),
    )
    settings = LoopSettings(steps=80, learning_rate=2e-3, warmup=5, ema_decay=0.9, bf16=False)
    recipe = ClassifierRecipe(batch=32, crop=8)
    classifier = train_classifier(
        [latents, latents], tmp_path, config=config, settings=settings, recipe=recipe, progress=False
    )
    accuracy = accuracy_by_noise(classifier, latents, log_snrs=(-14.0, 5.0), chosen=held_out(200))
    assert accuracy[5.0] > 0.9
    assert accuracy[-14.0] < 0.85


def test_noise_levels_come_more_often_from_where_pictures_settle() -> None:
    def drawn(settling: float, low: float = -5.37, high: float = 7.08) -> torch.Tensor:
        recipe = ClassifierRecipe(batch=20_000, settling=settling)
        return recipe.log_snrs(low, high, generator=torch.Generator().manual_seed(0))

    def inside(log_snrs: torch.Tensor) -> float:
        return float(((log_snrs > -4.5) & (log_snrs < 0.5)).float().mean())

    even = 5.0 / 12.45
    for settling in (0.0, 0.6, 1.0):
        found = drawn(settling)
        assert inside(found) == pytest.approx(settling + (1 - settling) * even, abs=0.02)
        assert float(found.min()) >= -5.37 and float(found.max()) <= 7.08
    assert float(drawn(0.0).min()) < -5.3 and float(drawn(0.6).max()) > 7.0
    short = drawn(1.0, low=-2.0, high=0.0)  # a schedule that has only a part of them
    assert -2 <= float(short.min()) < -1.9 and -0.1 < float(short.max()) <= 0
    assert drawn(1.0, low=2.0, high=3.0).tolist() == [2.0] * 20_000


def test_what_the_classifier_command_is_given_reaches_its_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[ClassifierConfig, LoopSettings, ClassifierRecipe]] = []

    def stop(*_: Any, config: ClassifierConfig, settings: LoopSettings, recipe: ClassifierRecipe) -> None:
        seen.append((config, settings, recipe))
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "train_classifier_network", stop)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    for size in ("128", "160"):
        shutil.copytree(pictures, tmp_path / "data" / size)
    options = {
        "batch": 5, "first": 0.75, "settling": 0.5, "steps": 7, "muon": True, "compile": True, "weight_decay": 0.03,
        "learning_rate": 4e-3, "seed": 4,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        recipes.train_classifier(tiny, tmp_path / "runs", pictures=tmp_path / "data", width=192, **options)
    [(config, settings, recipe)] = seen
    assert config.channels == (64, 192)
    for name, value in options.items():
        assert getattr(recipe if hasattr(recipe, name) else settings, name) == value


def test_a_classifier_of_shifted_latents_says_so(pictures: Path, tmp_path: Path) -> None:
    """Those of SD3 and Flux: (z - shift) * scale is what it learns from, and what its config says."""
    plain = make_tiny_checkpoint(tmp_path / "plain")
    shifted = tmp_path / "shifted"
    shutil.copytree(plain / "vae", shifted / "vae")  # nothing but the VAE
    config = shifted / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.25}))
    with pytest.raises(UserError, match=r"shift_factor 0\.25"):
        load_vae(shifted)
    vae = load_vae(shifted, shifted=True)
    ours = encode_folder(vae, pictures, progress=False)
    theirs = encode_folder(load_vae(plain), pictures, progress=False)
    torch.testing.assert_close(ours.mean, theirs.mean - 0.25 * vae.scaling_factor)
    assert torch.equal(ours.std, theirs.std)
    for size in (128, 160):
        for path in shutil.copytree(pictures, tmp_path / "data" / str(size)).rglob("*.png"):
            Image.open(path).resize((size, size)).save(path)
    recipes.train_classifier(shifted, tmp_path / "runs", pictures=tmp_path / "data", steps=1)
    made = load_classifier(shifted).config
    assert made.shift_factor == 0.25 and made.scaling_factor == pytest.approx(vae.scaling_factor)


@pytest.mark.parametrize("shift", ["much", float("nan"), True])
def test_a_shift_that_is_no_number_is_refused(tmp_path: Path, shift: object) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": shift}))
    with pytest.raises(UserError, match="shift_factor"):
        load_vae(folder, shifted=True)
