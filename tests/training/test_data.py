"""Folders of pictures and their latents: read whole, or refused with the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.models.files import read_safetensors, write_safetensors
from latent_guidance.models.vae import VAE
from latent_guidance.training import recipes
from latent_guidance.training.data import load_image_folder, random_crops, to_signed
from latent_guidance.training.latents import encode_folder


def test_image_folder_is_read(pictures: Path) -> None:
    data = load_image_folder(pictures)
    assert data.images.shape == (24, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.labels == ("reds", "blues") and data.classes.tolist() == [0, 1] * 12
    assert data.texts[3] == "blue square 3"
    signed = to_signed(data.images)
    assert signed.min() >= -1 and signed.max() <= 1
    red = signed[0, :, 8:24, 8:24].mean((1, 2))
    assert red[0] > 0.3 > red[2]


def test_incomplete_folders_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metadata\.jsonl was not found"):
        load_image_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a/b.png", "text": "x"}))
    with pytest.raises(UserError, match=r"1 of 1 pictures.*a/b\.png"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{'file_name': 'a.png'}",
        "[1]",
        '{"file_name": "reds/0.png"}',
        '{"file_name": 3, "text": "x"}',
        '{"file_name": "../0.png", "text": "x"}',
    ],
)
def test_a_line_that_is_no_entry_is_named(pictures: Path, tmp_path: Path, line: str) -> None:
    folder = shutil.copytree(pictures, tmp_path / "32")
    with (folder / "metadata.jsonl").open("a") as metadata:
        metadata.write(line + "\n")
    with pytest.raises(UserError, match=r"line 25 of .*metadata\.jsonl"):
        load_image_folder(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keywords", None),
        ("keywords", "cat"),
        ("keywords", [1]),
        ("other_texts", 5),
        ("subgroup", ["x"]),
        ("file_name", "x" * 5000),
    ],
)
def test_an_entry_whose_words_are_no_texts_is_named(pictures: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = shutil.copytree(pictures, tmp_path / "32")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), key: value})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 5 of .*metadata\.jsonl"):
        load_image_folder(folder)


def test_marks_tell_pictures_and_words_from_others_and_their_order(pictures: Path) -> None:
    data = load_image_folder(pictures)
    one = data.images.clone()
    one[7, 0, 0, 0] += 1
    for images in (one, data.images.flip(0)):
        assert replace(data, images=images).mark != data.mark
    for other in ({"texts": data.texts[::-1]}, {"classes": 1 - data.classes}, {"keywords": (("x",),) * 24}):
        changed = replace(data, **other)
        assert changed.mark == data.mark and changed.words_mark != data.words_mark


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_damaged_picture_is_named(pictures: Path, tmp_path: Path, content: bytes | None) -> None:
    folder = shutil.copytree(pictures, tmp_path / "32")
    file = folder / "blues" / "3.png"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(UserError, match=r"blues/3\.png cannot be read as a picture"):
        load_image_folder(folder)


def test_two_sizes_of_other_pictures_are_refused(vae: VAE, pictures: Path, tmp_path: Path) -> None:
    """Their captions and classes are taken from one and their latents from both."""
    for size in ("128", "160"):
        shutil.copytree(pictures, tmp_path / size)
    assert len(recipes._latent_sets(vae, tmp_path, tmp_path / "runs")) == 3
    metadata = tmp_path / "160" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    for wrong in (lines[:-1], [lines[1], lines[0], *lines[2:]]):
        metadata.write_text("\n".join(wrong) + "\n")
        with pytest.raises(UserError, match="hold other pictures, or the same in another order"):
            recipes._latent_sets(vae, tmp_path, tmp_path / f"runs of {len(wrong)}")


def test_crops_are_windows() -> None:
    images = torch.arange(2 * 36).reshape(2, 1, 6, 6)
    crops = random_crops(images, size=4, generator=torch.Generator().manual_seed(0))
    windows = images.unfold(2, 4, 1).unfold(3, 4, 1).reshape(2, 9, 4, 4)
    for crop, of_one in zip(crops[:, 0], windows, strict=True):
        assert any(torch.equal(crop, window) for window in of_one)


def test_latents_are_cached_for_this_vae_only(vae: VAE, pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "latents.safetensors"
    first = encode_folder(vae, pictures, cache, progress=False)
    again = encode_folder(vae, pictures, cache, progress=False)
    assert torch.equal(first.mean, again.mean) and first.mean.shape == (24, 4, 4, 4)
    with pytest.raises(UserError, match="another VAE or of other pictures"):
        encode_folder(vae, pictures, cache, flip=True, progress=False)
    mirrored = encode_folder(vae, pictures, flip=True, progress=False)
    assert not torch.allclose(mirrored.mean, first.mean)
    mirror_images = to_signed(load_image_folder(pictures).images.flip(3))
    torch.testing.assert_close(mirrored.mean, vae.encode(mirror_images, sample=False) * vae.scaling_factor)
    assert first.mark == again.mark != mirrored.mark
    drawn = first.draw(torch.arange(24), generator=torch.Generator().manual_seed(0))
    spread = ((drawn - first.mean) / first.std).std()
    assert float(spread) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("spoil", ["cut", "few", "nan"])
def test_damaged_latents_are_refused(vae: VAE, pictures: Path, tmp_path: Path, spoil: str) -> None:
    cache = tmp_path / "latents.safetensors"
    encode_folder(vae, pictures, cache, progress=False)
    tensors, metadata = read_safetensors(cache)
    if spoil == "nan":
        tensors["std"][3, 0, 0, 0] = torch.nan
    tensors = {"few": {**tensors, "mean": tensors["mean"][:-1]}, "cut": {"mean": tensors["mean"]}}.get(spoil, tensors)
    write_safetensors(cache, tensors, dtype=torch.float32, metadata=metadata)
    with pytest.raises(UserError, match=r"does not hold whole latents.*delete the file"):
        encode_folder(vae, pictures, cache, progress=False)
