"""What the training commands are given reaches the networks' recipes; how they end."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.models.checkpoint import load_checkpoint, load_classifier, load_unet, load_vae
from latent_guidance.models.classifier import ClassifierConfig
from latent_guidance.models.tiny import make_tiny_checkpoint
from latent_guidance.training import __main__ as commands
from latent_guidance.training import recipes
from latent_guidance.training.classifier import (
    ClassifierRecipe,
)
from latent_guidance.training.latents import encode_folder
from latent_guidance.training.loop import LoopSettings
from latent_guidance.training.unet import UNetRecipe


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


@pytest.mark.parametrize(
    ("command", "wrong", "words"),
    [
        (recipes.train_vae, {"crop": 0}, "crop = 0"),
        (recipes.settle_decoder, {"steps": 0}, "steps = 0"),
        (recipes.train_classifier, {"width": 100}, "width = 100.*multiples of 32"),
        (recipes.train_classifier, {"settling": 2.0}, r"settling = 2\.0"),
        (recipes.train_clip, {"batch": 0}, "batch = 0"),
        (recipes.train_clip, {"start_from": Path("nowhere")}, "nowhere"),
        (recipes.train_unet, {"sharpness": 0.5}, r"sharpness = 0\.5"),
        (recipes.train_unet, {"decay": 0.0}, r"decay = 0\.0"),
    ],
)
def test_settings_are_checked_before_pictures_are_read(
    command: Callable[..., Any], wrong: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("pictures were read")

    for name in ("encode_folder", "load_image_folder", "make_emoji_folder", "train_vae_network"):
        monkeypatch.setattr(recipes, name, read)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(UserError, match=words):
        command(tiny, tmp_path / "runs", **wrong)
    with pytest.raises(AssertionError, match="pictures were read"):
        command(tiny, tmp_path / "runs")


def test_the_commands_make_a_whole_checkpoint_one_after_another(pictures: Path, tmp_path: Path) -> None:
    data, made, runs = tmp_path / "data", tmp_path / "made", tmp_path / "runs"
    for size in (128, 160):
        folder = shutil.copytree(pictures, data / str(size))
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()][:12]
        lines = [{**line, "subgroup": f"kind {number % 3}"} for number, line in enumerate(lines)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            path = folder / line["file_name"]
            Image.open(path).resize((size, size)).save(path)
    brief: dict[str, Any] = {"pictures": data, "steps": 1}
    assert recipes.train_vae(made, runs, batch=2, **brief) > 0
    recipes.settle_decoder(made, runs, batch=1, **brief)
    decoder = load_vae(made).network.decoder.state_dict()
    with pytest.raises(UserError, match="a decoder that was trained further"):
        recipes.train_vae(made, runs, batch=2, **brief)
    assert all(torch.equal(value, decoder[name]) for name, value in load_vae(made).network.decoder.state_dict().items())
    assert set(recipes.train_classifier(made, runs, batch=3, **brief)) == set(recipes.REPORT_LEVELS)
    recipes.train_classifier(made, runs, batch=3, by="subgroup", **brief)
    recipes.train_unet(made, runs, batch=2, muon=False, **brief)
    assert set(recipes.train_clip(made, runs, batch=3, **brief)) == set(recipes.REPORT_LEVELS)
    whole = load_checkpoint(made)
    assert whole.classifier is not None and whole.classifier.config.labels == ("reds", "blues")
    assert load_classifier(made / "classifier_subgroups").config.labels == ("kind 0", "kind 1", "kind 2")
    assert whole.noisy_clip is not None
    before = load_unet(made).conv_in.weight.clone()
    shutil.rmtree(made / "unet")
    recipes.train_unet(made, runs, batch=2, muon=False, export_only=True, **brief)
    assert torch.equal(load_unet(made).conv_in.weight, before)


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (KeyboardInterrupt("stopped at step 3; the state is in runs/vae"), 130, "\nstopped at step 3; the state is in runs/vae\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (UserError("crop = 0", expected="more", mend="crop more"), 2, "crop = 0"),
        (OSError(28, "No space left on device", "runs/vae"), 2, "runs/vae could not be read or written: No space left on device"),
    ],
)  # fmt: skip
def test_how_a_command_ends(
    raised: BaseException,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def recipe(checkpoint: Path) -> None:
        raise raised

    monkeypatch.setattr(commands, "COMMANDS", {"vae": (recipe, "Text."), "unet": (recipe, "Text.")})
    monkeypatch.setattr(sys, "argv", ["train", "vae", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    shown = capsys.readouterr()
    assert ended.value.code == status and words in shown.err and not shown.out and "Traceback" not in shown.err


@pytest.mark.parametrize("place", ["checkpoint", "runs"])
def test_a_file_in_place_of_a_folder_is_found_before_pictures_are_drawn(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "make_emoji_folder", lambda *_, **__: pytest.fail("pictures were drawn"))
    folders = {"checkpoint": tmp_path / "made", "runs": tmp_path / "runs"}
    file = folders[place]
    file.write_text("text")
    for path in (file, file / "inside"):
        with pytest.raises(UserError, match=f"{path.name} is no folder"):
            recipes.train_vae(**{**folders, place: path})
    assert file.read_text() == "text"
