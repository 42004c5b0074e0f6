"""Noisy-latent CLIP guidance: its equation, texts to go to and away from, gates, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import GuidanceRun, NoisyCLIPGuidance
from latent_guidance.guidance.gradient import sample_norm
from latent_guidance.guidance.latents import Latents
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import SmallCLIP, drawn, latents, prompt

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
SIGMA = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
SMALL = dict(height=3, width=2)


@pytest.fixture
def clip() -> SmallCLIP:
    return SmallCLIP()


def rule_of(clip: SmallCLIP, **knobs: object) -> NoisyCLIPGuidance:
    return NoisyCLIPGuidance(**{"noisy_clip": clip, "target": prompt(), "guidance_scale": 5.0} | knobs)  # type: ignore[arg-type]


def shift_of(rule: NoisyCLIPGuidance, process: Process = VE_SCALED, x: Tensor | None = None) -> Tensor:
    """What the rule adds to the denoised estimate."""
    x = latents(**SMALL) if x is None else x
    denoised = torch.tanh(x).nan_to_num()
    return GuidanceRun([rule], process)(x, SIGMA, lambda names: {"cond": denoised}) - denoised


def logits_of(clip: SmallCLIP, process: Process, x: Tensor, tokens: Tensor) -> Tensor:
    """The CLIP's own logit of each x (B,), written out: scale times the cosine."""
    alpha = process.alpha(SIGMA)
    unit = x / (alpha**2 + SIGMA**2).sqrt().reshape(-1, 1, 1, 1)
    image = clip.image.logits(unit, (alpha**2 / SIGMA**2).log())
    text = torch.tanh(tokens @ clip.text).mean(1)
    return 20.0 * torch.cosine_similarity(image, text, dim=1)


def difference_quotient(function: object, x: Tensor) -> Tensor:
    """grad_x of ``function`` (x -> (B,)) by central differences."""
    gradient, h = torch.zeros_like(x), 1e-5
    for position in range(x[0].numel()):
        bump = torch.zeros_like(x).reshape(len(x), -1)
        bump[:, position] = h
        bump = bump.reshape(x.shape)
        gradient.reshape(len(x), -1)[:, position] = (function(x + bump) - function(x - bump)) / (2 * h)  # type: ignore[operator]
    return gradient


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_what_is_added_is_the_gradient_of_the_scaled_similarity(process: Process, clip: SmallCLIP) -> None:
    x, tokens = latents(**SMALL), prompt()[0][0]
    score = difference_quotient(lambda x: logits_of(clip, process, x, tokens), x)
    expected = 5.0 * (SIGMA**2 / process.alpha(SIGMA)).reshape(-1, 1, 1, 1) * score
    added = shift_of(rule_of(clip), process)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(added, expected / 20, rtol=1e-6, atol=1e-8), "the learned scale belongs to it"


def test_away_at_one_is_the_log_odds_of_the_two_texts(clip: SmallCLIP) -> None:
    """log p(target) / p(away) of a classifier that chooses between the two."""
    x, (here, there) = latents(**SMALL), (prompt()[0][0], prompt(seed=9)[0][0])

    def log_odds(x: Tensor) -> Tensor:
        log_p = torch.stack([logits_of(clip, VE_SCALED, x, tokens) for tokens in (here, there)], dim=1).log_softmax(1)
        return log_p[:, 0] - log_p[:, 1]

    expected = 5.0 * (SIGMA**2).reshape(-1, 1, 1, 1) * difference_quotient(log_odds, x)
    added = shift_of(rule_of(clip, away=prompt(seed=9)))
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-8)
    target, away = shift_of(rule_of(clip)), shift_of(rule_of(clip, target=prompt(seed=9)))
    torch.testing.assert_close(shift_of(rule_of(clip, away=prompt(seed=9), away_scale=0.5)), target - 0.5 * away)
    torch.testing.assert_close(shift_of(rule_of(clip, away=prompt(seed=9), away_scale=0.0)), target)
    torch.testing.assert_close(shift_of(rule_of(clip, guidance_scale=-5.0)), -target)


