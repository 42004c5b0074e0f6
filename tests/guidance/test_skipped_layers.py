"""Skipped layers: what its pass leaves out, and diffusers' guider beside CFG."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.attention import AttentionPatch
from latent_guidance.guidance import CFG, SkippedLayers
from latent_guidance.guidance.run import GuidanceRun
from latent_guidance.process import RECTIFIED_FLOW

from .conftest import latents

SIGMA = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)


def test_whole_blocks_or_their_attention_alone() -> None:
    assert SkippedLayers(layers="7-9").patch() == AttentionPatch("skip", "7-9")
    assert SkippedLayers(layers="m0", skip="attention").patch() == AttentionPatch("identity", "m0")


def test_parity_with_diffusers_guider_and_not_with_the_first_code_of_stability_ai() -> None:
    guiders = pytest.importorskip("diffusers.guiders")
    cond, uncond, weak = (latents(seed=i) for i in range(3))
    rule = SkippedLayers(scale=2.5)
    run = GuidanceRun([CFG(guidance_scale=4.0), rule], RECTIFIED_FLOW)
    given = {"cond": cond, "uncond": uncond, rule.branches()[0].name: weak}
    ours = run(latents(seed=9), SIGMA, lambda names: {name: given[name] for name in names})
    theirs = guiders.SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_scale=2.5, skip_layer_guidance_layers=[7, 8, 9]
    )
    theirs.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(1))
    torch.testing.assert_close(theirs.forward(cond, uncond, weak).pred, ours, rtol=1e-12, atol=1e-12)
    guided = uncond + 4 * (cond - uncond)
    assert (guided + 2.5 * (guided - weak) - ours).abs().max() > 0.1
