"""What a run refuses before its first step, and how what autograd cannot do is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    DPS,
    MPGD,
    ClassifierGuidance,
    ClassifierMeanShift,
    GuidanceRun,
    LogProbGuidance,
    LossGuidedDiffusion,
    Rule,
    SlidingWindow,
    TrainingFreeGuidance,
)
from latent_guidance.guidance.gradient import named_autograd
from latent_guidance.guidance.latents import Latents
from latent_guidance.guidance.losses import ClassLabel, MaskedLoss, ReferenceLatent, SketchEdges, Symmetry, WeightedSum
from latent_guidance.guidance.smoothing import draws_like
from latent_guidance.models.classifier import ClassifierConfig
from latent_guidance.process import VE_SCALED

from .conftest import SmallClassifier, latents
from .test_losses import SmallVae

GRID = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
LATE: dict[str, Any] = {"sigma_hi": 3.0}
"""A window that opens at the third step only."""


def first_call(rule: Rule, x: Tensor, network: Callable[[Tensor], Tensor] = torch.tanh) -> tuple[str, int]:
    """What a run says at its first step, "" if nothing, and how often the network had been called by then."""
    calls: list[int] = []

    def evaluate(names: tuple[str, ...], at: Tensor = x, level: Tensor | None = None) -> dict[str, Tensor]:
        calls.append(len(names))
        return {name: network(at) for name in names}

    run = GuidanceRun([rule], VE_SCALED, sigmas=GRID)
    try:
        run(x, GRID[:1].expand(len(x)), evaluate, differentiable=evaluate)
    except UserError as error:
        return str(error), len(calls)
    return "", len(calls)


def masks(count: int) -> Tensor:
    return torch.ones(count, 6, 5, dtype=torch.float64)


LABEL = ClassLabel(classifier=SmallClassifier(), label="cat")
VIDEO = (2, 4, 3, 6, 5)
REFUSED: list[tuple[Callable[[], Rule], tuple[int, ...], str]] = [
    (lambda: ClassifierGuidance(scaling="raw", classifier=SmallClassifier(), label="cat", **LATE), VIDEO, "classifier of 4 channels"),
    (lambda: ClassifierGuidance(scaling="raw", classifier=SmallClassifier(), label="cat", **LATE), (2, 5, 6, 5), "of 4 channels"),
    (lambda: ClassifierGuidance(scaling="raw", classifier=SmallClassifier(), label="cat", mask=masks(3), **LATE), (2, 4, 6, 5), "3 masks"),
    (lambda: MPGD(loss=Symmetry(), vae=SmallVae(), **LATE), VIDEO, "loss on pictures"),
    (lambda: MPGD(loss=WeightedSum(loss_1=Symmetry()), vae=SmallVae(), **LATE), VIDEO, "loss on pictures"),
    (lambda: MPGD(loss=LABEL, **LATE), VIDEO, "classifier of 4 channels"),
    (lambda: MPGD(loss=MaskedLoss(loss=LABEL, mask=masks(1)), **LATE), VIDEO, "classifier of 4 channels"),
    (lambda: MPGD(loss=MaskedLoss(loss=LABEL, mask=masks(3)), **LATE), (2, 4, 6, 5), "3 masks"),
    (lambda: MPGD(loss=ReferenceLatent(reference=latents(3)), vae=SmallVae(), **LATE), (2, 4, 6, 5), "a reference of"),
    (lambda: MPGD(loss=ReferenceLatent(reference=torch.ones(1, 4, 3, 4, 4)), vae=SmallVae(), **LATE), VIDEO, "a reference of"),
    (lambda: MPGD(loss=SketchEdges(sketch=torch.ones(3, 3, 8, 8)), vae=SmallVae(), **LATE), (2, 4, 6, 5), "3 sketches"),
    (lambda: SlidingWindow(scale=1.0, **LATE), (2, 4, 6), "sliding windows"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "shape", "words"), REFUSED)
def test_latents_of_a_shape_that_a_rule_cannot_act_on_are_refused_before_the_network_is_called(
    rule: Callable[[], Rule], shape: tuple[int, ...], words: str
) -> None:
    said, calls = first_call(rule(), torch.zeros(shape, dtype=torch.float64))
    assert words in said and calls == 0, said


FOR_ONE = [rule for rule, _, words in REFUSED if "reference" not in words and "3 " not in words]


@pytest.mark.parametrize("rule", FOR_ONE)
def test_latents_of_pictures_are_not_refused(rule: Callable[[], Rule]) -> None:
    assert first_call(rule(), latents(2))[0] == ""


def test_a_rule_that_is_off_refuses_no_shape() -> None:
    assert first_call(MPGD(loss=Symmetry(), vae=SmallVae(), guidance_scale=0.0), torch.zeros(VIDEO))[0] == ""
    assert first_call(SlidingWindow(scale=0.0), torch.zeros(2, 4, 6))[0] == ""


def test_a_rule_inside_a_samplers_step_can_be_asked_too() -> None:
    rule = ClassifierMeanShift(classifier=SmallClassifier(), label="cat")
    rule.check_shape((2, 4, 6, 5))
    with pytest.raises(UserError, match="of 4 channels"):
        rule.check_shape(VIDEO)


def test_a_class_label_behind_a_mask_is_checked_for_the_models_latents() -> None:
    own, other = Latents("test", 4, 0.5), Latents("SD15", 4, 0.18215)
    rule = MPGD(loss=MaskedLoss(loss=LABEL, mask=masks(1)))
    rule.check_latents(own)
    with pytest.raises(UserError, match=r"classifier for the latents of 'test'.*'SD15'"):
        rule.check_latents(other)


class Odd(torch.autograd.Function):
    """tanh, with a backward pass that fails as a kernel made for inference does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("no kernel for fp8")