def test_several_prompts_count_equally_and_a_tensor_of_tokens_will_do(clip: SmallCLIP) -> None:
    first, second = prompt(), prompt(seed=4)
    both = shift_of(rule_of(clip, target=first + second))
    torch.testing.assert_close(both, (shift_of(rule_of(clip)) + shift_of(rule_of(clip, target=second))) / 2)
    tokens = torch.cat([first[0][0], second[0][0]])
    torch.testing.assert_close(both, shift_of(rule_of(clip, target=tokens)))


def test_relative_scaling_holds_each_sample_at_the_fraction(clip: SmallCLIP) -> None:
    x = latents(**SMALL)
    ratio = sample_norm(shift_of(rule_of(clip, guidance_scale=0.25, scaling="relative"))) / sample_norm(
        x - torch.tanh(x)
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25))
    raw = sample_norm(shift_of(rule_of(clip))) / sample_norm(x - torch.tanh(x))
    assert raw.std() > 1e-3, "raw scaling does not hold it"


def test_it_is_gated_as_all_gradients_are(clip: SmallCLIP) -> None:
    windowed = shift_of(rule_of(clip, sigma_lo=0.3, sigma_hi=0.6))
    assert [row.abs().max() > 0 for row in windowed] == [False, True, False]
    narrow = clip.with_config(log_snr_range=(0.5, 1.5))  # sigma = 0.6 is at 1.02
    assert [row.abs().max() > 0 for row in shift_of(rule_of(narrow))] == [False, True, False]
    assert [len(call[0]) for call in narrow.calls] == [1], "only the sample in range is evaluated"
    free = rule_of(clip, guidance_scale=1.0).gradient(VE_SCALED, latents(), SIGMA, None)
    bound = float(sample_norm(free).median())
    clipped = rule_of(clip, guidance_scale=1.0, gradient_clip=bound).gradient(VE_SCALED, latents(), SIGMA, None)
    torch.testing.assert_close(sample_norm(clipped), sample_norm(free).clamp(max=bound))
    mask = torch.zeros(6, 5)
    mask[:, 3:] = 1.0
    masked = rule_of(clip, guidance_scale=1.0, mask=mask).gradient(VE_SCALED, latents(), SIGMA, None)
    assert not masked[..., :3].any() and torch.allclose(masked[..., 3:], free[..., 3:])


def test_a_nan_leaves_its_sample_unguided_with_a_warning(clip: SmallCLIP, caplog: pytest.LogCaptureFixture) -> None:
    x = latents(**SMALL)
    x[1, 0, 0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, logger="latent_guidance"):
        gradient = rule_of(clip).gradient(VE_SCALED, x, SIGMA, 3)
    assert not gradient[1].any() and gradient[0].any() and gradient[2].any()
    assert "Noisy-Latent CLIP Guidance" in caplog.text and "step 4" in caplog.text


def test_inference_mode_everywhere_changes_nothing(clip: SmallCLIP) -> None:
    outside = shift_of(rule_of(clip))
    with torch.inference_mode():
        clip.network.to(torch.float32).to(torch.float64)  # as a host that unloads and reloads does
        inside = shift_of(rule_of(clip, target=[[prompt()[0][0].clone(), {}]]), x=latents(**SMALL))
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-7)  # the weights went through float32


def test_wrong_pairings_are_refused_with_words(clip: SmallCLIP) -> None:
    rule = rule_of(clip)
    rule.check_latents(Latents("any", 4, 0.5))
    for other in (Latents("SD3", 16, 0.5), Latents("SD15", 4, 0.18215)):
        with pytest.raises(UserError, match=rf"noisy-latent CLIP for the latents of 'test'.*'{other.name}'"):
            rule.check_latents(other)
    with pytest.raises(UserError, match=r"16, 6, 5.*noisy-latent CLIP"):
        rule.gradient(VE_SCALED, latents(channels=16), SIGMA, None)
    with pytest.raises(UserError, match="another width"):
        rule_of(clip, target=[[drawn(1, 5, 7), {}]])
    with pytest.raises(UserError, match="another width"):
        rule_of(clip, away=[[drawn(1, 5, 7), {}]])
    for nothing in ([], [["a prompt", {}]], "a prompt", [[drawn(2, 5, 6), {}]]):
        with pytest.raises(UserError, match="target of Noisy-Latent CLIP Guidance"):
            rule_of(clip, target=nothing)
    with pytest.raises(UserError, match="noisy_clip of Noisy-Latent CLIP Guidance is missing"):
        rule_of(clip, noisy_clip=None)
