"""Sliding windows: crops of any model, averaged and masked, and closed forms on models that see no further than a place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, GuidanceRun, Guider, PerturbedAttention, SlidingWindow
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import latents
from .networks import SIGMA, noisy, small_denoiser, words

LEVELS = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)


class Mean:
    """D = cond * the mean over all places: a model that sees everything there is."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.shapes.append(tuple(x.shape))
        factor = cond.reshape(-1, *[1] * (x.ndim - 1)) + sigma.reshape(-1, *[1] * (x.ndim - 1))
        return factor * x.mean(dim=(-2, -1), keepdim=True).expand_as(x)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 5, 12), (2, 3, 8, 6)])
def test_the_equation_on_a_model_of_means(process: Process, masked: bool, shape: tuple[int, ...]) -> None:
    """As the authors' code writes it, one crop after the other, each sample at its own noise level."""
    model, x = Mean(process), torch.randn(3, *shape, dtype=torch.float64)
    cond = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(3, 1)
    rule = SlidingWindow(scale=1.5, size=0.6, windows=2, masked=masked)
    out = Guider(model, [rule])(x, LEVELS, cond)
    height, width = shape[-2:]
    tall, wide = -(-height * 6 // 10), -(-width * 6 // 10)
    total, count = torch.zeros_like(x), torch.zeros(height, width)
    for top in (0, height - tall):
        for left in (0, width - wide):
            place = (..., slice(top, top + tall), slice(left, left + wide))
            total[place] += model(x[place], LEVELS, cond)
            count[place] += 1
    own = model(x, LEVELS, cond)
    weak = total / count
    mask = (count > 1).double() if masked else torch.ones(height, width)
    torch.testing.assert_close(out, own + 1.5 * mask * (own - weak), rtol=1e-12, atol=1e-12)
    assert bool((count == 1).any()) and (weak - own).abs().max() > 1e-3


def test_the_windows_of_a_step_are_one_call_and_the_whole_latent_another() -> None:
    model = Mean(VE_SCALED)
    one = torch.ones(1, 1, dtype=torch.float64)
    Guider(model, [CFG(guidance_scale=2.0), SlidingWindow()], uncond=one)(latents(height=8, width=16), LEVELS, one)
    assert model.shapes == [(6, 4, 8, 16), (12, 4, 5, 10)]
    for idle in (SlidingWindow(scale=0.0), SlidingWindow(size=1.0), SlidingWindow(sigma_lo=0.9)):
        model.shapes.clear()
        Guider(model, [idle])(latents(), LEVELS, one)
        assert model.shapes == [(3, 4, 6, 5)]


@pytest.mark.parametrize("shape", [(24, 40), (1, 1), (7, 3)])
def test_latents_of_every_size_are_finite(shape: tuple[int, int]) -> None:
    """Where the stride does not divide the room, the authors' code divides by zero at the border."""
    x = latents(height=shape[0], width=shape[1])
    one = torch.ones(1, 1, dtype=torch.float64)
    for windows in (2, 3, 4):
        out = Guider(Mean(VE_SCALED), [SlidingWindow(windows=windows, masked=False)])(x, LEVELS, one)
        assert out.shape == x.shape and torch.isfinite(out).all()


def test_on_a_network_beside_changed_attention() -> None:
    denoiser = small_denoiser()
    rules = [SlidingWindow(masked=False), PerturbedAttention()]
    out = Guider(denoiser, rules)(noisy(height=8), SIGMA, words(1))
    assert denoiser.network.calls == [(4, 8, 8), (8, 5, 5)]  # type: ignore[attr-defined]
    alone = [Guider(denoiser, [rule])(noisy(height=8), SIGMA, words(1)) for rule in [*rules]]
    plain = Guider(denoiser, [])(noisy(height=8), SIGMA, words(1))
    torch.testing.assert_close(out, alone[0] + alone[1] - plain, rtol=1e-4, atol=2e-5)


def test_windows_that_leave_gaps_and_latents_without_places_are_refused() -> None:
    with pytest.raises(UserError, match="leave gaps"):
        SlidingWindow(size=0.45, windows=2)
    SlidingWindow(size=0.5, windows=2), SlidingWindow(size=0.34, windows=3)
    with pytest.raises(UserError, match="sliding windows over a latent"):
        Guider(Mean(VE_SCALED), [SlidingWindow()])(torch.zeros(3, 2).double(), LEVELS, torch.ones(1, 1).double())
    assert GuidanceRun([SlidingWindow(size=1.0)], VE_SCALED).may_ask == frozenset()
