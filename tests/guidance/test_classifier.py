"""Classifier guidance: its forms, targets, scalings and gates, each against an independent computation."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import ClassifierGuidance, ClassifierMeanShift, GuidanceRun
from latent_guidance.guidance.gradient import sample_norm
from latent_guidance.guidance.latents import Latents
from latent_guidance.guidance.noisy_classifier import entropy_scale
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand

from .conftest import SmallClassifier, latents

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
SIGMA = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
DENOISED = latents(seed=1)


def shift_of(
    rule: ClassifierGuidance, process: Process = VE_SCALED, x: Tensor | None = None, sigma: Tensor = SIGMA
) -> Tensor:
    """What the rule adds to the denoised estimate."""
    x = latents() if x is None else x
    denoised = DENOISED[: x.shape[0]]
    return GuidanceRun([rule], process)(x, sigma, lambda names: {"cond": denoised}) - denoised


def finite_difference_score(
    classifier: SmallClassifier, process: Process, x: Tensor, sigma: Tensor, label: int
) -> Tensor:
    """grad_x log p(label | x) by central differences, x in the process's own coordinates."""

    def log_p(x: Tensor) -> Tensor:
        alpha = process.alpha(sigma)
        scale = (alpha**2 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        return classifier.logits(x / scale, (alpha**2 / sigma**2).log()).log_softmax(1)[:, label]

    gradient, h = torch.zeros_like(x), 1e-5
    for position in range(x[0].numel()):
        bump = torch.zeros_like(x).reshape(x.shape[0], -1)
        bump[:, position] = h
        bump = bump.reshape(x.shape)
        gradient.reshape(x.shape[0], -1)[:, position] = (log_p(x + bump) - log_p(x - bump)) / (2 * h)
    return gradient


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_what_is_added_is_scale_times_sigma_squared_over_alpha_times_the_score(
    process: Process, classifier: SmallClassifier
) -> None:
    x = latents(height=3, width=2)
    score = finite_difference_score(classifier, process, x, SIGMA, label=2)
    alpha = process.alpha(SIGMA)
    expected = 5.0 * (SIGMA**2 / alpha).reshape(-1, 1, 1, 1) * score
    denoised = latents(height=3, width=2, seed=1)
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="bird", guidance_scale=5.0)
    added = GuidanceRun([rule], process)(x, SIGMA, lambda names: {"cond": denoised}) - denoised
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-8)
    naive = 5.0 * (SIGMA**2).reshape(-1, 1, 1, 1) * score
    agrees = torch.allclose(added, naive, rtol=1e-6, atol=1e-8)
    assert agrees == (process is VE_SCALED), "sigma^2 without alpha must fail on rectified flow"


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_score_form_and_eps_form_agree(process: Process, classifier: SmallClassifier) -> None:
    forms = [
        shift_of(
            ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", guidance_scale=3.0, form=form),
            process,
        )
        for form in ("score", "eps")
    ]
    torch.testing.assert_close(*forms, rtol=0, atol=1e-10)
    assert forms[0].abs().max() > 1e-2
    assert not torch.allclose(forms[0], 1.001 * forms[1], rtol=0, atol=1e-10), "the tolerance has teeth"


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("form", ["score", "eps"])
@pytest.mark.parametrize("scaling", ["raw", "relative", "entropy"])
def test_finite_and_silent_at_both_ends_of_the_noise_range(
    process: Process, form: str, scaling: str, classifier: SmallClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    wide = classifier.with_config(log_snr_range=(-1e9, 1e9))
    rule = ClassifierGuidance(classifier=wide, label="cat", form=form, scaling=scaling)
    top = 1.0 if process is RECTIFIED_FLOW else 1e4
    for sigma in (top, 1e-4):
        levels = torch.full((3,), sigma, dtype=torch.float64)
        assert torch.isfinite(shift_of(rule, process, sigma=levels)).all()
    narrow = ClassifierGuidance(classifier=classifier, label="cat", form=form, scaling=scaling)
    levels = torch.full((3,), top, dtype=torch.float64)
    if process is RECTIFIED_FLOW:
        assert shift_of(narrow, process, sigma=levels).abs().max() == 0, "at alpha = 0 the term is zero by definition"
    assert not caplog.records


def test_outside_its_trained_noise_range_the_classifier_is_not_called(classifier: SmallClassifier) -> None:
    narrow = classifier.with_config(log_snr_range=(-1.0, 1.0))
    rule = ClassifierGuidance(scaling="raw", classifier=narrow, label="cat")
    shift = shift_of(rule, sigma=torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))
    assert [row.abs().max() > 0 for row in shift] == [False, True, False]
    assert [call[0].shape[0] for call in narrow.calls] == [1], "only the sample in range is evaluated"
    shift_of(rule, sigma=torch.full((3,), 50.0, dtype=torch.float64))
    assert len(narrow.calls) == 1


