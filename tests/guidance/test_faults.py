"""Faults seen in widely used implementations, by name: each is shown to be one here, and not to be ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    AngleDomainGuidance,
    CFGZeroStar,
    ClassifierGuidance,
    ClassifierMeanShift,
    ClassifierPostStep,
    DynamicThresholding,
    GuidanceRun,
    Guider,
    MagnitudeAwareGuidance,
    PerpNeg,
    RescaleGuidance,
    Rule,
    SlidingModeCFG,
    Stage,
    TangentialCFG,
)
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.samplers import SAMPLERS, sample_ddim, sample_ddpm

from .conftest import SmallClassifier, drawn, prompt
from .test_oracles import NONE, ExactClassifier, draws, labels_of, mixture

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
SIGMAS = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)

RENORMALISING: dict[str, Callable[[], Rule]] = {
    "rescale": lambda: RescaleGuidance(phi=0.7),
    "APG": lambda: AdaptiveProjectedGuidance(eta=0.2, norm_threshold=3.0, momentum=0.4),
    "CFG-Zero*": lambda: CFGZeroStar(guidance_scale=5.0, zero_steps=0),
    "angle domain": lambda: AngleDomainGuidance(guidance_scale=5.0),
    "Perp-Neg": lambda: PerpNeg(guidance_scale=5.0, negative=prompt()),
    "tangential": lambda: TangentialCFG(),
    "sliding mode": lambda: SlidingModeCFG(),
    "magnitude-aware": lambda: MagnitudeAwareGuidance(alpha=2.0),
    "adaptive": lambda: AdaptiveGuidance(),
    "dynamic thresholding": lambda: DynamicThresholding(plain_scale=2.0),
    "relative classifier": lambda: ClassifierGuidance(
        classifier=SmallClassifier(), label="cat", guidance_scale=0.3, scaling="relative", clip=0.1
    ),
}
"""Rules that divide by a norm, an angle, a spread or a range of the whole sample."""


def guided(rule: Rule, process: Process, picture: slice) -> Tensor:
    """Two calls of one run for some pictures of three, of which each is ten times as loud as the one before."""
    loudness = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    x = drawn(3, 4, 7, 5, seed=1)[picture]
    estimates = [(loudness * drawn(3, 4, 7, 5, seed=seed))[picture] for seed in (2, 3, 4)]
    rules = [rule] if rule.stage in (Stage.COMBINE, Stage.GRADIENT) else [CFG(guidance_scale=5.0), rule]
    run = GuidanceRun(rules, process)

    def evaluate(names: tuple[str, ...]) -> dict[str, Tensor]:
        return dict(zip(names, estimates, strict=False))

    return torch.stack([run(x, sigma * torch.ones(len(x)).double(), evaluate) for sigma in (0.6, 0.3)])


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("name", RENORMALISING)
def test_renormalising_does_not_raise_or_mix_at_batch_two(name: str, process: Process) -> None:
    """Nor at three: a picture is guided as if it were alone."""
    alone = [guided(RENORMALISING[name](), process, slice(i, i + 1)) for i in range(3)]
    for batch in (1, 2, 3):
        together = guided(RENORMALISING[name](), process, slice(0, batch))
        torch.testing.assert_close(together, torch.cat(alone[:batch], dim=1), rtol=1e-10, atol=1e-12)


def test_a_renormalised_cfg_as_it_is_often_written_raises_or_mixes_at_batch_two() -> None:
    """std over (C, H, W) without keepdim broadcasts over the width; std over everything is the batch's."""
    loud = torch.tensor([1.0, 10.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    cond, plain = loud * drawn(2, 4, 7, 5), loud * drawn(2, 4, 7, 5, seed=1)

    def without_keepdim(cond: Tensor, plain: Tensor) -> Tensor:
        return plain * (cond.std(dim=(1, 2, 3)) / plain.std(dim=(1, 2, 3)))

    assert torch.isfinite(without_keepdim(cond[:1], plain[:1])).all(), "at batch 1 nothing is seen of it"
    with pytest.raises(RuntimeError, match="size of tensor"):
        without_keepdim(cond, plain)
    of_the_batch = plain * (cond.std() / plain.std())
    alone = plain[:1] * (cond[:1].std() / plain[:1].std())
    assert (of_the_batch[:1] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["score", "eps"])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_ddim_does_not_ignore_a_gradient(process: Process, form: str) -> None:
    """One step by hand, in VP coordinates: eps - sqrt(1 - abar) s grad log p, then eq. 12 of arXiv 2010.02502."""
    scale, sigmas = 2.5, torch.tensor([0.8, 0.5], dtype=torch.float64)
    x, model, level = draws(), mixture(process), torch.full((64,), 0.8, dtype=torch.float64)
    rule = ClassifierGuidance(scaling="raw", classifier=ExactClassifier(), label="b", guidance_scale=scale, form=form)
    guided = sample_ddim(Guider(model, [rule]), x, sigmas, labels_of(NONE))
    plain = sample_ddim(Guider(model, []), x, sigmas, labels_of(NONE))
    assert (guided - plain).abs().mean() > 1e-2

    alpha, alpha_next = ((1 - sigmas) if process is RECTIFIED_FLOW else torch.ones(2)).double()
    size, size_next = (alpha**2 + 0.8**2).sqrt(), (alpha_next**2 + 0.5**2).sqrt()
    abar, abar_next = (alpha / size) ** 2, (alpha_next / size_next) ** 2
    x_vp, x0 = x / size, model(x, level, labels_of(NONE))
    gradient = size * (model.score(x, level, labels_of(1)) - model.score(x, level, labels_of(NONE)))

    def step(eps: Tensor) -> Tensor:
        x0 = (x_vp - (1 - abar).sqrt() * eps) / abar.sqrt()
        return size_next * (abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps)

    eps = (x_vp - abar.sqrt() * x0) / (1 - abar).sqrt()
    torch.testing.assert_close(plain, step(eps), rtol=0, atol=1e-10)
    torch.testing.assert_close(guided, step(eps - (1 - abar).sqrt() * scale * gradient), rtol=0, atol=1e-10)
    assert (step(eps - scale * gradient) - guided).abs().max() > 1e-2, "without the factor it is another step"


@pytest.mark.parametrize("option", ["mean_shift", "post_step"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_a_sampler_without_a_place_for_a_step_gradient_refuses_it(sampler: str, option: str) -> None:
    """It must not be taken and dropped: DDIM of a widely used program has the parameter and never calls it."""
    called: list[Any] = []

    def gradient(x: Tensor, sigma: Tensor) -> Tensor:
        called.append(sigma)
        return torch.ones_like(x)

    guider = Guider(mixture(VE_SCALED), [], uncond=labels_of(NONE, 1))
    arguments: tuple[Any, ...] = (guider, draws(), SIGMAS, labels_of(1))
    with pytest.raises(TypeError, match=option):
        SAMPLERS[sampler](*arguments, **{option: gradient})
    assert not called
    sample_ddpm(*arguments, **{option: gradient})
    assert called


@pytest.mark.parametrize("rule_class", [ClassifierMeanShift, ClassifierPostStep])
def test_a_rule_for_the_step_in_a_guider_is_refused_and_not_ignored(rule_class: type[Rule]) -> None:
    rule = rule_class(classifier=SmallClassifier(), label="cat")  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"in a guider.*DDPM sampler"):
        Guider(mixture(VE_SCALED), [rule])
