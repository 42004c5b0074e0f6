"""The noisy-latent CLIP's recipe: its loss, what counts as right, and that it learns to find a text for latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from latent_guidance.errors import UserError
from latent_guidance.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig, new_noisy_clip
from latent_guidance.models.text_encoder import TextEncoder, new_text_encoder, text_config
from latent_guidance.training.classifier import drawn_crops, held_out
from latent_guidance.training.clip import (
    GROUP,
    CLIPRecipe,
    contrastive_loss,
    encode_captions,
    fitting,
    retrieval_by_noise,
    train_clip,
)
from latent_guidance.training.latents import LatentSet
from latent_guidance.training.loop import LoopSettings

CONFIG = NoisyCLIPConfig(
    latent_space="test",
    latent_channels=4,
    scaling_factor=1.0,
    log_snr_range=(-6.0, 6.0),
    channels=(32, 32),
    text_width=64,
    embed_width=16,
)
WORDS = ("red", "blue", "green", "apple")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    made = new_text_encoder(text_config(width=64, layers=1))
    made.network.token_embedding.weight.data *= 20  # so that words differ, as a trained tower's do
    made.network.requires_grad_(False).eval()
    return made


def _synthetic(count: int = 160) -> LatentSet:
    """Four words, each of which lifts one channel of the latents."""
    classes = torch.arange(count) % 4
    mean = torch.randn(count, 4, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.5
    mean[torch.arange(count), classes] += 2.0
    texts = tuple(WORDS[int(number)] for number in classes)
    return LatentSet(mean, torch.full_like(mean, 0.01), texts, classes, ("Reds", "Blues", "Greens", "Fruit"))


def test_the_loss_is_clips_and_shares_what_fits_several() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = (functional.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2))
    scale, own = torch.tensor(7.0), torch.eye(5, dtype=torch.bool)
    logits = 7.0 * image @ text.T
    by_hand = (
        functional.cross_entropy(logits, torch.arange(5)) + functional.cross_entropy(logits.T, torch.arange(5))
    ) / 2
    torch.testing.assert_close(contrastive_loss(image, text, scale, own), by_hand)
    fits = own.clone()
    fits[0, 1] = True  # picture 0 goes with caption 1 too
    p, q = logits.log_softmax(1), logits.log_softmax(0)
    rows = [p[0, :2].mean(), *(p[i, i] for i in range(1, 5))]
    columns = [q[0, 0], q[:2, 1].mean(), *(q[i, i] for i in range(2, 5))]
    expected = -(sum(rows) + sum(columns)) / 10
    torch.testing.assert_close(contrastive_loss(image, text, scale, fits), expected)
    assert not torch.allclose(by_hand, torch.as_tensor(expected))


def test_a_groups_name_fits_every_picture_of_the_group_and_a_text_every_picture_that_has_it() -> None:
    rows, kinds = torch.tensor([3, 9, 3, 5]), torch.tensor([0, GROUP, 0, 0])
    fits = fitting(rows, kinds, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 1]))
    assert fits.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_captions_are_encoded_once_and_the_start_is_the_encoders(encoder: TextEncoder) -> None:
    latents = _synthetic(8)
    captions = encode_captions(encoder, latents, progress=False)
    assert captions.rows.shape == (6, 8, 8)
    assert len(captions.tokens) == 4 + 4 + 4 + 1  # the words, with their group, the groups, and nothing
    tokens = captions.tokens[captions.rows[0, 3, 5]].float()
    torch.testing.assert_close(tokens, encoder.encode("blue")[0][0], rtol=0, atol=5e-3)
    torch.testing.assert_close(captions.start, encoder.encode("anything")[0][0, 0], rtol=0, atol=5e-3)


def test_crops_come_in_equal_shares_from_the_sets_and_match_their_pictures() -> None:
    latents = _synthetic(12)
    other = replace(latents, mean=latents.mean + 100)
    chosen = torch.tensor([3, 7, 1, 0, 11])
    crops = drawn_crops([latents, other], chosen, size=6, generator=torch.Generator().manual_seed(0))
    assert crops.shape == (5, 4, 6, 6)
    assert [bool((crop > 50).all()) for crop in crops] == [False, False, True, True, True]
    lifted = [int(crop.mean((1, 2)).argmax()) for crop in crops]
    assert lifted == (chosen % 4).tolist()
    for first, theirs in ((0.25, 1), (0.75, 4), (1.0, 5)):
        some = drawn_crops([latents, other, other], chosen, size=6, generator=torch.Generator(), first=first)
        assert [bool((crop > 50).all()) for crop in some] == [place >= theirs for place in range(5)]


def test_it_learns_to_find_the_text_and_loses_it_in_noise(encoder: TextEncoder, tmp_path: Path) -> None:
    latents = _synthetic()
    settings = LoopSettings(steps=150, learning_rate=3e-3, warmup=5, ema_decay=0.9, bf16=False)
    recipe = CLIPRecipe(batch=32, crop=8, group_only=0.3)
    clip = train_clip(
        [latents], encoder, tmp_path / "run", config=CONFIG, settings=settings, recipe=recipe, progress=False
    )
    kept = held_out(len(latents))
    found = retrieval_by_noise(clip, encoder, latents, log_snrs=(-14.0, 5.0), chosen=kept)
    assert found[5.0]["group"] >= 0.75 and found[-14.0]["group"] < 0.6
    assert found[5.0].keys() == {"caption", "caption among five", "group"}
    image = clip.image_features(latents.mean[kept], torch.full((int(kept.sum()),), 5.0))
    words = torch.cat([clip.text_features(encoder.encode(word)[0]) for word in WORDS])
    assert float(((image @ words.T).argmax(1) == latents.classes[kept]).float().mean()) >= 0.75
    clip.check_text(encoder.encode("anything")[0])

    unknown = latents.mean.clone()
    unknown[kept] = torch.nan  # a single one of them would spoil the loss
    short = replace(settings, steps=10)
    spoilt = [replace(latents, mean=unknown)]
    train_clip(spoilt, encoder, tmp_path / "spoilt", config=CONFIG, settings=short, recipe=recipe, progress=False)

    brief = replace(settings, steps=1, learning_rate=1e-12)
    again = train_clip(
        [latents],
        encoder,
        tmp_path / "next",
        config=CONFIG,
        settings=brief,
        recipe=recipe,
        start_from=clip,
        progress=False,
    )
    torch.testing.assert_close(again.network.state_dict(), clip.network.state_dict(), rtol=1e-4, atol=1e-5)
    another = new_text_encoder(text_config(width=64, layers=1))
    with pytest.raises(UserError, match="trained on other data"):
        train_clip([latents], another, tmp_path / "next", config=CONFIG, settings=brief, recipe=recipe, progress=False)
    other = NoisyCLIP(new_noisy_clip(replace(CONFIG, embed_width=32)))
    with pytest.raises(UserError, match="another shape to start from"):
        train_clip(
            [latents],
            encoder,
            tmp_path / "other",
            config=CONFIG,
            settings=brief,
            recipe=recipe,
            start_from=other,
            progress=False,
        )
