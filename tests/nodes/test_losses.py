"""Losses and the rules that follow them, as nodes on the embedded runtime, in inference mode."""

from __future__ import annotations

import pytest
import torch

from latent_guidance.errors import UserError

from .test_nodes import Nodes, apart, as_a_node, call, everything, sample  # noqa: F401  (a fixture)


def picture() -> torch.Tensor:
    """A red square on white, (1, 64, 64, 3) in [0, 1]."""
    drawn = torch.ones(1, 64, 64, 3)
    drawn[:, 16:48, 16:48, 1:] = 0
    return drawn


@pytest.mark.parametrize("rule", ["LGMPGD", "LGDPS", "LGFreeDoM"])
def test_a_reference_is_followed(embedded: Nodes, rule: str) -> None:
    things = everything(embedded)
    (latent,) = call(embedded, "LGVAEEncode", image=picture(), vae=things["vae"], posterior="mode", seed=0)
    (loss,) = call(embedded, "LGLossReference", reference=latent)
    (rules,) = call(embedded, rule, loss=loss)
    plain, guided = sample(things), sample(things, rules=rules)
    assert float(loss(guided)) < 0.8 * float(loss(plain))
    assert torch.equal(guided, sample(things, rules=rules))


def test_a_palette_is_followed_through_the_vae(embedded: Nodes) -> None:
    things = everything(embedded)
    (loss,) = call(embedded, "LGLossPalette", colours="#ff8000")
    (cfg,) = call(embedded, "LGCFG", guidance_scale=2.0)
    for rule in ("LGMPGD", "LGDPS"):
        (rules,) = call(embedded, rule, loss=loss, vae=things["vae"], rules=cfg)
        values = []
        for chain in (cfg, rules):
            (image,) = call(
                embedded, "LGVAEDecode", samples={"samples": sample(things, rules=chain)}, vae=things["vae"]
            )
            values.append(float(loss(image.movedim(-1, 1) * 2 - 1)))
        assert values[1] < values[0]


def test_a_leaf_rule_acts_on_a_model_and_one_through_the_denoiser_is_refused_there(embedded: Nodes) -> None:
    things = everything(embedded)
    (latent,) = call(embedded, "LGVAEEncode", image=picture(), vae=things["vae"], posterior="mode", seed=0)
    (loss,) = call(embedded, "LGLossReference", reference=latent)
    (rules,) = call(embedded, "LGMPGD", loss=loss)
    (patched,) = call(embedded, "LGApplyGuidance", model=things["model"], rules=rules)
    assert apart(sample(things, rules=rules), sample(things, model=patched)) <= 1e-5
    (rules,) = call(embedded, "LGDPS", loss=loss)
    with pytest.raises(UserError, match="connect the rule to Guider"):
        call(embedded, "LGApplyGuidance", model=things["model"], rules=rules)


def test_a_vae_of_other_latents_is_refused_before_the_first_step(embedded: Nodes) -> None:
    (loss,) = call(embedded, "LGLossPalette")
    with pytest.raises(UserError, match="without a VAE"):
        call(embedded, "LGMPGD", loss=loss)
