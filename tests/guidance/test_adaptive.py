"""Adaptive guidance: when it stops, for whom, what is no longer paid for, and that nothing survives the run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latent_guidance.denoiser import Cond
from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, AdaptiveGuidance, GuidanceRun, Guider, LimitedInterval
from latent_guidance.guidance.adaptive import agreement
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.samplers import sample_euler, sample_heun

from .test_oracles import NONE, draws, labels_of, mixture

GRID = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
W = 3.0


class Turning:
    """Branches of unit length whose angle, for each sample, is that sample's own multiple of sigma; remembers the calls."""

    process: Process = VE_SCALED

    def __init__(self, speeds: list[float]) -> None:
        self.speeds = torch.tensor(speeds, dtype=torch.float64)
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        assert isinstance(cond, Tensor)
        self.batches.append(x.shape[0])
        angle = self.speeds.repeat(x.shape[0] // len(self.speeds)) * sigma * cond[:, 0]
        return torch.stack([angle.cos(), angle.sin()], dim=1).reshape(-1, 1, 1, 2)


def positive(batch: int = 1) -> Tensor:
    return torch.zeros(batch, 1, dtype=torch.float64)


NEGATIVE = torch.ones(1, 1, dtype=torch.float64)


def steps(model: Turning, rules: list, sigmas: Tensor = GRID) -> list[Tensor]:
    """The guided estimates at every noise level of one run."""
    run = Guider(model, rules, uncond=NEGATIVE).begin(sigmas)
    x = torch.zeros(len(model.speeds), 1, 1, 2, dtype=torch.float64)
    return [run(x, sigma.expand(len(x)), positive()) for sigma in sigmas[:-1]]


def test_agreement_is_the_cosine_of_each_sample() -> None:
    a = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 2.0]], [[0.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[[6.0, 8.0]], [[0.0, 5.0]], [[-1.0, -2.0]], [[1.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(agreement(a, b), torch.tensor([1.0, 0.0, -1.0, 0.0]).double(), rtol=0, atol=1e-15)
    assert float(agreement(a.float() * 1e3, a.float() * 1e3).max()) <= 1.0


def test_the_step_after_the_first_agreement_goes_by_the_prompt_alone_and_pays_for_one_pass() -> None:
    """cos(0.1 sigma) at 4, 3, 2, 1, 0.5 is 0.921, 0.955, 0.980, 0.995, 0.999."""
    cond = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    for threshold, passes in ((0.9, [2, 1, 1, 1, 1]), (0.97, [2, 2, 2, 1, 1]), (0.99, [2, 2, 2, 2, 1]), (1.0, [2] * 5)):
        model = Turning([0.1])
        outs = steps(model, [CFG(guidance_scale=W), AdaptiveGuidance(threshold=threshold)])
        plain = steps(Turning([0.1]), [CFG(guidance_scale=W)])
        assert model.batches == passes
        for out, full, paid in zip(outs, plain, passes, strict=True):
            assert torch.equal(out, full if paid == 2 else cond) and not torch.equal(full, cond)


def test_a_sample_that_agrees_stops_by_itself_and_the_pass_is_saved_when_all_do() -> None:
    """The public node takes the cosine of the whole batch as one vector: there one sample stops the other or waits for it."""
    rules = [CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.97)]
    model = Turning([0.1, 0.2])  # agree at sigma = 2 and at sigma = 1
    together = steps(model, rules)
    assert model.batches == [4, 4, 4, 4, 2]
    alone = [steps(Turning([speed]), rules) for speed in (0.1, 0.2)]
    for i, out in enumerate(together):
        assert torch.equal(out, torch.cat([alone[0][i], alone[1][i]]))
    as_one_vector = [math.cos(0.1 * s) + math.cos(0.2 * s) > 2 * 0.97 for s in (4, 3, 2, 1)]
    assert as_one_vector == [False, False, False, True], "where the first sample would have had to wait"


def test_once_agreed_it_stays_so_for_the_run_even_if_the_branches_part_again() -> None:
    model = Turning([0.1])
    steps(model, [CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.99)], torch.tensor([1.0, 9.0, 8.0, 0.0]).double())
    assert model.batches == [2, 1, 1]


def test_two_runs_are_identical_and_the_second_starts_guided() -> None:
    model, rules = Turning([0.1, 0.2]), [CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.97)]
    guider = Guider(model, rules, uncond=NEGATIVE)
    x = torch.ones(2, 1, 1, 2, dtype=torch.float64)
    for sample in (sample_euler, sample_heun):
        model.batches.clear()
        first = sample(guider, x, GRID, positive())
        paid = list(model.batches)
        assert torch.equal(sample(guider, x, GRID, positive()), first) and model.batches == paid * 2
        assert paid[0] == 4 and paid[-1] == 2
        plain = Guider(model, rules[:1], uncond=NEGATIVE)
        assert not torch.allclose(sample(plain, x, GRID, positive()), first, atol=1e-3)


def test_outside_an_interval_it_looks_at_nothing_and_pays_for_nothing() -> None:
    model = Turning([0.1])
    window = LimitedInterval(sigma_lo=0.4, sigma_hi=2.5)
    steps(model, [CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.99), window])
    assert model.batches == [1, 1, 2, 2, 1]  # at sigma = 3 and 4 outside; it agrees at 1


