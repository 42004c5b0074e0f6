"""Rules that follow a loss: each against its paper's own algorithm, written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.guidance import (
    CFG,
    DPS,
    MPGD,
    FreeDoM,
    Guider,
    LossGuidedDiffusion,
    TrainingFreeGuidance,
    UniversalGuidance,
)
from latent_guidance.guidance.loss_rule import LossRule
from latent_guidance.guidance.smoothing import draws_like
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import SHAPES, drawn
from .denoisers import EVERY, Model, Towards, conds

LEVELS = (0.8, 0.5)
"""Of one step; alpha-bar differs between the processes, the algebra may not."""


class OneStep:
    """One DDIM step (eta = 0) in VP coordinates, as the papers write it: everything here is by hand."""

    def __init__(self, process: Process, x: Tensor, loss: Any, model: Model) -> None:
        self.sigma, self.sigma_next = (torch.full((len(x),), level, dtype=torch.float64) for level in LEVELS)
        self.abar, self.abar_next = (
            float(process.alphas_cumprod(torch.tensor(v, dtype=torch.float64))) for v in LEVELS
        )
        self.unit, self.unit_next = (float(process.unit_scale(torch.tensor(v, dtype=torch.float64))) for v in LEVELS)
        self.loss, self.process = loss, process
        self.x_vp = (x * self.unit).detach().requires_grad_()
        self.x0 = model(self.x_vp / self.unit, self.sigma, conds(len(x), 1.0))
        self.eps = (self.x_vp - self.abar**0.5 * self.x0) / (1 - self.abar) ** 0.5

    def at_x(self, value: Tensor) -> Tensor:
        """grad_{x_t} of sum(value)."""
        (gradient,) = torch.autograd.grad(value.sum(), self.x_vp, retain_graph=True)
        return gradient

    def at_x0(self, x0: Tensor) -> Tensor:
        """grad_{x0} of the loss, as a leaf."""
        leaf = x0.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(leaf).sum(), leaf)
        return gradient

    def ddim(self, x0: Tensor, eps: Tensor) -> Tensor:
        return (self.abar_next**0.5 * x0 + (1 - self.abar_next) ** 0.5 * eps).detach()

    def from_eps(self, eps: Tensor) -> Tensor:
        return (self.x_vp - (1 - self.abar) ** 0.5 * eps) / self.abar**0.5

    def ours(self, rule: LossRule, model: Model, x: Tensor) -> Tensor:
        """The same step with our rule and Euler, brought to VP coordinates."""
        guider = Guider(model, [rule])
        sigmas = torch.tensor([*LEVELS, 0.1], dtype=torch.float64)
        denoised = guider.begin(sigmas)(x, self.sigma, conds(len(x), 1.0))
        velocity = self.process.velocity(x, denoised, self.sigma)
        return (x + (LEVELS[1] - LEVELS[0]) * velocity) * self.unit_next


def mpgd(step: OneStep) -> Tensor:
    return step.ddim(step.x0 - 0.4 * step.at_x0(step.x0), step.eps)


def dps(step: OneStep) -> Tensor:
    loss = step.loss(step.x0)
    return step.ddim(step.x0, step.eps) - 0.4 * step.at_x(loss) / loss.detach().sqrt().reshape(-1, 1, 1, 1)


def dps_score(step: OneStep) -> Tensor:
    eps = step.eps + (1 - step.abar) ** 0.5 * 0.4 * step.at_x(step.loss(step.x0))
    return step.ddim(step.from_eps(eps), eps)


def freedom(step: OneStep) -> Tensor:
    return step.ddim(step.x0, step.eps) - 0.4 * step.abar**0.5 * step.at_x(step.loss(step.x0))


def universal(step: OneStep) -> Tensor:
    eps = step.eps + (1 - step.abar) ** 0.5 * 0.4 * step.at_x(step.loss(step.x0))
    delta = torch.zeros_like(step.x0)
    for _ in range(3):
        delta = delta - 0.2 * step.at_x0(step.x0 + delta)
    eps = eps - (step.abar / (1 - step.abar)) ** 0.5 * delta
    return step.ddim(step.from_eps(eps), eps)


def lgd(step: OneStep) -> Tensor:
    radius = (1 - step.abar) ** 0.5  # sigma / sqrt(alpha^2 + sigma^2)
    around = [step.x0 + radius * z for z in draws_like(step.x0, 5, 3, 0)]
    value = -torch.stack([-step.loss(point) for point in around]).logsumexp(dim=0)
    eps = step.eps + (1 - step.abar) ** 0.5 * 0.4 * step.at_x(value)
    return step.ddim(step.from_eps(eps), eps)


def tfg(step: OneStep) -> Tensor:
    around = [0.6 * (1 - step.abar) ** 0.5 * z for z in draws_like(step.x0, 2, 3, 0)]

    def log_f(x0: Tensor) -> Tensor:
        return torch.stack([-step.loss(x0 + part) for part in around]).logsumexp(dim=0)

    last = float(step.process.alphas_cumprod(torch.tensor(0.1, dtype=torch.float64)))
    ratios = [step.abar / step.abar_next, step.abar_next / last]
    weight = ratios[0] / (sum(ratios) / 2)
    delta_t = 0.4 * weight * step.at_x(log_f(step.x0))
    delta_0 = torch.zeros_like(step.x0)
    for _ in range(3):
        leaf = (step.x0 + delta_0).detach().requires_grad_()
        delta_0 = delta_0 + 0.1 * weight * torch.autograd.grad(log_f(leaf).sum(), leaf)[0]
    return step.ddim(step.x0, step.eps) + delta_t / ratios[0] ** 0.5 + step.abar_next**0.5 * delta_0


WRITTEN_OUT: list[Any] = [
    (mpgd, MPGD, {"scaling": "raw"}, {"scaling": "estimate"}),
    (dps, DPS, {"scaling": "paper"}, {"scaling": "score"}),
    (dps_score, DPS, {"scaling": "score"}, {"scaling": "paper"}),
    (freedom, FreeDoM, {"scaling": "signal"}, {"scaling": "relative"}),
    (universal, UniversalGuidance, {"scaling": "raw", "steps": 3, "step_size": 0.2}, {"steps": 2}),
    (lgd, LossGuidedDiffusion, {"scaling": "score", "draws": 5, "seed": 3}, {"spread": 0.9}),
    (
        tfg,
        TrainingFreeGuidance,
        {"scaling": "raw", "mean_scale": 0.1, "iterations": 3, "gamma": 0.6, "draws": 2, "seed": 3},
        {"schedule": "constant"},
    ),
]


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
@pytest.mark.parametrize(("paper", "rule_class", "settings", "wrong"), WRITTEN_OUT)
def test_one_step_is_the_papers(paper: Any, rule_class: Any, settings: Any, wrong: Any, process: Process) -> None:
    x, model, loss = drawn(2, 4, 3, 5), Model(process), Towards()
    step = OneStep(process, x, loss, model)
    expected = paper(step)
    with torch.inference_mode():
        ours = step.ours(rule_class(loss=loss, guidance_scale=0.4, **settings), model, x)
        other = step.ours(rule_class(loss=loss, guidance_scale=0.4, **{**settings, **wrong}), model, x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert (other - expected).abs().max() > 1e-4


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_freedom_by_the_correction_is_a_fifth_of_its_length_for_each_sample(process: Process) -> None:
    x, model, loss = drawn(2, 4, 3, 5), Model(process), Towards()
    step = OneStep(process, x, loss, model)
    rules = [CFG(guidance_scale=3.0), FreeDoM(loss=loss, guidance_scale=0.5, scaling="correction")]
    plain, guided = (
        Guider(model, chain, uncond=conds(1, 0.0))(x, step.sigma, conds(2, 1.0)) for chain in (rules[:1], rules)
    )
    cond, uncond = (model(x, step.sigma, conds(2, value)) for value in (1.0, 0.0))
    correction = 3.0 * (process.eps(x, cond, step.sigma) - process.eps(x, uncond, step.sigma))
    # without a grid the step is taken to end at sigma = 0, where VP coordinates are x's own: D moves by as much
    moved = (guided - plain).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, 0.2 * 0.5 * correction.flatten(1).norm(dim=1))
    alone = Guider(model, [FreeDoM(loss=loss, scaling="correction")])(x, step.sigma, conds(2, 1.0))
    torch.testing.assert_close(alone, cond)


def test_tfg_has_mpgd_and_lgd_has_dps_as_settings() -> None:
    x, model, loss = drawn(2, 4, 3, 5), Model(VE_SCALED), Towards()
    step = OneStep(VE_SCALED, x, loss, model)

    def same(one: LossRule, two: LossRule) -> None:
        torch.testing.assert_close(step.ours(one, model, x), step.ours(two, model, x), rtol=1e-12, atol=1e-12)

    tfg_settings = {"loss": loss, "gamma": 0.0, "schedule": "constant", "scaling": "raw"}
    leaf = TrainingFreeGuidance(guidance_scale=0.0, mean_scale=0.3, iterations=1, **tfg_settings)
    same(leaf, MPGD(loss=loss, guidance_scale=0.3, scaling="raw"))
    same(
        LossGuidedDiffusion(loss=loss, guidance_scale=0.3, scaling="score", spread=0.0),
        DPS(loss=loss, guidance_scale=0.3, scaling="score"),
    )
    same(
        UniversalGuidance(loss=loss, guidance_scale=0.3, scaling="raw", steps=0),
        DPS(loss=loss, guidance_scale=0.3, scaling="score"),
    )
    ratio = step.abar / step.abar_next
    factor = (ratio * step.abar) ** -0.5
    same(
        TrainingFreeGuidance(guidance_scale=0.3, mean_scale=0.0, **tfg_settings),
        FreeDoM(loss=loss, guidance_scale=0.3 * (ratio * step.abar) ** -0.5, scaling="signal"),
    )
    assert factor > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule_class", EVERY)
def test_any_shape_and_each_sample_by_itself(rule_class: Any, shape: tuple[int, ...]) -> None:
    model, rule = Model(RECTIFIED_FLOW), rule_class(loss=Towards())
    x, sigma = drawn(3, *shape), torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64)
    guider, labels = Guider(model, [rule]), conds(3, 1.0)
    together = guider(x, sigma, labels)
    assert torch.isfinite(together).all() and together.shape == x.shape
    for i in range(3):
        alone = guider(x[i : i + 1], sigma[i : i + 1], labels[:1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule_class", EVERY)
def test_relative_pulls_are_fractions_of_x_less_denoised(rule_class: Any) -> None:
    model, x = Model(VE_SCALED), drawn(2, 4, 3, 5)
    sigma, labels = torch.tensor([0.8, 0.3], dtype=torch.float64), conds(2, 1.0)
    leaf_parts = {UniversalGuidance: {"steps": 0}, TrainingFreeGuidance: {"mean_scale": 0.0}}.get(rule_class, {})
    plain = model(x, sigma, labels)
    for fraction in (0.25, -0.25):
        guided = Guider(model, [rule_class(loss=Towards(), guidance_scale=fraction, **leaf_parts)])(x, sigma, labels)
        ratio = (guided - plain).flatten(1).norm(dim=1) / (x - plain).flatten(1).norm(dim=1)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25))
        assert ((Towards()(guided) < Towards()(plain)) == (fraction > 0)).all()


def test_clipping_bounds_each_samples_gradient() -> None:
    model, x, sigma, labels = Model(VE_SCALED), drawn(2, 4, 3, 5), conds(2, 0.8), conds(2, 1.0)
    plain = model(x, sigma, labels)
    settings = {"loss": Towards(), "guidance_scale": 1.0, "scaling": "estimate"}
    for clip, bound in ((0.5, 0.5), (1000.0, None)):
        moved = (Guider(model, [MPGD(clip=clip, **settings)])(x, sigma, labels) - plain).flatten(1).norm(dim=1)
        if bound is not None:
            torch.testing.assert_close(moved, torch.full_like(moved, bound))
        else:
            assert (moved > 1).all()
