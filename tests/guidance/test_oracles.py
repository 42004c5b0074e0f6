"""Rules against closed forms: on a Gaussian mixture with its exact classifier, guidance at scale 1 *is* conditioning."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latent_guidance.analytic import GaussianMixture
from latent_guidance.guidance import (
    CFG,
    ClassifierGuidance,
    ClassifierMeanShift,
    ClassifierPostStep,
    Guider,
    LimitedInterval,
)
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.samplers import sample_ddim, sample_ddpm, sample_euler, sample_heun

from .conftest import Config

SHAPE = (1, 1, 2)  # of one sample: the mixture's two dimensions as a latent of one channel
NONE = -1


def mixture(process: Process) -> GaussianMixture:
    """Four components in two classes, correlated and of different sizes."""
    return GaussianMixture(
        process,
        weights=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
        means=torch.tensor([[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [2.0, -0.5]], dtype=torch.float64),
        covs=torch.tensor(
            [
                [[0.3, 0.1], [0.1, 0.2]],
                [[0.2, -0.1], [-0.1, 0.4]],
                [[0.1, 0.0], [0.0, 0.5]],
                [[0.2, 0.05], [0.05, 0.1]],
            ],
            dtype=torch.float64,
        ),
        labels=torch.tensor([0, 1, 0, 1]),
    )


@dataclass
class ExactClassifier:
    """The mixture's own posterior of its classes, as a noisy-latent classifier: unit-variance x and log-SNR in, logits out.

    It is written for the VE-scaled mixture whatever the model's process is, as a trained classifier would be.
    """

    config = Config(labels=("a", "b"), latent_channels=1, log_snr_range=(-100.0, 100.0))
    network = None

    def logits(self, x: Tensor, log_snr: Tensor) -> Tensor:
        sigma = (-log_snr / 2).exp()
        return mixture(VE_SCALED).class_log_probs(x * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma)


def draws(n: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def labels_of(value: int, n: int = 64) -> Tensor:
    return torch.full((n,), value)


@pytest.mark.parametrize("form", ["score", "eps"])
@pytest.mark.parametrize(
    ("process", "sigma"),
    [(VE_SCALED, sigma) for sigma in (0.05, 0.7, 3.0, 14.6)]
    + [(RECTIFIED_FLOW, sigma) for sigma in (0.05, 0.3, 0.7, 0.95)],
    ids=str,
)
def test_the_exact_classifier_at_scale_one_gives_the_exact_conditional_denoiser(
    process: Process, form: str, sigma: float
) -> None:
    x, levels, model = draws(), torch.full((64,), sigma, dtype=torch.float64), mixture(process)
    rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=1.0, form=form)
    guided = Guider(model, [rule])(x, levels, labels_of(NONE))
    exact = model(x, levels, labels_of(1))
    torch.testing.assert_close(guided, exact, rtol=0, atol=1e-10)
    for scale in (1.1, -1.0, 0.0):
        wrong = ClassifierGuidance(
            scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=scale, form=form
        )
        assert not torch.allclose(Guider(model, [wrong])(x, levels, labels_of(NONE)), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_every_target_is_bayes_rule_too(process: Process) -> None:
    x, levels, model = draws(), torch.full((64,), 0.6, dtype=torch.float64), mixture(process)
    for label, truth in (("not a", 1), ("a, b", NONE), ("b, not a", 1)):
        rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label=label, guidance_scale=1.0)
        guided = Guider(model, [rule])(x, levels, labels_of(NONE))
        torch.testing.assert_close(guided, model(x, levels, labels_of(truth)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_a_trained_samplers_run_with_the_rule_is_the_conditional_run(process: Process) -> None:
    """Whole trajectories, with every sampler's own calls, at every step of the grid."""
    top = 1.0 if process is RECTIFIED_FLOW else 10.0
    sigmas = torch.cat([torch.linspace(top, 0.05, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x, model = draws() * top, mixture(process)
    rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=1.0)
    guider = Guider(model, [rule])
    for sample in (sample_euler, sample_heun, sample_ddim):
        start = sigmas if process is VE_SCALED else sigmas[1:]  # at alpha = 0 x says nothing of its class
        guided = sample(guider, x, start, labels_of(NONE))
        exact = sample(model, x, start, labels_of(1))
        torch.testing.assert_close(guided, exact, rtol=0, atol=1e-9)
        assert not torch.allclose(guided, sample(model, x, start, labels_of(NONE)), atol=1e-2)


def test_cfg_and_the_classifier_meet_as_bayes_rule_says() -> None:
    """On a mixture D_c - D_u is the classifier's own term, so CFG at w equals unconditional plus classifier at w."""
    x, levels, model = draws(), torch.full((64,), 1.3, dtype=torch.float64), mixture(VE_SCALED)
    for w in (0.0, 0.5, 1.0, 2.5, -1.0):
        cfg = Guider(model, [CFG(guidance_scale=w)], uncond=labels_of(NONE))(x, levels, labels_of(1))
        rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=w)
        by_gradient = Guider(model, [rule])(x, levels, labels_of(NONE))
        torch.testing.assert_close(cfg, by_gradient, rtol=0, atol=1e-10)


def test_limited_interval_is_conditional_outside_and_cfg_inside() -> None:
    x, model = draws(), mixture(VE_SCALED)
    rules = [CFG(guidance_scale=3.0), LimitedInterval(sigma_lo=0.5, sigma_hi=2.0)]
    guider = Guider(model, rules, uncond=labels_of(NONE))
    for sigma, inside in ((0.5, False), (0.51, True), (2.0, True), (2.1, False)):
        levels = torch.full((64,), sigma, dtype=torch.float64)
        expected = model(x, levels, labels_of(1))
        if inside:
            uncond = model(x, levels, labels_of(NONE))
            expected = uncond + 3.0 * (expected - uncond)
        torch.testing.assert_close(guider(x, levels, labels_of(1)), expected, rtol=0, atol=1e-12)


class Recorded:
    """Unit noise that is the same in every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(64, *SHAPE, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_the_mean_shift_with_sigma_beta_is_the_eps_form_at_scale_times_root_alpha_t(process: Process) -> None:
    """One DDPM step with mean shift at w = 1, against guidance of eps at w sqrt(alpha_t); other variants differ."""
    sigmas = torch.tensor([0.8, 0.5], dtype=torch.float64)
    abar, abar_next = process.alphas_cumprod(sigmas)
    root_alpha_t = (abar / abar_next).sqrt().item()
    x, model = draws(), mixture(process)

    def step(rule: ClassifierMeanShift | ClassifierPostStep, variance: str = "beta") -> Tensor:
        options = {rule.sampler_option: rule.step_gradient(process), **rule.sampler_options()}
        return sample_ddpm(model, x, sigmas, labels_of(NONE), variance=variance, noise_sampler=Recorded(), **options)  # type: ignore[arg-type]

    def eps_form(scale: float, variance: str = "beta") -> Tensor:
        rule = ClassifierGuidance(
            scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=scale, form="eps"
        )
        guider = Guider(model, [rule])
        return sample_ddpm(guider, x, sigmas, labels_of(NONE), variance=variance, noise_sampler=Recorded())

    common = {"classifier": ExactClassifier(), "label": "b", "guidance_scale": 1.0}
    shifted = step(ClassifierMeanShift(**common))
    torch.testing.assert_close(shifted, eps_form(root_alpha_t), rtol=0, atol=1e-10)
    others = {
        "without the factor": eps_form(1.0),
        "beta-tilde": step(ClassifierMeanShift(**common), "beta_tilde"),
        "at mu": step(ClassifierMeanShift(**common, at="mu")),
        "post-step": step(ClassifierPostStep(**common)),
        "unguided": step(ClassifierMeanShift(**{**common, "guidance_scale": 0.0})),
    }
    for name, other in others.items():
        assert (other - shifted).abs().max() > 1e-4, name


def test_the_post_step_form_adds_the_gradient_at_the_new_x_and_nothing_else() -> None:
    process, sigmas = VE_SCALED, torch.tensor([0.8, 0.5], dtype=torch.float64)
    x, model, scale = draws(), mixture(VE_SCALED), 0.3
    rule = ClassifierPostStep(classifier=ExactClassifier(), label="b", guidance_scale=scale)
    plain = sample_ddpm(model, x, sigmas, labels_of(NONE), noise_sampler=Recorded())
    stepped = sample_ddpm(
        model, x, sigmas, labels_of(NONE), noise_sampler=Recorded(), post_step=rule.step_gradient(process)
    )
    level = torch.full((64,), 0.5, dtype=torch.float64)
    score = model.score(plain, level, labels_of(1)) - model.score(plain, level)
    unit = process.unit_scale(level).reshape(-1, 1, 1, 1)
    # in VP coordinates: unit * x += w * (gradient with respect to unit * x), which is score / unit
    torch.testing.assert_close(unit * stepped, unit * plain + scale * score / unit, rtol=0, atol=1e-10)


def test_the_first_flow_step_and_the_last_ddpm_step_are_finite_and_silent(caplog: pytest.LogCaptureFixture) -> None:
    for process, top in ((RECTIFIED_FLOW, 1.0), (VE_SCALED, 14.6)):
        sigmas = torch.tensor([top, 0.7, 0.3, 0.0], dtype=torch.float64)
        rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label="b")
        shift = ClassifierMeanShift(classifier=ExactClassifier(), label="b", at="mu")
        post = ClassifierPostStep(classifier=ExactClassifier(), label="b", guidance_scale=0.05)
        guider = Guider(mixture(process), [rule])
        assert torch.isfinite(sample_ddim(guider, draws(), sigmas, labels_of(NONE))).all()
        for step_rule in (shift, post):
            options = {step_rule.sampler_option: step_rule.step_gradient(process), **step_rule.sampler_options()}
            out = sample_ddpm(mixture(process), draws(), sigmas, labels_of(NONE), noise_sampler=Recorded(), **options)
            assert torch.isfinite(out).all()
    assert not caplog.records
