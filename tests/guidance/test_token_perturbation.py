"""Token perturbation: its shuffle is a permutation of the prompt's own pass, with another seed another one."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.attention import AttentionPatch
from latent_guidance.errors import UserError
from latent_guidance.guidance import Guider, TokenPerturbation

from .networks import SIGMA, noisy, small_denoiser, words


def test_its_patch_and_its_seed() -> None:
    assert TokenPerturbation(seed=7).patch() == AttentionPatch("shuffle", "down", seed=7)
    with pytest.raises(UserError, match="seed of Token Perturbation"):
        TokenPerturbation(seed=-1)


def test_another_seed_and_another_step_give_another_estimate() -> None:
    denoiser, x = small_denoiser(), noisy()
    sigmas = torch.tensor([8.0, 2.0, 1.0, 0.0])

    def estimate(seed: int, levels: torch.Tensor) -> torch.Tensor:
        return Guider(denoiser, [TokenPerturbation(seed=seed)]).begin(levels)(x, SIGMA, words(1))

    first = estimate(0, sigmas)
    assert torch.equal(first, estimate(0, sigmas))
    assert (first - estimate(1, sigmas)).abs().max() > 1e-3
    assert (first - estimate(0, sigmas[1:])).abs().max() > 1e-3  # the same level as the first step of a run