def test_the_classifier_sees_unit_variance_and_log_snr(classifier: SmallClassifier) -> None:
    for process in PROCESSES:
        x0, noise = latents(200, height=8, width=8), latents(200, height=8, width=8, seed=5)
        sigma = torch.full((200,), 0.7, dtype=torch.float64)
        rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")
        rule.gradient(process, process.noised(x0, noise, sigma), sigma, None)
        seen, log_snr = classifier.calls[-1]
        assert seen.std().item() == pytest.approx(1.0, abs=0.02)
        assert log_snr[0].item() == pytest.approx(2 * math.log(process.alpha(sigma)[0].item() / 0.7))


def test_relative_scaling_holds_each_sample_at_the_fraction(classifier: SmallClassifier) -> None:
    x, denoised = latents(), DENOISED
    rule = ClassifierGuidance(classifier=classifier, label="cat", guidance_scale=0.25, scaling="relative")
    ratio = sample_norm(shift_of(rule)) / sample_norm(x - denoised)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25))
    raw = shift_of(ClassifierGuidance(scaling="raw", classifier=classifier, label="cat"))
    assert (sample_norm(raw) / sample_norm(x - denoised)).std() > 1e-3, "raw scaling does not hold it"
    back = shift_of(ClassifierGuidance(classifier=classifier, label="cat", guidance_scale=-0.25, scaling="relative"))
    torch.testing.assert_close(back, -shift_of(rule))


