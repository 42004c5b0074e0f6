"""What guided sampling samples: with the exact class gradient at scale 1, the exact conditional distribution.

x starts as a draw from the exact noised conditional of a 2-D Gaussian mixture; the denoiser is the *unconditional* one
plus the class gradient. Projections of the result are held against their exact distribution functions
(Kolmogorov-Smirnov, the largest distance over random directions). Nothing is claimed for other scales: scale s does not
sample p(x) p(y|x)^s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.analytic import GaussianMixture
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand
from latent_guidance.samplers import SAMPLERS, Recurrence, sample_dpmpp_2m
from latent_guidance.samplers import recurrence as recurrence_module

N = 8000
THRESHOLD = 0.035
RARE, COMMON = 0, 1  # a class of a tenth of the data, whose gradient has much to do; and the rest

both = pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=["ve", "flow"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixture(process: Process) -> GaussianMixture:
    means = torch.tensor([[1.2, 0.0], [-0.4, 0.9], [-0.3, -1.0], [0.2, 0.3]], dtype=torch.float64)
    covs = [
        [[0.25, 0.1], [0.1, 0.3]],
        [[0.2, -0.08], [-0.08, 0.35]],
        [[0.3, 0.05], [0.05, 0.15]],
        [[0.5, 0.0], [0.0, 0.4]],
    ]
    weights, labels = torch.tensor([0.05, 0.4, 0.5, 0.05]), torch.tensor([RARE, COMMON, COMMON, RARE])
    return GaussianMixture(process, weights, means, torch.tensor(covs, dtype=torch.float64), labels)


def grid(process: Process, steps: int) -> Tensor:
    if process is RECTIFIED_FLOW:
        return torch.linspace(1.0, 0.01, steps + 1, dtype=torch.float64)
    return torch.linspace(8.0**0.2, 0.01**0.2, steps + 1, dtype=torch.float64) ** 5


def distance(x: Tensor, model: GaussianMixture, sigma: Tensor, label: int, directions: int = 32) -> float:
    """The largest Kolmogorov-Smirnov distance of projections of x (N, 2) from those of p(x | label) at sigma."""
    angles = math.pi * torch.rand(directions, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    own, alpha = model.labels == label, model.process.alpha(sigma)
    weights = model.log_weights[own].softmax(0)
    covs = (model.axes @ torch.diag_embed(model.variances) @ model.axes.mT)[own]
    rank, worst = torch.arange(len(x) + 1, dtype=torch.float64) / len(x), 0.0
    for angle in angles:
        direction = torch.stack([angle.cos(), angle.sin()])
        projected = (x @ direction).sort().values[:, None]
        deviation = (alpha**2 * torch.einsum("d,kde,e->k", direction, covs, direction) + sigma**2).sqrt()
        exact = torch.special.ndtr((projected - alpha * model.means[own] @ direction) / deviation) @ weights
        worst = max(worst, float((rank[1:] - exact).max()), float((exact - rank[:-1]).max()))
    return worst


class Guided:
    """The unconditional denoiser and the exact gradient of log p(y | x), put together by `rule`."""

    def __init__(self, model: GaussianMixture, rule: Callable[[Process, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.model, self.process, self.rule = model, model.process, rule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        gradient = self.model.score(x, sigma, cond) - self.model.score(x, sigma)
        return self.rule(self.process, self.model(x, sigma), gradient, sigma)


def right(process: Process, denoised: Tensor, gradient: Tensor, sigma: Tensor) -> Tensor:
    return process.add_score(denoised, gradient, sigma)


WRONG: dict[str, Callable[[Process, Tensor, Tensor, Tensor], Tensor]] = {
    "scale 1.1": lambda process, denoised, gradient, sigma: process.add_score(denoised, 1.1 * gradient, sigma),
    "scale 0.9": lambda process, denoised, gradient, sigma: process.add_score(denoised, 0.9 * gradient, sigma),
    "sigma for sigma squared": lambda process, denoised, gradient, sigma: (
        denoised + expand(sigma / process.alpha(sigma).clamp(min=1e-9), gradient) * gradient
    ),
    "no guidance": lambda process, denoised, gradient, sigma: denoised,
    "wrong sign": lambda process, denoised, gradient, sigma: process.add_score(denoised, -gradient, sigma),
}


def sampled_distance(
    process: Process,
    rule: Callable[[Process, Tensor, Tensor, Tensor], Tensor],
    label: int,
    sampler: Callable[..., Tensor] = sample_dpmpp_2m,
    steps: int = 32,
) -> float:
    model, labels, sigmas = mixture(process), torch.full((N,), label), grid(process, steps)
    generator = torch.Generator().manual_seed(3)
    x = model.marginal_sample(N, sigmas[0], labels, generator)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    result = sampler(Guided(model, rule), x, sigmas, labels, noise_sampler=noise)
    return distance(result, model, sigmas[-1], label)


@both
@pytest.mark.parametrize("label", [RARE, COMMON])
def test_guided_sampling_samples_the_class(process: Process, label: int) -> None:
    assert sampled_distance(process, right, label) < THRESHOLD


@both
@pytest.mark.parametrize("name", WRONG)
def test_wrong_guidance_does_not(process: Process, name: str) -> None:
    assert sampled_distance(process, WRONG[name], RARE) > THRESHOLD


def test_sigma_squared_without_alpha_does_not_on_flow() -> None:
    def naive(process: Process, denoised: Tensor, gradient: Tensor, sigma: Tensor) -> Tensor:
        return denoised + expand(sigma, gradient) ** 2 * gradient

    assert sampled_distance(RECTIFIED_FLOW, naive, RARE) > THRESHOLD
    assert sampled_distance(VE_SCALED, naive, RARE) < THRESHOLD  # alpha = 1: there it is right


@both
@pytest.mark.parametrize(("name", "steps"), [("heun", 20), ("euler_ancestral", 80), ("dpmpp_2m_sde", 40)])
def test_other_samplers_too(process: Process, name: str, steps: int) -> None:
    assert sampled_distance(process, right, RARE, SAMPLERS[name], steps) < THRESHOLD


def with_recurrence(process: Process, name: str, steps: int) -> float:
    """The distance after a run of the exact conditional denoiser that takes every step three times."""
    model, labels, sigmas = mixture(process), torch.full((N,), RARE), grid(process, steps)
    generator = torch.Generator().manual_seed(3)
    x = model.marginal_sample(N, sigmas[0], labels, generator)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    result = SAMPLERS[name](model, x, sigmas, labels, noise_sampler=noise, recurrence=Recurrence(3))
    return distance(result, model, sigmas[-1], RARE)


@both
@pytest.mark.parametrize(("name", "steps"), [("heun", 16), ("euler_ancestral", 60)])
def test_recurrence_leaves_the_marginal_as_it_is(process: Process, name: str, steps: int) -> None:
    assert with_recurrence(process, name, steps) < THRESHOLD


def noised_by_sigma(process: Process, x: Tensor, sigma: Tensor, sigma_to: Tensor, noise: Tensor) -> Tensor:
    """Noise of the whole level in the place of what is missing of it."""
    return process.alpha(sigma_to) / process.alpha(sigma) * x + sigma_to * noise


def noised_by_difference(process: Process, x: Tensor, sigma: Tensor, sigma_to: Tensor, noise: Tensor) -> Tensor:
    """Standard deviations added, as if they were variances."""
    return process.alpha(sigma_to) / process.alpha(sigma) * x + (sigma_to - sigma) * noise


def without_scaling(process: Process, x: Tensor, sigma: Tensor, sigma_to: Tensor, noise: Tensor) -> Tensor:
    """The signal left as large as it was: right for VE-scaled x only."""
    return x + (sigma_to**2 - sigma**2).sqrt() * noise


@both
@pytest.mark.parametrize("wrong", [noised_by_sigma, noised_by_difference, without_scaling])
def test_wrong_recurrence_does_not(process: Process, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence_module, "renoise", wrong)
    right = wrong is without_scaling and process is VE_SCALED
    assert (with_recurrence(process, "heun", 16) < THRESHOLD) is right


def test_exact_draws_pass_and_unconditional_ones_fail() -> None:
    model, sigma = mixture(VE_SCALED), torch.tensor(0.01, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    exact = model.marginal_sample(N, sigma, torch.full((N,), RARE), generator)
    assert distance(exact, model, sigma, RARE) < 0.7 * THRESHOLD
    assert distance(model.marginal_sample(N, sigma, None, generator), model, sigma, RARE) > THRESHOLD
