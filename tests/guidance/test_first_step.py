"""The first step of a flow, at alpha = 0: which rules that follow a loss act there (docs/LOSSES.md says it)."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.denoiser import for_run
from latent_guidance.guidance import (
    DPS,
    MPGD,
    FreeDoM,
    Guider,
    LossGuidedDiffusion,
    TrainingFreeGuidance,
    UniversalGuidance,
)
from latent_guidance.guidance.loss_rule import LossRule
from latent_guidance.process import RECTIFIED_FLOW

from .conftest import drawn
from .denoisers import Model, Towards, conds

QUIET_AT_FIRST: list[LossRule] = [
    LossGuidedDiffusion(loss=Towards()),
    LossGuidedDiffusion(loss=Towards(), scaling="score"),
    UniversalGuidance(loss=Towards(), steps=0),
    DPS(loss=Towards(), scaling="relative"),
    DPS(loss=Towards(), scaling="score"),
    FreeDoM(loss=Towards(), scaling="signal"),
    FreeDoM(loss=Towards(), scaling="correction"),
    TrainingFreeGuidance(loss=Towards()),
    TrainingFreeGuidance(loss=Towards(), scaling="raw"),
]
LOUD_AT_FIRST: list[LossRule] = [
    MPGD(loss=Towards()),
    MPGD(loss=Towards(), scaling="raw"),
    UniversalGuidance(loss=Towards(), guidance_scale=0.0),
    DPS(loss=Towards(), scaling="paper"),
    FreeDoM(loss=Towards(), scaling="relative"),
    TrainingFreeGuidance(loss=Towards(), schedule="constant"),
]


@pytest.mark.parametrize("acts", [False, True])
def test_who_acts_at_the_first_step_of_a_flow(acts: bool) -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64)
    model, x = Model(RECTIFIED_FLOW), drawn(2, 4, 5, 7)
    plain = model(x, sigmas[:1].expand(2), conds(2, 1.0))
    for rule in LOUD_AT_FIRST if acts else QUIET_AT_FIRST:
        guided = for_run(Guider(model, [rule]), sigmas)(x, sigmas[:1].expand(2), conds(2, 1.0))
        assert bool(guided.isfinite().all())
        assert bool((guided != plain).any()) is acts, rule


@pytest.mark.parametrize("schedule", ["increase", "constant", "decrease"])
def test_a_flow_run_of_one_step_is_guided_by_tfg_whatever_its_schedule(schedule: str) -> None:
    """What *increase* is in proportion to is 0 on the whole grid, and so is its mean."""
    sigmas, x = torch.tensor([1.0, 0.0], dtype=torch.float64), drawn(2, 4, 5, 7)
    model = Model(RECTIFIED_FLOW)
    plain = model(x, sigmas[:1].expand(2), conds(2, 1.0))
    rule = TrainingFreeGuidance(loss=Towards(), schedule=schedule)
    guided = for_run(Guider(model, [rule]), sigmas)(x, sigmas[:1].expand(2), conds(2, 1.0))
    assert bool((Towards()(guided) < Towards()(plain)).all())
