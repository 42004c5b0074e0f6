"""Guidance by a log-probability of the noisy latent: Bayes' rule on a mixture, and what is refused."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import GuidanceRun, Guider, LogProbGuidance, log_prob
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import latents
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


class Answers:
    """A log-probability that answers whatever it is told to."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.answer = answer

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.answer(x)


def guided(loss: Any, **knobs: Any) -> Tensor:
    """What the rule makes of the estimate tanh(x), for three samples at different levels."""
    x, sigma = latents(), torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    run = GuidanceRun([LogProbGuidance(loss=loss, **knobs)], VE_SCALED)
    return run(x, sigma, lambda names: dict.fromkeys(names, torch.tanh(x)))


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def test_a_detached_answer_is_refused_by_name() -> None:
    for answer in (lambda x: mean(x.detach()), lambda x: mean(x).detach(), lambda x: mean(x).round().long()):
        with pytest.raises(UserError, match=r"the loss Answers, whose answer has no gradient.*\.detach\(\)"):
            guided(Answers(answer))
    assert torch.isfinite(guided(Answers(mean))).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_sample_whose_answer_is_not_finite_goes_unguided_and_the_loss_is_named(
    broken: float, caplog: pytest.LogCaptureFixture
) -> None:
    out = guided(Answers(lambda x: mean(x) + torch.tensor([0.0, broken, 0.0], dtype=x.dtype)))
    healthy, plain = guided(Answers(mean)), torch.tanh(latents())
    assert torch.equal(out[1], plain[1]) and torch.equal(out[::2], healthy[::2]) and not torch.equal(out[0], plain[0])
    [record] = caplog.records
    words = ("Log-Probability Guidance", "the loss Answers at sample 1", "sigma 0.6")
    assert all(word in record.getMessage() for word in words)


def test_a_nan_in_the_gradient_alone_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    """The root of 0 is 0, and its slope 0 / 0."""
    out = guided(Answers(lambda x: mean((x - x).square()).sqrt()))
    assert torch.equal(out, torch.tanh(latents()))
    assert "the loss Answers at sample 0, 1, 2" in caplog.text


def test_the_example_of_the_docs_runs_as_it_is_written_and_brightens() -> None:
    [code] = re.findall(r"^    class .*?(?=\n\n\S)", log_prob.__doc__ or "", flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(code), "log_prob.py", "exec"), names)
    bright, plain = names["Bright"](), torch.tanh(latents())
    for scale, way in ((0.5, 1), (-0.5, -1)):
        change = guided(bright, guidance_scale=scale) - plain
        assert (way * mean(change) > 1e-2).all()