def test_entropy_scaling_multiplies_by_log_k_over_h(classifier: SmallClassifier) -> None:
    raw, entropy = (
        shift_of(ClassifierGuidance(classifier=classifier, label="cat", scaling=scaling))
        for scaling in ("raw", "entropy")
    )
    u = latents() * expand(VE_SCALED.unit_scale(SIGMA), latents())
    p = classifier.logits(u, VE_SCALED.log_snr(SIGMA)).softmax(1)
    factor = (math.log(4) / -(p * p.log()).sum(1)).clamp(max=100)
    torch.testing.assert_close(entropy, raw * expand(factor, raw))
    assert factor.min() >= 1 and factor.max() > 1.01
    sure = torch.tensor([[50.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(entropy_scale(sure), torch.tensor([100.0, 1.0], dtype=torch.float64))


def test_entropy_scaling_needs_more_than_one_class() -> None:
    assert entropy_scale(torch.tensor([[3.0]])).tolist() == [1.0]
    scorer = SmallClassifier().with_config(head="regression", labels=("beauty",))
    with pytest.raises(UserError, match=r"scaling 'entropy'.*regression head"):
        ClassifierGuidance(classifier=scorer, label="up", scaling="entropy")


def test_a_mask_limits_where_the_push_goes(classifier: SmallClassifier) -> None:
    mask = torch.zeros(60, 50)
    mask[:, 30:] = 1.0
    shift = shift_of(ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", mask=mask))
    free = shift_of(ClassifierGuidance(scaling="raw", classifier=classifier, label="cat"))
    assert shift[..., :2].abs().max() < 1e-6 * free.abs().max() and torch.allclose(shift[..., 4], free[..., 4])
    with pytest.raises(UserError, match="2 masks for a batch of 3"):
        shift_of(ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", mask=torch.ones(2, 6, 5)))


def test_the_window_and_every_kth_step_gate_the_term(classifier: SmallClassifier) -> None:
    windowed = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", sigma_lo=0.3, sigma_hi=0.6)
    assert [row.abs().max() > 0 for row in shift_of(windowed)] == [False, True, False]
    sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    run = GuidanceRun(
        [ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", every_k=3)], VE_SCALED, sigmas=sigmas
    )
    acts = []
    for sigma in sigmas[:-1]:
        out = run(latents(), sigma.expand(3), lambda names: {"cond": DENOISED})
        acts.append(not torch.equal(out, DENOISED))
    assert acts == [True, False, False, True]


def test_clipping_bounds_the_gradient_in_unit_variance_latents(classifier: SmallClassifier) -> None:
    free = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", guidance_scale=1.0)
    norm = sample_norm(free.gradient(VE_SCALED, latents(), SIGMA, None))
    bound = norm.median().item()
    clipped = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", guidance_scale=1.0, clip=bound)
    after = sample_norm(clipped.gradient(VE_SCALED, latents(), SIGMA, None))
    torch.testing.assert_close(after, norm.clamp(max=bound))


def test_a_nan_leaves_its_sample_unguided_for_the_step_with_a_warning(
    classifier: SmallClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    x = latents()
    x[1, 0, 0, 0] = float("nan")
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")
    with caplog.at_level(logging.WARNING, logger="latent_guidance"):
        shift = shift_of(rule, x=x)
    healthy = shift_of(rule)
    assert shift[1].abs().max() == 0 and torch.equal(shift[0], healthy[0]) and torch.equal(shift[2], healthy[2])
    assert "Classifier Guidance" in caplog.text and "sample 1" in caplog.text


def test_inference_mode_everywhere_changes_nothing(classifier: SmallClassifier) -> None:
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")
    outside = shift_of(rule)
    with torch.inference_mode():
        classifier.network.to(torch.float32).to(torch.float64)  # as a host that unloads and reloads does
        inside = shift_of(rule, x=latents(), sigma=SIGMA.clone())
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-7)  # the weights went through float32


def test_a_wrong_pairing_is_refused_with_both_names(classifier: SmallClassifier) -> None:
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat")
    rule.check_latents(Latents("any", 4, 0.5))
    for other in (Latents("SD3", 16, 0.5), Latents("SD15", 4, 0.18215), Latents("shifted", 4, 0.5, 0.1)):
        with pytest.raises(UserError, match=rf"'test' \(4 channels, scaling factor 0.5\).*{other.name}.*{other.name}"):
            rule.check_latents(other)
    with pytest.raises(UserError, match="16, 6, 5"):
        GuidanceRun([rule], VE_SCALED)(latents(channels=16), SIGMA, lambda names: {"cond": latents(channels=16)})


def test_an_unknown_label_is_refused_when_the_rule_is_made(classifier: SmallClassifier) -> None:
    with pytest.raises(UserError, match=r"'lion'.*cat, dog, bird, fish"):
        ClassifierGuidance(classifier=classifier, label="lion")
    with pytest.raises(UserError, match="classifier of Classifier Guidance is missing"):
        ClassifierGuidance(classifier=None, label="cat")


def test_a_regression_head_is_pushed_up_and_down() -> None:
    scorer = SmallClassifier().with_config(head="regression", labels=("beauty",))
    up, down = (shift_of(ClassifierGuidance(scaling="raw", classifier=scorer, label=way)) for way in ("up", "down"))
    torch.testing.assert_close(up, -down)
    u = latents() * expand(VE_SCALED.unit_scale(SIGMA), latents())
    before, after = (scorer.logits(value, VE_SCALED.log_snr(SIGMA))[:, 0] for value in (u, u + 1e-4 * up))
    assert (after > before).all()


def test_the_step_rules_gradient_is_with_respect_to_x_itself(classifier: SmallClassifier) -> None:
    for process in PROCESSES:
        x = latents(height=3, width=2)
        rule = ClassifierMeanShift(classifier=classifier, label="fish", guidance_scale=2.0)
        expected = 2.0 * finite_difference_score(classifier, process, x, SIGMA, label=3)
        torch.testing.assert_close(rule.step_gradient(process)(x, SIGMA), expected, rtol=1e-6, atol=1e-8)
    assert rule.sampler_options() == {"mean_shift_at": "x_t"}
