"""Every rule on latents of one and of sixteen channels, of an odd ratio, and of videos; those that take no video are listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import RULES, Rule, Stage
from latent_guidance.guidance.knobs import Socket, knobs
from latent_guidance.guidance.loss_rule import LossRule
from latent_guidance.guidance.losses import Symmetry
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import Config, SmallClassifier, SmallCLIP, drawn
from .test_conformance import SIGMAS, chain, make, stepped, two_calls
from .test_losses import SmallVae

SHAPES = [(1, 24, 40), (16, 6, 5), (1, 3, 6, 5), (16, 2, 5, 7)]
"""Of one sample: (C, H, W), and a video's (C, T, H, W)."""
NO_VIDEO = {"ClassifierGuidance", "ClassifierMeanShift", "ClassifierPostStep", "NoisyCLIPGuidance"}
"""Rules that refuse videos whatever their settings: their networks read pictures."""


def rule_for(rule_class: type[Rule], channels: int) -> Rule:
    """The rule at its defaults; networks on noisy latents are given those of that many channels."""
    networks: dict[str, Any] = {"LG_CLASSIFIER": SmallClassifier, "LG_NOISY_CLIP": SmallCLIP}
    given = {
        name: networks[knob.type](Config(latent_channels=channels))
        for name, knob in knobs(rule_class).items()
        if isinstance(knob, Socket) and knob.type in networks
    }
    return make(rule_class, **given)


def result(rule_class: type[Rule], process: Process, x: Tensor, pictures: slice = slice(None)) -> Tensor:
    """What the rule makes of some pictures of the batch x (3, ...), (N, B, ...) for N calls of one run."""
    rule = rule_for(rule_class, x.shape[1])
    if rule.stage is Stage.STEP:
        return stepped([rule], process, x, pictures)[None]
    return two_calls(chain(rule), process, x[pictures], SIGMAS[pictures], apart=1.0)


def refuses(rule_class: type[Rule], shape: tuple[int, ...]) -> bool:
    return len(shape) > 3 and rule_class.__name__ in NO_VIDEO


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule_class", RULES)
def test_every_rule_keeps_every_shape_and_its_samples_apart(
    rule_class: type[Rule], shape: tuple[int, ...], process: Process
) -> None:
    x = drawn(3, *shape)
    if refuses(rule_class, shape):
        with pytest.raises(UserError, match=r"latent of shape .*Expected: \(batch, .*height, width\)"):
            result(rule_class, process, x)
        return
    together = result(rule_class, process, x)
    assert together.shape[1:] == x.shape and torch.isfinite(together).all()
    for i in range(3):
        alone = result(rule_class, process, x, slice(i, i + 1))
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_the_rules_that_take_no_video_are_these_and_no_others() -> None:
    refused = set()
    for rule_class in RULES:
        try:
            result(rule_class, VE_SCALED, drawn(3, 4, 2, 6, 5))
        except UserError:
            refused.add(rule_class.__name__)
    assert refused == NO_VIDEO


def test_rules_that_follow_a_loss_on_pictures_take_no_video_either() -> None:
    """By their loss: on latents the same rules take any shape, as above."""
    for rule_class in RULES:
        if issubclass(rule_class, LossRule):
            rule = rule_class(loss=Symmetry(), vae=SmallVae())  # type: ignore[call-arg]
            with pytest.raises(UserError, match="loss on pictures"):
                rule.check_shape((3, 4, 2, 6, 5))
            rule.check_shape((3, 4, 6, 5))
