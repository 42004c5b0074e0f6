"""Guidance by a log-probability of the noisy latent: Bayes' rule on a mixture, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import Guider, LogProbGuidance
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .test_oracles import NONE, draws, labels_of, mixture


class InClass:
    """The mixture's own log p(y | x), in the process's own coordinates."""

    def __init__(self, process: Process) -> None:
        self.mixture = mixture(process)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mixture.log_prob(x, sigma, labels_of(1, len(x)))


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_the_exact_log_probability_at_scale_one_is_conditioning(process: Process) -> None:
    x, sigma, model = draws(), torch.full((64,), 0.6, dtype=torch.float64), mixture(process)
    exact, truth = model(x, sigma, labels_of(1)), InClass(process)
    with torch.inference_mode():
        for scale, right in ((1.0, True), (1.1, False), (-1.0, False)):
            rule = LogProbGuidance(loss=truth, guidance_scale=scale, scaling="raw")
            guided = Guider(model, [rule])(x, sigma, labels_of(NONE))
            assert torch.allclose(guided, exact, rtol=0, atol=1e-10) == right


def test_what_cannot_be_followed_is_refused() -> None:
    class AtTheEstimate:
        space = "latent"

        def __call__(self, estimate: Tensor) -> Tensor:
            return estimate.flatten(1).sum(dim=1)

    with pytest.raises(UserError, match="has no log_prob"):
        LogProbGuidance(loss=AtTheEstimate())

    class Wrong:
        def log_prob(self, x: Tensor, sigma: Tensor) -> Any:
            return x.mean()

    with torch.inference_mode():
        kept = LogProbGuidance(loss=InClass(VE_SCALED), guidance_scale=1.0)  # its tensors are those of a node
        with pytest.raises(UserError, match=r"InClass.*clone"):
            Guider(mixture(VE_SCALED), [kept])(draws(), torch.full((64,), 0.6, dtype=torch.float64), labels_of(NONE))

    rule = LogProbGuidance(loss=Wrong())
    with pytest.raises(UserError, match=r"Wrong.*shape \(\)"):
        Guider(mixture(VE_SCALED), [rule])(draws(), torch.full((64,), 0.6, dtype=torch.float64), labels_of(NONE))
