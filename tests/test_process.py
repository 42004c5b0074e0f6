"""The process algebra: every round trip, the identities between its quantities, and its two edges."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand, process_from_alpha

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
both = pytest.mark.parametrize("process", PROCESSES, ids=["ve", "flow"])

levels = st.floats(1e-3, 0.999)
shapes = st.sampled_from([(2,), (3, 5), (1, 4, 2, 3), (2, 1, 3, 2, 2)])


def sample(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(process: Process, fraction: float, batch: int) -> Tensor:
    """A sigma (B,) of the process: up to about 30 for VE-scaled x, up to 1 for flow."""
    sigma = fraction if process is RECTIFIED_FLOW else math.tan(fraction * math.pi / 2.04)
    return torch.full((batch,), sigma, dtype=torch.float64)


@both
@given(fraction=levels, shape=shapes, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_every_round_trip(process: Process, fraction: float, shape: tuple[int, ...], seed: int) -> None:
    x, denoised = sample(shape, seed), sample(shape, seed + 1)
    sigma = level(process, fraction, shape[0])
    # eps and score hold denoised times alpha / sigma, so that their round trips lose the inverse of it
    noisiness = float(sigma[0] / process.alpha(sigma)[0]) * max(1.0, float(sigma[0]))
    for there, back, loss in (
        (process.velocity, process.denoised_from_velocity, 1.0),
        (process.vp_velocity, process.denoised_from_vp_velocity, max(1.0, noisiness)),
        (process.flow_velocity, process.denoised_from_flow_velocity, 1.0),
        (process.eps, process.denoised_from_eps, max(1.0, noisiness)),
        (process.score, process.denoised_from_score, max(1.0, noisiness)),
    ):
        returned = back(x, there(x, denoised, sigma), sigma)
        torch.testing.assert_close(returned, denoised, rtol=0, atol=1e-13 * loss * 10)


@both
@given(fraction=levels, seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_what_is_put_in_is_found_again(process: Process, fraction: float, seed: int) -> None:
    """With the true x0 as the estimate, eps is the noise and the score that of the noise."""
    x0, noise, sigma = sample((2, 3), seed), sample((2, 3), seed + 1), level(process, fraction, 2)
    x = process.noised(x0, noise, sigma)
    tolerance = 1e-13 / min(1.0, float(sigma[0]))
    torch.testing.assert_close(process.eps(x, x0, sigma), noise, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(process.score(x, x0, sigma) * expand(sigma, x), -noise, rtol=0, atol=10 * tolerance)


@both
@given(fraction=levels)
@settings(max_examples=25, deadline=None)
def test_noise_levels_have_one_meaning(process: Process, fraction: float) -> None:
    sigma = level(process, fraction, 3)
    abar = process.alphas_cumprod(sigma)
    torch.testing.assert_close(process.sigma_from_alphas_cumprod(abar), sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(process.log_snr(sigma), (abar / (1 - abar)).log(), rtol=0, atol=1e-8)
    # in VP coordinates the signal is sqrt(abar) and the noise sqrt(1 - abar)
    torch.testing.assert_close(process.unit_scale(sigma) * process.alpha(sigma), abar.sqrt())
    torch.testing.assert_close(process.unit_scale(sigma) * sigma, (1 - abar).sqrt())


@both
def test_vp_velocity_is_the_papers(process: Process) -> None:
    x, denoised, sigma = sample((2, 3), 0), sample((2, 3), 1), level(process, 0.4, 2)
    abar = expand(process.alphas_cumprod(sigma), x)
    expected = abar.sqrt() * process.eps(x, denoised, sigma) - (1 - abar).sqrt() * denoised
    torch.testing.assert_close(process.vp_velocity(x, denoised, sigma), expected, rtol=0, atol=1e-13)


@given(fraction=levels, seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_the_flow_velocity_is_the_same_in_both_processes(fraction: float, seed: int) -> None:
    """One estimate of one noised latent: x / alpha at sigma / alpha in VE coordinates is x at sigma in rectified flow."""
    x, denoised, sigma = sample((2, 3), seed), sample((2, 3), seed + 1), torch.full((2,), fraction, dtype=torch.float64)
    flow = RECTIFIED_FLOW.flow_velocity(x, denoised, sigma)
    torch.testing.assert_close(flow, RECTIFIED_FLOW.velocity(x, denoised, sigma), rtol=1e-9, atol=1e-12)
    alpha = RECTIFIED_FLOW.alpha(sigma)
    ve = VE_SCALED.flow_velocity(x / expand(alpha, x), denoised, sigma / alpha)
    torch.testing.assert_close(ve, flow, rtol=1e-9, atol=1e-9)
    by_parts = VE_SCALED.eps(x, denoised, sigma) - denoised
    torch.testing.assert_close(VE_SCALED.flow_velocity(x, denoised, sigma), by_parts, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(by_parts, VE_SCALED.velocity(x, denoised, sigma))


@both
def test_add_score_is_tweedie(process: Process) -> None:
    """Adding to the score and reading off the estimate is the same as the guidance identity."""
    x, denoised, term, sigma = sample((2, 3), 0), sample((2, 3), 1), sample((2, 3), 2), level(process, 0.4, 2)
    through_score = process.denoised_from_score(x, process.score(x, denoised, sigma) + term, sigma)
    torch.testing.assert_close(process.add_score(denoised, term, sigma), through_score, rtol=0, atol=1e-13)
    # ... and as guiding eps: eps - sqrt(1 - abar) * term in VP coordinates, where the gradient is term / unit_scale
    abar, scale = process.alphas_cumprod(sigma), process.unit_scale(sigma)
    eps = process.eps(x, denoised, sigma) - expand((1 - abar).sqrt() / scale, x) * term
    torch.testing.assert_close(process.denoised_from_eps(x, eps, sigma), through_score, rtol=0, atol=1e-13)


def test_sigma_squared_alone_is_wrong_for_flow() -> None:
    denoised, term, sigma = sample((2, 3), 1), sample((2, 3), 2), level(RECTIFIED_FLOW, 0.4, 2)
    naive = denoised + expand(sigma, term) ** 2 * term
    assert (RECTIFIED_FLOW.add_score(denoised, term, sigma) - naive).abs().max() > 0.01
    torch.testing.assert_close(VE_SCALED.add_score(denoised, term, sigma), naive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_alpha_zero_everything_is_finite_and_terms_are_zero(dtype: torch.dtype) -> None:
    x, term = sample((2, 3), 0).to(dtype), sample((2, 3), 1).to(dtype)
    sigma = torch.ones(2, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(RECTIFIED_FLOW.add_score(x, term, sigma), x)
        assert torch.equal(RECTIFIED_FLOW.denoised_from_eps(x, term, sigma), torch.zeros_like(x))
        assert torch.equal(RECTIFIED_FLOW.denoised_from_score(x, term, sigma), torch.zeros_like(x))
        assert torch.isfinite(RECTIFIED_FLOW.denoised_from_vp_velocity(x, term, sigma)).all()
        assert torch.equal(RECTIFIED_FLOW.alphas_cumprod(sigma), torch.zeros_like(sigma))
        assert torch.equal(RECTIFIED_FLOW.log_snr(sigma), torch.full_like(sigma, -math.inf))
        assert torch.equal(RECTIFIED_FLOW.eps(x, term, sigma), x)


def test_one_sample_at_alpha_zero_leaves_the_others_alone() -> None:
    term = sample((2, 3), 1)
    shift = RECTIFIED_FLOW.score_to_denoised_shift(term, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert torch.equal(shift[0], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(shift[1], 0.5 * term[1])


@both
def test_towards_sigma_zero(process: Process) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    x = sample((2, 3), 0)
    assert torch.equal(process.alphas_cumprod(zero), torch.ones_like(zero))
    assert torch.equal(process.log_snr(zero), torch.full_like(zero, math.inf))
    assert torch.equal(process.noised(x, x, zero), x)
    assert torch.equal(process.add_score(x, x, zero), x)
    assert torch.equal(process.unit_scale(zero), torch.ones_like(zero))


@both
def test_gradients_pass(process: Process) -> None:
    """Terms must not poison a gradient at alpha = 0 either: no 0 * inf behind a where."""
    term = sample((2, 3), 1).requires_grad_()
    sigma = torch.tensor([1.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(process.score_to_denoised_shift(term, sigma).sum(), term)
    assert torch.isfinite(gradient).all()


def test_expand() -> None:
    x = torch.zeros(2, 3, 4)
    assert expand(torch.ones(2), x).shape == (2, 1, 1)
    assert expand(torch.tensor(1.0), x).shape == ()


def test_process_from_alpha() -> None:
    assert process_from_alpha(1.0) is VE_SCALED
    assert process_from_alpha(0.5) is RECTIFIED_FLOW
    with pytest.raises(UserError, match=r"0\.7.*rectified flow"):
        process_from_alpha(0.7)


@both
def test_how_far_other_samplers_carry_what_makes_an_euler_step_end_further_on(process: Process) -> None:
    from latent_guidance.samplers import sample_ddim, sample_ddim_cfg_pp, sample_euler

    sigmas = torch.tensor([0.8, 0.7], dtype=torch.float64)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    shift = process.step_to_denoised_shift(torch.ones_like(x), sigmas[:1], sigmas[1:])

    class Shifted:
        def __init__(self, by: float) -> None:
            self.by, self.process = by, process

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: object = None) -> torch.Tensor:
            return self.by * shift

        def with_uncond(
            self, x: torch.Tensor, sigma: torch.Tensor, cond: object = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self.by * shift, torch.zeros_like(x)

    def carried(sample: Any, **settings: Any) -> float:
        quiet = {} if sample is sample_euler else {"noise_sampler": lambda *_: torch.zeros_like(x)}
        ends = [sample(Shifted(by), x, sigmas, **quiet, **settings) for by in (1.0, 0.0)]
        return float((ends[0] - ends[1]).mean())

    s, after = (float(sigma / process.alpha(sigma)) for sigma in sigmas)
    assert carried(sample_euler) == pytest.approx(1, abs=1e-12)
    assert carried(sample_ddim, eta=0.0) == pytest.approx(1, abs=1e-12)
    assert carried(sample_ddim, eta=1.0) == pytest.approx(1 + after / s, abs=1e-12)
    assert carried(sample_ddim_cfg_pp, eta=0.0) == pytest.approx(
        float(process.alpha(sigmas[1])) / (1 - 0.7 / 0.8), abs=1e-12
    )
