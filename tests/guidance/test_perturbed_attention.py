"""Perturbed attention: what its pass is made of, and diffusers' guider, right beside CFG and another method without."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.attention import AttentionPatch
from latent_guidance.guidance import CFG, PerturbedAttention, SkippedLayers
from latent_guidance.guidance.run import GuidanceRun
from latent_guidance.process import VE_SCALED

from .conftest import latents

SIGMA = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)


def test_its_pass_is_that_of_the_prompt_with_the_identity_for_attention() -> None:
    [branch] = PerturbedAttention(layers="d0").branches()
    assert (branch.cond, branch.model, branch.patch) == ("cond", None, AttentionPatch("identity", "d0"))
    assert PerturbedAttention().patch() == SkippedLayers(skip="attention").patch() != SkippedLayers().patch()


@pytest.mark.parametrize(("w", "s"), [(4.0, 3.0), (1.0, 3.0), (7.5, 1.0)])
def test_parity_with_diffusers_guider(w: float, s: float) -> None:
    """Beside CFG; without it diffusers' starts at the perturbed estimate, so that its s is ours plus 1."""
    guiders = pytest.importorskip("diffusers.guiders")
    cond, uncond, weak = (latents(seed=i) for i in range(3))
    rule = PerturbedAttention(scale=s)
    run = GuidanceRun([CFG(guidance_scale=w), rule], VE_SCALED)
    given = {"cond": cond, "uncond": uncond, rule.branches()[0].name: weak}
    ours = run(latents(seed=9), SIGMA, lambda names: {name: given[name] for name in names})
    theirs = guiders.PerturbedAttentionGuidance(
        guidance_scale=w, perturbed_guidance_scale=s, perturbed_guidance_layers=[0], perturbed_guidance_start=0.0
    )
    theirs.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(1))
    found = theirs.forward(cond, uncond, weak).pred
    if w == 1:
        assert (found - ours).abs().max() > 0.1
        torch.testing.assert_close(found + (cond - weak), ours, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(found, ours, rtol=1e-12, atol=1e-12)
