"""The committed emoji checkpoint: small enough, whole, and it steers."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.guidance import CFG, ClassifierGuidance, Guider, NoisyCLIPGuidance
from latent_guidance.models.checkpoint import Checkpoint, emoji_folder, load_checkpoint
from latent_guidance.models.unet import network_denoiser
from latent_guidance.samplers import sample_euler
from latent_guidance.step_grids import step_grid
from latent_guidance.training.emoji import LABELS

FOLDER = emoji_folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="models/emoji is not beside the library")


@pytest.fixture(scope="module")
def emoji() -> Checkpoint:
    assert FOLDER is not None
    return load_checkpoint(FOLDER)


def test_at_most_48_megabytes_of_safetensors() -> None:
    assert FOLDER is not None
    weights = list(FOLDER.rglob("*.safetensors"))
    assert len(weights) == 6
    assert sum(path.stat().st_size for path in weights) <= 48e6
    pickled = [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert not pickled


def test_classifier_belongs_to_the_latents(emoji: Checkpoint) -> None:
    assert emoji.classifier is not None
    config = emoji.classifier.config
    assert config.labels == LABELS
    assert config.latent_space == emoji.latent_space == "emoji"
    assert config.latent_channels == emoji.vae.latent_channels == 4
    assert config.scaling_factor == pytest.approx(emoji.vae.scaling_factor)
    schedule = network_denoiser(emoji.unet, emoji.scheduler_config).schedule
    low, high = config.log_snr_range
    assert low < -2 * torch.tensor(schedule.sigma_max).log() and high > -2 * torch.tensor(schedule.sigma_min).log()


def test_clip_belongs_to_the_latents_and_to_the_text_encoder(emoji: Checkpoint) -> None:
    """It reads its own text encoder's prompts, and knows which of nine groups clean latents of a flag and of a face are of."""
    assert emoji.noisy_clip is not None
    config = emoji.noisy_clip.config
    assert config.latent_space == emoji.latent_space and config.latent_channels == emoji.vae.latent_channels
    assert config.scaling_factor == pytest.approx(emoji.vae.scaling_factor)
    prompts = torch.cat([emoji.text_encoder.encode(label.lower())[0] for label in LABELS])
    emoji.noisy_clip.check_text(prompts)
    x = torch.cat(
        [_sampled(emoji, (CFG(guidance_scale=4.0),), prompt, batch=4) for prompt in ("grinning face", "flag: Germany")]
    )
    image = emoji.noisy_clip.image_features(x, torch.full((8,), 5.0))
    judged = (image @ emoji.noisy_clip.text_features(prompts).T).argmax(1).tolist()
    wanted = [LABELS.index("Smileys & Emotion")] * 4 + [LABELS.index("Flags")] * 4
    assert sum(found == right for found, right in zip(judged, wanted, strict=True)) >= 6


def test_clip_steers_the_empty_prompt(emoji: Checkpoint) -> None:
    """Judged by the classifier, which the CLIP has no part in."""
    assert emoji.noisy_clip is not None and emoji.classifier is not None
    target = emoji.text_encoder.encode("flag: Germany")[0]
    rule = NoisyCLIPGuidance(noisy_clip=emoji.noisy_clip, target=target, guidance_scale=8.0)
    flags = []
    for rules in ((), (rule,)):
        x = _sampled(emoji, rules, "", batch=6, steps=14)
        judged = emoji.classifier.logits(x, torch.full((6,), 5.0)).argmax(1)
        flags.append(int((judged == LABELS.index("Flags")).sum()))
    assert flags[1] >= 5 and flags[0] <= 3


def _sampled(emoji: Checkpoint, rules: tuple[object, ...], prompt: str, *, batch: int, steps: int = 20) -> torch.Tensor:
    denoiser = network_denoiser(emoji.unet, emoji.scheduler_config)
    sigmas = step_grid(denoiser.schedule, "normal", steps).float()
    cond, _ = emoji.text_encoder.encode(prompt)
    null, _ = emoji.text_encoder.encode("")
    guider = Guider(denoiser, rules, uncond=null.expand(batch, -1, -1))
    x = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    with torch.no_grad():
        return sample_euler(guider, x, sigmas, cond.expand(batch, -1, -1))


@pytest.mark.parametrize(("prompt", "label"), [("grinning face", "Smileys & Emotion"), ("flag: Germany", "Flags")])
def test_a_face_is_a_face_and_a_flag_a_flag(emoji: Checkpoint, prompt: str, label: str) -> None:
    """Judged by the bundled classifier, which the prompt's pictures have not seen; the other prompt's fail."""
    assert emoji.classifier is not None
    x = _sampled(emoji, (CFG(guidance_scale=4.0),), prompt, batch=6)
    judged = emoji.classifier.logits(x, torch.full((6,), 5.0)).argmax(1)
    assert int((judged == LABELS.index(label)).sum()) >= 5
    shoulder = emoji.vae.decode(x / emoji.vae.scaling_factor)[:, :, 28:36, 7:15].mean()
    assert bool(shoulder > 0.7) == (label != "Flags"), "white beside a round face, coloured on a flag"


@pytest.mark.parametrize("label", ["Flags", "Smileys & Emotion"])
def test_classifier_steers_the_empty_prompt(emoji: Checkpoint, label: str) -> None:
    """Judged by the guide itself at a noise level near zero: steered pictures are of the class, unguided ones are not."""
    assert emoji.classifier is not None
    rule = ClassifierGuidance(classifier=emoji.classifier, label=label)
    share = []
    for rules in ((), (rule,)):
        x = _sampled(emoji, rules, "", batch=12)
        clear = torch.full((12,), 5.0)
        probability = emoji.classifier.logits(x, clear).softmax(1)[:, LABELS.index(label)]
        share.append(float((probability > 0.5).float().mean()))
    assert share[1] >= 0.8 and share[1] > share[0] + 0.3
