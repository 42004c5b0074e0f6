"""Whether a MODEL, a LATENT and a chain of rules fit together: said in words before the first step."""

from __future__ import annotations

import logging
import math
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


THIRD = frozenset({"middle", "empty_negative_prompt"})
"""The third conditions of core's guiders: of Dual CFG Guider, and of Perp-Neg Guider."""


def check_guider(guider: Any, rules: Sequence[Any]) -> None:
    """Refuse rules on a MODEL under a guider of ComfyUI's that would hand them an estimate they do not mean, or none.

    A guider with a third condition (Dual CFG Guider, Perp-Neg Guider) shows a patch one pair of its three estimates, or a mixture that
    is none of CFG's; a gradient can be added to what it shows, and a rule that goes by prompt and negative has no meaning there. Of
    another pack's guider with conditions of its own it is not known which pair it shows, so that is said. A guider of two models asks
    no patch where its cfg is 1.

    Args:
        guider: What samples: a comfy.samplers.CFGGuider.
        rules: Those on its model, without a guider's own.

    Raises:
        UserError: such rules under such a guider.
    """
    by_pair = [rule.node.name for rule in rules if rule.stage is not Stage.GRADIENT]
    further = sorted(set(getattr(guider, "original_conds", ())) - {"positive", "negative"})
    if by_pair and further and not getattr(guider, "shows_the_pair", False):
        _check_further(_guider_name(guider), further, " and ".join(by_pair))
    if hasattr(guider, "uncond_model_patcher") and rules and math.isclose(guider.cfg, 1.0):
        raise UserError(
            f"{' and '.join(rule.node.name for rule in rules)} on a MODEL under {_guider_name(guider)} at cfg 1, where it asks no rule "
            "on its model",
            expected="another cfg, or a guider that does",
            mend="use CFGGuider or the pack's Guider; the rule Autoguidance guides by a second model",
        )


def _check_further(guider: str, further: Sequence[str], rules: str) -> None:
    """Refuse ``rules`` that go by prompt and negative under a third condition of core's; log a warning where others' conditions are met."""
    if third := [name for name in further if name in THIRD]:
        raise UserError(
            f"{rules} on a MODEL under {guider}, which has a third condition ({', '.join(third)}) and combines all three in its own way",
            expected="a guider of a prompt and a negative, such as KSampler or CFGGuider; here, gradient rules alone",
            mend="use the pack's Guider, with the rule Two-Condition Guidance or Perp-Neg before the others in its chain",
        )
    log.warning(
        "%s on a MODEL under %s, which has conditions of its own (%s): the rules act on whatever pair of estimates it shows as prompt and "
        "negative. Gradient rules are added to its answer; for the others the pack's Guider is sure.",
        rules, guider, ", ".join(further),
    )  # fmt: skip


def _guider_name(guider: Any) -> str:
    return f"the guider {type(guider).__name__.removeprefix('Guider_')}"


def warn_if_overridden(cfg: float, scale: float) -> None:
    """Log a warning that another node (core's CFG Override) has set a guider's cfg, which the pack's guider does not go by."""
    log.warning(
        "A node on this MODEL (CFG Override ...) sets cfg to %.4g, and Guider goes by its chain of rules (%.4g). "
        "Let the chain say it: Limited Interval or Guidance Curve after the rule that combines, or use CFGGuider.",
        cfg, scale,
    )  # fmt: skip


def warn_if_never_asked(guider: Any, rules: Sequence[Any]) -> None:
    """Log a warning that ``guider`` has sampled without asking ``rules`` on its model once."""
    log.warning(
        "%s on this MODEL did nothing: %s never asked what is on its model after combining its estimates. "
        "Use KSampler, CFGGuider or the pack's Guider.",
        " and ".join(rule.node.name for rule in rules),
        _guider_name(guider),
    )
