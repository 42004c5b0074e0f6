"""The noisy-latent CLIP: unit vectors, the text encoder it belongs to, its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.models.checkpoint import Checkpoint, load_classifier, load_noisy_clip
from latent_guidance.models.noisy_clip import START_TOLERANCE, NoisyCLIP, NoisyCLIPConfig, new_noisy_clip

CONFIG = NoisyCLIPConfig(
    latent_space="test",
    latent_channels=4,
    scaling_factor=1.0,
    log_snr_range=(-5.0, 5.0),
    channels=(32, 32),
    text_width=24,
    embed_width=16,
    text_encoder="a small one",
)


@pytest.fixture
def clip() -> NoisyCLIP:
    torch.manual_seed(0)
    made = NoisyCLIP(new_noisy_clip(CONFIG).requires_grad_(False))
    made.network.text_start.copy_(torch.randn(24))
    return made


def _tokens(clip: NoisyCLIP, count: int = 2, length: int = 7) -> torch.Tensor:
    tokens = torch.randn(count, length, 24)
    tokens[:, 0] = clip.network.text_start
    return tokens


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (9, 5)])
def test_both_sides_give_unit_vectors_each_sample_by_itself(clip: NoisyCLIP, size: tuple[int, int]) -> None:
    x, log_snr, tokens = torch.randn(3, 4, *size), torch.tensor([-5.0, 0.0, 5.0]), _tokens(clip)
    image, text = clip.image_features(x, log_snr), clip.text_features(tokens)
    assert image.shape == (3, 16) and text.shape == (2, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(clip.image_features(x[1:2], log_snr[1:2]), image[1:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.text_features(tokens[1:]), text[1:], rtol=0, atol=1e-5)
    assert clip.logit_scale.item() == pytest.approx(1 / 0.07)


def test_every_token_and_any_number_of_them_is_read(clip: NoisyCLIP) -> None:
    tokens = _tokens(clip, count=1, length=154)
    text = clip.text_features(tokens)
    changed = tokens.clone()
    changed[:, -1] = 3.0 * torch.randn(24)
    assert text.shape == (1, 16) and not torch.allclose(clip.text_features(changed), text, atol=1e-4)


def test_encodings_of_another_text_encoder_are_refused(clip: NoisyCLIP) -> None:
    clip.check_text(_tokens(clip))
    clip.check_text(_tokens(clip).half())
    start = clip.network.text_start
    for share, fits in ((0.8 * START_TOLERANCE, True), (1.2 * START_TOLERANCE, False), (1.4, False)):
        tokens = _tokens(clip)
        direction = torch.nn.functional.normalize(torch.randn(24), dim=0)
        tokens[1, 0] += share * start.norm() * direction
        if fits:
            clip.check_text(tokens)
            continue
        with pytest.raises(UserError, match=rf"{share:.2f} of its length.*by its text encoder \(a small one\)"):
            clip.check_text(tokens)
    with pytest.raises(UserError, match=r"\(2, 7, 768\).*tokens of 24 numbers"):
        clip.check_text(torch.zeros(2, 7, 768))
    with pytest.raises(UserError, match="start token is nan"):
        clip.check_text(torch.full((1, 7, 24), float("nan")))
    start.zero_()  # a text encoder without a start of its own
    clip.check_text(torch.randn(1, 7, 24))


def test_gradient_with_frozen_parameters_is_the_finite_difference(clip: NoisyCLIP) -> None:
    network = clip.network.double()
    x, log_snr = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True), torch.tensor([-1.0, 2.0])
    text = torch.randn(16, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(network.image_embedding(x, log_snr), text, dim=1).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    direction, h = torch.randn_like(gradient), 1e-5
    with torch.no_grad():
        measured = float((value(x + h * direction) - value(x - h * direction)) / (2 * h))
    assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5) and abs(measured) > 1e-5


def test_config_round_trip_and_faults() -> None:
    assert NoisyCLIPConfig.from_json(CONFIG.to_json()) == CONFIG
    for field, value in (
        ("text_width", 0),
        ("embed_width", 2.5),
        ("text_encoder", 3),
        ("channels", (33, 64)),
        ("heads", 5),
    ):
        with pytest.raises(UserError, match=rf"noisy-latent CLIP's config.*{field}"):
            replace(CONFIG, **{field: value})
    with pytest.raises(UserError, match="that is a list"):
        NoisyCLIPConfig.from_json([])


def test_foreign_latents_are_named(clip: NoisyCLIP) -> None:
    with pytest.raises(UserError, match=r"noisy-latent CLIP of 'test' latents.*\(1, 16, 8, 8\)"):
        clip.image_features(torch.zeros(1, 16, 8, 8), torch.zeros(1))


def test_it_is_loaded_from_the_checkpoint_its_folder_and_the_file_alone(tiny: Checkpoint, tiny_folder: Path) -> None:
    assert tiny.noisy_clip is not None
    encoded = tiny.text_encoder.encode("a red apple")[0]
    tiny.noisy_clip.check_text(encoded)
    wanted = tiny.noisy_clip.text_features(encoded)
    for place in (tiny_folder, tiny_folder / "clip", tiny_folder / "clip" / "model.safetensors"):
        found = load_noisy_clip(place)
        assert torch.equal(found.text_features(encoded), wanted)
        assert found.fingerprint == tiny.noisy_clip.fingerprint and not found.network.training


def test_files_of_the_wrong_kind_are_refused(tiny_folder: Path, tiny_copy: Callable[[], Path]) -> None:
    with pytest.raises(UserError, match="noisy-latent CLIP's config has the fields"):
        load_noisy_clip(tiny_folder / "classifier" / "model.safetensors")
    with pytest.raises(UserError, match="classifier's config has the fields"):
        load_classifier(tiny_folder / "clip" / "model.safetensors")
    config = tiny_copy() / "clip" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "text_width": 32}))
    with pytest.raises(UserError, match="does not hold this noisy-latent CLIP"):
        load_noisy_clip(config.parent)
