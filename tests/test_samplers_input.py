"""What samplers refuse, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.samplers import SAMPLERS, sample_ddpm

X = torch.tensor([[0.3, -1.1, 0.7], [-0.4, 1.6, 0.05]], dtype=torch.float64)

every = pytest.mark.parametrize("name", SAMPLERS)


class Plain:
    """A denoiser that predicts no variance."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return 0.5 * x

    def with_uncond(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self(x, sigma, cond), 0.25 * x


@every
@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        (torch.tensor([1.0]), r"shape \(1,\)"),
        (torch.tensor([[1.0, 0.0]]), r"shape \(1, 2\)"),
        (torch.tensor([]), r"shape \(0,\)"),
        (torch.tensor([0.5, 0.9, 0.0]), r"0\.5, 0\.9, 0.*descending"),
        (torch.tensor([0.5, 0.5, 0.0]), "descending.*fewer steps"),
        (torch.tensor([0.5, -0.1]), "none below 0"),
        (torch.tensor([math.nan, 0.0]), "finite"),
        (torch.tensor([math.inf, 0.0]), "finite"),
        ([1.0, 0.0], "list"),
    ],
)
def test_bad_sigmas(name: str, sigmas: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SAMPLERS[name](Plain(VE_SCALED), X, sigmas)


@every
def test_flow_sigmas_end_at_one(name: str) -> None:
    with pytest.raises(UserError, match=r"14\.6.*rectified flow.*at most 1"):
        SAMPLERS[name](Plain(RECTIFIED_FLOW), X, torch.tensor([14.6, 1.0, 0.0]))
    SAMPLERS[name](Plain(RECTIFIED_FLOW), X, torch.tensor([1.000001, 0.5, 0.0]))  # rounding is no mistake


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_noise_of_another_shape(name: str) -> None:
    with pytest.raises(UserError, match=r"\(1, 3\).*\(2, 3\)"):
        SAMPLERS[name](Plain(VE_SCALED), X, torch.tensor([1.0, 0.5, 0.0]), noise_sampler=lambda *_: torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("euler_ancestral", {"eta": 1.5}, "eta = 1.5.*0 to 1"),
        ("ddim", {"eta": -0.1}, "eta = -0.1"),
        ("ddim_cfg_pp", {"eta": 1.1}, "eta = 1.1"),
        ("rectified_cfg_pp", {"scale": -1.0}, "scale = -1"),
        ("rectified_cfg_pp", {"gamma": -1.0}, "gamma = -1"),
        ("rectified_cfg_pp", {}, "Rectified-CFG.* on a model of VE-scaled.*CFG.* sampler"),
        ("dpmpp_2m_sde", {"eta": -1.0}, "eta = -1"),
        ("dpmpp_2m_sde", {"solver_type": "rk4"}, "'rk4'.*midpoint"),
        ("heun", {"s_churn": -1.0}, "s_churn"),
        ("ddpm", {"variance": "fixed"}, "'fixed'.*beta_tilde"),
        ("ddpm", {"mean_shift_at": "mean"}, "'mean'.*x_t"),
        ("ddpm", {"mean_shift": lambda x, sigma: x[:1]}, r"\(1, 3\).*\(2, 3\)"),
    ],
)
def test_bad_options(name: str, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SAMPLERS[name](Plain(VE_SCALED), X, torch.tensor([1.0, 0.5, 0.0]), **options)


def test_learned_range_needs_a_network_that_learned_it() -> None:
    with pytest.raises(UserError, match=r"learned_range.*beta_tilde"):
        sample_ddpm(Plain(VE_SCALED), X, torch.tensor([1.0, 0.0]), variance="learned_range")