def test_a_batch_of_another_size_starts_anew() -> None:
    run = GuidanceRun([CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.5)], VE_SCALED)
    asked: list[int] = []
    for batch, level in ((1, 4.0), (1, 3.0), (2, 2.0), (2, 1.0)):
        one = torch.ones(batch, 1, 1, 2, dtype=torch.float64)

        def evaluate(names: tuple[str, ...], one: Tensor = one) -> dict[str, Tensor]:
            asked.append(len(names))
            return dict.fromkeys(names, one)

        run(one, torch.full((batch,), level, dtype=torch.float64), evaluate)
    assert asked == [2, 1, 2, 1]


def test_a_step_that_is_evaluated_again_is_guided_again() -> None:
    """It is the same step: a network that changes what autograd has kept is evaluated twice, and both times as the run stands."""
    run = GuidanceRun([CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.5)], VE_SCALED)
    one, asked = torch.ones(1, 1, 1, 2, dtype=torch.float64), []

    def evaluate(names: tuple[str, ...]) -> dict[str, Tensor]:
        asked.append(len(names))
        return dict.fromkeys(names, one)

    for level in (4.0, 4.0, 3.0, 3.0):
        run(one, torch.full((1,), level, dtype=torch.float64), evaluate)
    assert asked == [2, 2, 1, 1]


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_on_a_mixture_it_follows_cfg_until_the_cosine_of_the_exact_estimates_passes(process: Process) -> None:
    top = 0.95 if process is RECTIFIED_FLOW else 8.0
    sigmas = torch.cat([torch.linspace(top, 0.05, 14, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x, model, threshold = draws() * top, mixture(process), 0.99
    agreed = torch.zeros(64, dtype=torch.bool)
    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        level = sigma.expand(64)
        cond, uncond = model(expected, level, labels_of(1)), model(expected, level, labels_of(NONE))
        guided = torch.where(agreed.reshape(-1, 1, 1, 1), cond, uncond + W * (cond - uncond))
        flat = [estimate.flatten(1) for estimate in (cond, uncond)]
        cosine = (flat[0] * flat[1]).sum(1) / (flat[0].norm(dim=1) * flat[1].norm(dim=1))
        agreed |= cosine > threshold
        expected = expected + (expected - guided) / sigma * (sigma_next - sigma)
    rules = [CFG(guidance_scale=W), AdaptiveGuidance(threshold=threshold)]
    ours = sample_euler(Guider(model, rules, uncond=labels_of(NONE)), x, sigmas, labels_of(1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert agreed.any()
    for other in ([CFG(guidance_scale=W)], [CFG(guidance_scale=W), AdaptiveGuidance(threshold=0.9)]):
        wrong = sample_euler(Guider(model, other, uncond=labels_of(NONE)), x, sigmas, labels_of(1))
        assert not torch.allclose(wrong, expected, rtol=0, atol=1e-3)


def test_a_threshold_out_of_its_range_is_refused() -> None:
    for threshold in (-0.1, 1.1, math.nan, None):
        with pytest.raises(UserError, match="threshold of Adaptive Guidance"):
            AdaptiveGuidance(threshold=threshold)  # type: ignore[arg-type]