class OddLoss:
    space = "latent"

    def __call__(self, estimate: Tensor) -> Tensor:
        return Odd.apply(estimate).flatten(1).sum(dim=1)  # type: ignore[union-attr]


class Sum:
    space = "latent"

    def __call__(self, estimate: Tensor) -> Tensor:
        return estimate.flatten(1).sum(dim=1)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self(x)


def test_a_backward_pass_that_fails_names_the_rule_and_what_mends_it() -> None:
    through_model, _ = first_call(DPS(loss=Sum()), latents(), network=Odd.apply)
    assert all(words in through_model for words in ("'DPS", "through the model", "no kernel for fp8", "MPGD"))
    by_loss, _ = first_call(MPGD(loss=OddLoss()), latents())
    assert all(words in by_loss for words in ("OddLoss", "MPGD", "no kernel for fp8", "To mend it"))


def test_a_network_that_keeps_inference_tensors_is_named_and_not_the_loss() -> None:
    with torch.inference_mode():
        weight = torch.ones(4, 1, 1, dtype=torch.float64)
        said, _ = first_call(DPS(loss=Sum()), latents(), network=lambda x: torch.tanh(x) * weight)
    assert "the model, evaluated with its gradient for 'DPS" in said and "nference tensor" in said


def test_a_vae_that_keeps_inference_tensors_is_named_and_not_the_loss() -> None:
    vae = SmallVae()
    with torch.inference_mode():
        weight = torch.ones(3, 1, 1, dtype=torch.float64)
        decode = vae.decode
        vae.decode = lambda latent, clamp=True: decode(latent) * weight  # type: ignore[method-assign]
        said, _ = first_call(MPGD(loss=Symmetry(), vae=vae), latents(1))
    assert "the VAE at MPGD" in said and "keeps a tensor that was made in a node" not in said


def test_want_of_memory_and_other_errors_pass_as_they_are() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("HIP out of memory")):
        with pytest.raises(RuntimeError, match="out of memory") as caught, named_autograd("x", mend="y", backward=True):
            raise error
        assert caught.value is error
    with pytest.raises(RuntimeError, match="sizes differ"), named_autograd("x", mend="y"):
        raise RuntimeError("sizes differ")


class Counted(Sum):
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, estimate: Tensor) -> Tensor:
        self.asked += 1
        return super().__call__(estimate)


def test_what_one_step_of_tfg_may_cost_is_bounded() -> None:
    settings: dict[str, Any] = {"loss": Sum(), "guidance_scale": 0.0}
    TrainingFreeGuidance(iterations=4, draws=64, gamma=0.1, **settings)
    TrainingFreeGuidance(
        iterations=100, draws=64, gamma=0.0, **settings
    )  # without a radius the draws are not looked at
    with pytest.raises(UserError, match=r"320 times a step.*at most 256.*lower iterations or draws"):
        TrainingFreeGuidance(iterations=5, draws=64, gamma=0.1, **settings)


def test_where_there_is_no_radius_nothing_is_drawn() -> None:
    x, flat = latents(), torch.zeros(3, dtype=torch.float64)
    assert draws_like(x, 5, 0, 0, flat) == [] and len(draws_like(x, 5, 0, 0, flat + torch.tensor([0, 0, 1e-9]))) == 5
    for rule in (LossGuidedDiffusion, TrainingFreeGuidance):
        loss = Counted()
        radius = {"spread": 0.0} if rule is LossGuidedDiffusion else {"gamma": 0.0, "iterations": 0}
        first_call(rule(loss=loss, draws=7, **radius), x)
        assert loss.asked == 1


def test_a_scale_that_a_host_changes_within_a_run_is_followed() -> None:
    x, sigma = latents(), torch.ones(3, dtype=torch.float64)
    run = GuidanceRun([LogProbGuidance(loss=Sum(), guidance_scale=0.0)], VE_SCALED, base_scale=3.0)

    def evaluate(names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: {"cond": 2 * x, "uncond": x}[name] for name in names}

    assert torch.allclose(run(x, sigma, evaluate), 4 * x)
    assert torch.allclose(run(x, sigma, evaluate, base_scale=1.5), 2.5 * x)
    assert torch.allclose(run(x, sigma, evaluate), 4 * x), "it is for one call"


def test_names_in_a_classifiers_config_are_not_endless() -> None:
    made: dict[str, Any] = {
        "latent_space": "test",
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "log_snr_range": (-9.0, 9.0),
    }
    ClassifierConfig(labels=("a" * 200, "b"), **made)
    for wrong in ({"labels": ("a" * 201, "b")}, {"labels": ("a",), "latent_space": "s" * 201}):
        with pytest.raises(UserError, match="at most 200 characters"):
            ClassifierConfig(**{**made, **wrong})


def test_a_linear_network_of_normal_tensors_is_none_of_this() -> None:
    network = nn.Conv2d(4, 4, 1, dtype=torch.float64)
    assert first_call(DPS(loss=Sum()), latents(), network=network)[0] == ""
