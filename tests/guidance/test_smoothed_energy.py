"""Smoothed energy: no blur is no guidance, a blur without limit takes the mean, and diffusers has the two cases exchanged."""

from __future__ import annotations

import math

import pytest
import torch

from latent_guidance.attention import AttentionPatch, blurred
from latent_guidance.guidance import Guider, SmoothedEnergy

from .networks import SIGMA, noisy, small_denoiser, words


def test_the_blur_of_its_pass() -> None:
    assert SmoothedEnergy().patch() == AttentionPatch("blur", "middle", math.inf)
    assert SmoothedEnergy(blur_sigma=999.9, layers="up").patch() == AttentionPatch("blur", "up", 999.9)


def test_no_blur_pays_for_no_pass_and_more_blur_guides_more() -> None:
    denoiser, x = small_denoiser(), noisy()
    plain = Guider(denoiser, [])(x, SIGMA, words(1))
    assert torch.equal(Guider(denoiser, [SmoothedEnergy(blur_sigma=0.0)])(x, SIGMA, words(1)), plain)
    assert denoiser.network.calls == [(2, 6, 8)] * 2  # type: ignore[attr-defined]
    shifts = [
        float((Guider(denoiser, [SmoothedEnergy(blur_sigma=blur, layers="all")])(x, SIGMA, words(1)) - plain).norm())
        for blur in (0.2, 0.5, 1.0, 1000.0)
    ]
    assert shifts == sorted(shifts) and shifts[-1] > 2 * shifts[0]


def test_diffusers_has_finite_and_infinite_blur_exchanged() -> None:
    hooks = pytest.importorskip("diffusers.hooks.smoothed_energy_guidance_utils")
    queries = torch.randn(2, 36, 5, dtype=torch.float64)

    def theirs(sigma: float) -> torch.Tensor:
        size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        return hooks._gaussian_blur_2d(queries.clone(), size, sigma, 9999.9)

    mean = blurred(queries, 6, 6, math.inf)
    if not torch.allclose(theirs(1.0), mean):
        pytest.skip("this diffusers has it right")
    assert not torch.allclose(theirs(1e6), mean, atol=1e-3)
    assert not torch.allclose(blurred(queries, 6, 6, 1.0), mean, atol=1e-3)
