"""Whether a MODEL, a LATENT and a chain of rules fit together: said in words before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.latent_formats
import comfy.model_patcher
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance.base import Stage
from ....latent_guidance.guidance.chains import combining_anew
from ....latent_guidance.guidance.latents import Latents

log = logging.getLogger("latent_guidance")


def latents_of(format: comfy.latent_formats.LatentFormat) -> Latents:
    """What a latent format does to a VAE's latents, measured: formats say it in many ways, and all of them are affine."""
    name = getattr(format, "latent_space", type(format).__name__)
    channels, axes = int(format.latent_channels), int(getattr(format, "latent_dimensions", 2))
    shape = (1, channels, *(1,) * axes)
    try:
        zero, one = (format.process_in(torch.full(shape, value, dtype=torch.float64)).flatten() for value in (0.0, 1.0))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return Latents(name, channels, None)  # one that takes more than a plain tensor; known by its name
    scale = one - zero
    if len(scale) != channels or not (torch.allclose(scale, scale[0]) and torch.allclose(zero, zero[0])):
        return Latents(name, channels, None)
    return Latents(name, channels, float(scale[0]), -float(zero[0] / scale[0]) + 0.0)


def latent_format(model: comfy.model_patcher.ModelPatcher) -> comfy.latent_formats.LatentFormat | None:
    """A MODEL's latent format, with what nodes that change its sampling put in its place; None if it has none."""
    try:
        return model.get_model_object("latent_format")
    except AttributeError:
        return None


def check_latents(model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any]) -> None:
    """Refuse rules made for other latents than the model's."""
    format = latent_format(model)
    for rule in rules if format is not None else ():
        rule.check_latents(latents_of(format))


def check_channels(model: comfy.model_patcher.ModelPatcher, latent: Tensor) -> None:
    """Refuse a LATENT of other channels than the model's, before the network does with words about weights."""
    format = latent_format(model)
    if format is None or latent.is_nested or latent.ndim != int(getattr(format, "latent_dimensions", 2)) + 2:
        return
    if latent.shape[1] != format.latent_channels:
        raise UserError(
            f"a latent of {latent.shape[1]} channels for a model on the latents of {latents_of(format)}",
            expected=f"a latent of {format.latent_channels} channels",
            mend="make it with an empty-latent node of the model's family, or encode the picture with the model's own VAE",
        )


def warn_if_distilled(model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any]) -> None:
    """Log a warning where ``rules``, which compare with a negative, guide a model that has never seen one."""
    config = getattr(model.model, "model_config", None)
    unet = getattr(config, "unet_config", None) or {}
    if unet.get("guidance_embed") or type(config).__name__ == "FluxSchnell":
        log.warning(
            "%s: this model (%s) is distilled. It was trained without an unconditional branch, so a negative means little to it and "
            "the picture may burn. Take the rule out, or set its scale to 1%s; gradient rules such as Classifier Guidance need no "
            "negative.",
            " and ".join(rule.node.name for rule in rules if "uncond" in rule.may_ask())
            or "Guidance against a negative",
            type(config).__name__,
            ", and set the strength in FluxGuidance" if unet.get("guidance_embed") else "",
        )


def warn_if_combined_anew(model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any], before: Sequence[Any]) -> None:
    """Log a warning where rules combine the branches again after other nodes' hooks ``before``, whose work is then lost."""
    anew = combining_anew(rules)
    if anew and before:
        log.warning(
            "%s combines prompt and negative anew, so what a node before it does after their combination (PAG, SAG, Mahiro ...) has no "
            "effect. Put Apply Guidance to Model before that node.",
            " and ".join(anew),
        )


def warn_if_replaced(model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any]) -> None:
    """Log a warning where a rule takes the place of another node's way of combining prompt and negative, which then does nothing."""
    combining = [rule.node.name for rule in rules if rule.stage is Stage.COMBINE]
    if combining and "sampler_cfg_function" in model.model_options:
        log.warning(
            "%s combines prompt and negative in its own way, so another node on this MODEL that does so too (RescaleCFG, RenormCFG ...) "
            "has no effect. Take one of the two out; Rescale Guidance is the rule that goes with %s.",
            *combining,
            *combining,
        )
