"""Recurrence: what it repeats, with which noise, and that once is exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.noise import SeededNoise, brownian_noise_sampler
from latent_guidance.samplers import SAMPLERS, Recurrence, sample_euler

from .test_samplers import PROCESSES, Toy, X, toy_noise

NAMES = ["euler", "euler_ancestral", "heun", "ddim", "ddpm", "ddim_cfg_pp"]
LEVELS = {"ve": [9.0, 2.0, 0.5, 0.0], "flow": [1.0, 0.6, 0.2, 0.0]}
both = pytest.mark.parametrize("process", PROCESSES)
every = pytest.mark.parametrize("name", NAMES)


def run(process: str, name: str, noise: Callable[..., Tensor] | None = None, x: Tensor = X, **options: Any) -> Tensor:
    sigmas = torch.tensor(LEVELS[process], dtype=torch.float64)
    return SAMPLERS[name](Toy(PROCESSES[process]), x * sigmas[0], sigmas, noise_sampler=noise or toy_noise(), **options)


@both
@every
def test_once_is_an_exact_no_op_and_twice_is_not(process: str, name: str) -> None:
    plain = run(process, name)
    assert torch.equal(plain, run(process, name, recurrence=Recurrence()))
    assert torch.equal(plain, run(process, name, recurrence=Recurrence(3, sigma_lo=0.7, sigma_hi=0.71)))
    assert float((plain - run(process, name, recurrence=Recurrence(2))).abs().max()) > 1e-3


@both
@every
def test_a_picture_is_the_same_alone_and_in_a_batch(process: str, name: str) -> None:
    twice = Recurrence(2)
    together = run(process, name, SeededNoise([1, 2], (2, 3), dtype=X.dtype), recurrence=twice)
    alone = run(process, name, SeededNoise([2], (1, 3), dtype=X.dtype), X[1:], recurrence=twice)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-12)


@both
def test_a_repeat_written_out(process: str) -> None:
    """Euler, twice: in VP coordinates z_t = sqrt(a) z_{t-1} + sqrt(1 - a) noise, a = alpha_bar_t / alpha_bar_{t-1}."""
    kind = PROCESSES[process]
    sigma, sigma_next = torch.tensor([[0.7, 0.3]], dtype=torch.float64)[0]
    noise = toy_noise()(0, 0)

    def step(x: Tensor) -> Tensor:
        return x + (sigma_next - sigma) * (x - Toy(kind)(x, sigma.expand(2))) / sigma

    abar, abar_next = kind.alphas_cumprod(sigma), kind.alphas_cumprod(sigma_next)
    z = kind.unit_scale(sigma_next) * step(X)
    back = ((abar / abar_next).sqrt() * z + (1 - abar / abar_next).sqrt() * noise) / kind.unit_scale(sigma)
    found = sample_euler(
        Toy(kind), X, torch.stack([sigma, sigma_next]), noise_sampler=toy_noise(), recurrence=Recurrence(2)
    )
    torch.testing.assert_close(found, step(back), rtol=0, atol=1e-12)
    assert float((found - step(step(X))).abs().max()) > 1e-2


@every
def test_noise_of_a_path_is_refused_where_a_step_is_repeated(name: str) -> None:
    """Its noise back over a step is the step's own, so no repeat would see anything new."""
    path = brownian_noise_sampler(X, 0.5, 9.0, seeds=[1, 2])
    assert torch.equal(path(0.5, 2.0), -path(2.0, 0.5))
    assert torch.equal(run("ve", name, path), run("ve", name, path, recurrence=Recurrence()))
    with pytest.raises(UserError, match=r"Brownian path.*same at every repeat"):
        run("ve", name, path, recurrence=Recurrence(2))


def visited(process: str, recurrence: Recurrence) -> tuple[list[float], list[int]]:
    """The levels at which the denoiser was called, and the steps that were reported."""
    denoiser, steps = Toy(PROCESSES[process]), []
    sigmas = torch.tensor(LEVELS[process], dtype=torch.float64)
    sample_euler(denoiser, X, sigmas, callback=lambda i, *_: steps.append(i), recurrence=recurrence)
    return [float(sigma[0]) for _, sigma, _ in denoiser.calls], steps


def test_the_window_is_open_below_and_closed_above_and_every_repeat_is_reported() -> None:
    assert visited("ve", Recurrence(3)) == ([9.0] * 3 + [2.0] * 3 + [0.5] * 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert visited("ve", Recurrence(2, sigma_lo=0.5, sigma_hi=2.0)) == ([9.0, 2.0, 2.0, 0.5], [0, 1, 1, 2])


def test_a_step_from_pure_noise_is_not_repeated() -> None:
    assert visited("flow", Recurrence(2)) == ([1.0, 0.6, 0.6, 0.2, 0.2], [0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": 0}, "recurrence of 0 times.*at least 1"),
        ({"times": 1.5}, "recurrence of 1.5 times"),
        ({"times": 2, "sigma_lo": -1.0}, "sigma_lo = -1"),
        ({"times": 2, "sigma_lo": 2.0, "sigma_hi": 2.0}, "never opens"),
        ({"times": 2, "sigma_hi": math.nan}, "never opens"),
    ],
)
def test_bad_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recurrence(**options)
