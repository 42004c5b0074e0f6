"""Losses and the rules that follow them, as nodes on the embedded runtime, in inference mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.models.tiny import make_tiny_picture_clip

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


def test_a_text_is_followed_by_a_clip_on_pictures(embedded: Nodes, models_folder: Path) -> None:
    make_tiny_picture_clip(models_folder / "clip_vision" / "inner" / "tiny")
    loader: Any = embedded["LGLoadPictureCLIP"]
    assert "inner/tiny" in loader.INPUT_TYPES()["required"]["picture_clip"][0]
    (clip,) = call(embedded, "LGLoadPictureCLIP", picture_clip="inner/tiny")
    assert any(parameter.is_inference() for parameter in clip.network.parameters())
    things = everything(embedded)
    (loss,) = call(embedded, "LGLossCLIPText", clip=clip, texts="a red apple | blurry:-0.5", crops=4)
    (rules,) = call(embedded, "LGMPGD", loss=loss, vae=things["vae"], guidance_scale=0.3)
    values = []
    for chain in (None, rules):
        samples = sample(things, rules=chain)
        (image,) = call(embedded, "LGVAEDecode", samples={"samples": samples}, vae=things["vae"])
        values.append(float(loss(image.movedim(-1, 1) * 2 - 1)))
    assert values[1] < values[0]
    assert torch.equal(samples, sample(things, rules=rules))
    with pytest.raises(UserError, match="models/clip_vision"):
        call(embedded, "LGLoadPictureCLIP", picture_clip="nothing")
    with pytest.raises(UserError, match="outside ComfyUI"):
        call(embedded, "LGPictureCLIP", clip_vision=None, clip=None)
