"""Guidance rules as a patch on a MODEL, which acts under whatever guider samples it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
from torch import Tensor

from ....latent_guidance.guidance import GuidanceRun, check_on_model, check_order
from ....latent_guidance.guidance.base import Stage, Step
from ....latent_guidance.guidance.record import Record
from ....latent_guidance.guidance.run import no_negative
from ....latent_guidance.process import VE_SCALED
from . import weakened
from .checks import warn_if_combined_anew, warn_if_distilled
from .guider import host_combination, needs_uncond, weakened_passes
from .marks import one_run, rules_on, with_networks


def patch_model(
    model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any], *, report: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that applies ``rules`` after whatever guider samples it has combined its branches.

    Rules that change how the branches meet (CFG, interval) take the place of the guider's own combination; with only gradient and
    post rules it stands, with what other nodes did to it.

    Raises:
        UserError: rules that cannot act together or on this model.
    """
    check_on_model(rules)
    check_order(rules_on(model.model_options), rules)
    warn_if_combined_anew(model, rules, [hook for hook in _after_combination(model) if not _is_ours(hook)])
    compares = needs_uncond(rules)
    if compares:
        warn_if_distilled(model, rules)
    passes = weakened_passes(GuidanceRun(rules, VE_SCALED))
    weakened.check(passes.values(), model.get_model_object("diffusion_model"))
    changes_branches = any(rule.stage is Stage.BRANCHES for rule in rules)
    patched = with_networks(model, rules)
    run = one_run(patched, rules, (lambda: Record("model")) if report else None, by_patch=True)

    def guide(args: dict[str, Any]) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        options, scale = args["model_options"], float(args["cond_scale"])
        bound = run(args["model"], options, scale)

        def evaluate(names: tuple[str, ...]) -> Mapping[str, Tensor]:
            asked = {name: passes[name] for name in names if name in passes}
            further = weakened.evaluate(
                args["model"], args["cond"], asked, args["input"], args["sigma"], options, bound.sigmas
            )
            if "uncond" not in names:
                return {"cond": args["cond_denoised"], **further}
            if args["uncond"] is None:
                raise no_negative(
                    "rules that compare the prompt with a negative one, under a guider that evaluates none",
                    mend="use KSampler, CFGGuider or Guider in the place of BasicGuider",
                )
            return {"cond": args["cond_denoised"], "uncond": args["uncond_denoised"], **further}

        def combine(step: Step) -> Tensor:
            stands = bound.leaves_combination_alone or (
                not changes_branches and bool((step.guidance_scale == scale).all())
            )
            return (
                args["denoised"]
                if stands
                else host_combination(step, args["model"], options, (args["cond"], args["uncond"]))
            )

        return bound(args["input"], args["sigma"], evaluate, host_combine=combine, base_scale=scale)

    guide.latent_guidance = True  # type: ignore[attr-defined]
    patched.set_model_sampler_post_cfg_function(guide, disable_cfg1_optimization=compares)
    return patched


def _after_combination(model: comfy.model_patcher.ModelPatcher) -> list[Any]:
    """What changes the estimate of ``model`` after its branches were combined."""
    return list(model.model_options.get("sampler_post_cfg_function", ()))


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "latent_guidance", False) is True
