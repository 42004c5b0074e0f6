"""A rule that does nothing in a run is said, once, in words: by its window, or because nothing guides; one that acts once is not."""

from __future__ import annotations

import logging

import pytest
import torch

from latent_guidance.guidance import CFG, RULES, ClassifierGuidance, ClassifierMeanShift, GuidanceRun, LimitedInterval
from latent_guidance.guidance.base import Rule, Stage
from latent_guidance.guidance.steps import sampler_options
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import SmallClassifier

SIGMAS = torch.tensor([14.6, 4.0, 1.0, 0.2, 0.0])


def warnings(caplog: pytest.LogCaptureFixture, rule: object, process: Process = VE_SCALED) -> list[str]:
    caplog.clear()
    sigmas = SIGMAS if process is VE_SCALED else SIGMAS / 14.6
    with caplog.at_level(logging.WARNING, logger="latent_guidance"):
        if isinstance(rule, ClassifierMeanShift):
            sampler_options([rule], process, sigmas)
        else:
            GuidanceRun([rule], process, sigmas=sigmas, base_scale=4.0)  # type: ignore[list-item]
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", [ClassifierGuidance, ClassifierMeanShift, LimitedInterval])
def test_a_window_that_never_opens_is_said(
    kind: type, classifier: SmallClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    more = {} if kind is LimitedInterval else {"classifier": classifier, "label": "cat"}
    [message] = warnings(caplog, kind(sigma_lo=1.0, sigma_hi=3.9, **more))
    assert all(words in message for words in (kind.node.name, "never acts", "(1, 3.9]", "14.6", "0.2", "1000"))  # type: ignore[attr-defined]
    assert warnings(caplog, kind(sigma_lo=1.0, sigma_hi=4.0, **more)) == []
    assert warnings(caplog, kind(sigma_lo=0.0, sigma_hi=1000.0, **more)) == []


def test_a_flow_has_no_noise_level_above_one(classifier: SmallClassifier, caplog: pytest.LogCaptureFixture) -> None:
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="cat", sigma_lo=2.0)
    assert warnings(caplog, rule) == []
    [message] = warnings(caplog, rule, RECTIFIED_FLOW)
    assert "from 1 down" in message and "rectified flow" in message


def test_turns_and_the_classifiers_own_range_count(
    classifier: SmallClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    low = {"classifier": classifier, "label": "cat", "sigma_hi": 1.0}
    assert warnings(caplog, ClassifierGuidance(scaling="raw", every_k=2, **low)) == []  # its third turn is at 1.0
    assert len(warnings(caplog, ClassifierGuidance(scaling="raw", every_k=4, **low))) == 1
    untrained = classifier.with_config(log_snr_range=(8.0, 12.0))
    [message] = warnings(caplog, ClassifierGuidance(scaling="raw", classifier=untrained, label="cat"))
    assert "trained at 0.00248 to 0.0183" in message
    assert (
        warnings(caplog, ClassifierGuidance(scaling="raw", classifier=untrained, label="cat", guidance_scale=0.0)) == []
    )


CHANGING = [kind for kind in RULES if kind.stage in (Stage.SCALE, Stage.BRANCHES)]


@pytest.mark.parametrize("kind", CHANGING, ids=lambda kind: kind.node.id)
def test_what_changes_guidance_is_said_where_nothing_guides(kind: type[Rule], caplog: pytest.LogCaptureFixture) -> None:
    def said(*before: Rule, base_scales: tuple[float, ...] = (1.0,) * 4) -> list[str]:
        caplog.clear()
        run = GuidanceRun([*before, kind()], VE_SCALED, sigmas=SIGMAS)
        with caplog.at_level(logging.WARNING, logger="latent_guidance"):
            for sigma, scale in zip(SIGMAS[:-1], base_scales, strict=True):
                found.append(run(x, sigma.expand(2), evaluate, base_scale=scale))
        return [record.getMessage() for record in caplog.records]

    x, cond, found = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []

    def evaluate(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {"cond": cond} | {name: 0.5 * cond for name in names if name != "cond"}

    [message] = said()
    assert message.startswith(f"{kind.node.name} did nothing") and "Classifier-Free Guidance (CFG)" in message
    for estimate in found:  # that the words are true
        torch.testing.assert_close(estimate, cond)
    assert said(base_scales=(1, 1, 7, 1)) == said(base_scales=(4,) * 4) == said(CFG(guidance_scale=4.0)) == []
