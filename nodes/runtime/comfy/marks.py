"""Rules on a clone of a MODEL: marked there, with their networks loaded beside it and their run opened and closed by its sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance import GuidanceRun, check_by_uncond, check_chain
from ....latent_guidance.guidance.base import Rule
from ....latent_guidance.guidance.record import Record
from ....latent_guidance.guidance.report import REPORTS
from ....latent_guidance.process import Process, process_from_alpha
from .branches import OtherModel
from .checks import check_channels, check_guider, check_latents, warn_if_never_asked, warn_if_replaced
from .gradients import unscaled
from .memory import reserve

MARKS = "latent_guidance"
"""Key in model_options and additional_models under which the pack keeps its own."""

IN_STEPS = "latent_guidance_in_steps"
"""Attribute of a guider whose run keeps a report: the records of rules inside its sampler's steps."""


def process_of(model_sampling: Any) -> Process:
    """What x is for a model, read off how its model_sampling mixes signal and noise, whatever class it has."""
    sigma = torch.tensor([0.5])
    zeros, ones = torch.zeros(1), torch.ones(1)
    alpha = float(model_sampling.noise_scaling(sigma, zeros.clone(), ones.clone()))
    noise = float(model_sampling.noise_scaling(sigma, ones.clone(), zeros.clone()))
    if abs(noise - 0.5) > 1e-3:
        raise UserError(
            f"a model whose noise scale at sigma = 0.5 is {noise:.4g}",
            expected="0.5: eps, v, EDM and rectified-flow models",
            mend="use a model of one of these kinds; guidance is not defined for this noising process",
        )
    return process_from_alpha(alpha)


class Mark:
    """A rule that acts on a model. ComfyUI deep-copies model_options; a mark, and the network behind it, stays one."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return self


def rules_on(model_options: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules that guide through ``model_options``."""
    return tuple(mark.rule for mark in model_options.get(MARKS, ()))


def with_networks(
    model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any], others: Sequence[OtherModel] = ()
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that loads and frees the rules' networks and models with itself, and knows what guides it."""
    check_chain((*rules_on(model.model_options), *rules))
    check_latents(model, rules)
    cloned = model.clone()
    loaded = list(cloned.get_additional_models_with_key(MARKS))
    for rule in rules:
        for handle in rule.networks():
            patcher = getattr(handle, "patcher", None)
            if patcher is not None and not any(patcher.is_clone(other) for other in loaded):
                loaded.append(patcher)
    loaded += [other.patcher for other in others]
    if loaded:
        cloned.set_additional_models(MARKS, loaded)
    before = list(cloned.model_options.get(MARKS, ()))
    cloned.model_options[MARKS] = before + [Mark(rule) for rule in rules]
    reserve(cloned, rules_on(cloned.model_options), MARKS)
    return cloned


def _hooks(model_options: Mapping[str, Any]) -> int:
    """How many functions look at the estimate after its branches were combined."""
    return len(model_options.get("sampler_post_cfg_function", ()))


def one_run(
    model: comfy.model_patcher.ModelPatcher,
    rules: Sequence[Any],
    record: Callable[[], Record] | None = None,
    *,
    by_patch: bool = False,
) -> Callable[..., GuidanceRun]:
    """``run(model, model_options, base_scale)``, the rules bound to the sampling in progress.

    An OUTER_SAMPLE wrapper on ``model`` opens and closes it, so that state lives for one sampling, nested ones included. Made of
    closures: ComfyUI deep-copies whatever objects it finds in model_options. ``record`` makes what keeps the report of a sampling, to
    be found by the latents in which the sampling ends. ``by_patch``: whatever guider samples is to ask the rules, and is checked.
    """
    rules = tuple(rules)
    open_runs: list[dict[str, Any]] = []

    def outer_sample(
        executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        patcher = executor.class_obj.model_patcher  # as it is now: nodes after ours may have changed what it samples
        if by_patch:
            check_guider(executor.class_obj, rules)
        check_latents(patcher, rules)
        check_channels(patcher, latent)
        warn_if_replaced(patcher, rules)
        open_runs.append({"hooks": _hooks(executor.class_obj.model_options)})
        outermost = record is not None and not hasattr(executor.class_obj, IN_STEPS)
        if outermost:
            setattr(executor.class_obj, IN_STEPS, [])
        in_steps: list[Record] = []
        try:
            samples = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:
            done = open_runs.pop()
            if outermost:
                in_steps = vars(executor.class_obj).pop(IN_STEPS)
        if by_patch and "run" not in done and len(sigmas) > 1:
            warn_if_never_asked(executor.class_obj, rules)
        if "run" in done and done["run"].record is not None:
            REPORTS.keep(samples, done["run"].record)
        for one in in_steps:
            REPORTS.keep(samples, one)
        return samples

    def run(real_model: Any, model_options: Mapping[str, Any], base_scale: float) -> GuidanceRun:
        here = open_runs[-1] if open_runs else {}
        if "run" not in here:
            if _hooks(model_options) > here.get("hooks", math.inf) and model_options.get("disable_cfg1_optimization"):
                check_by_uncond(rules)  # the sampler listens to the negative's estimate: one of ComfyUI's own *_cfg_pp
            sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
            here["run"] = GuidanceRun(
                rules,
                process_of(real_model.model_sampling),
                sigmas=sigmas,
                base_scale=base_scale,
                unscaled=partial(unscaled, real_model) if hasattr(real_model, "latent_format") else None,
                record=None if record is None else record(),
            )
        return here["run"]

    wrapper = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    model.add_wrapper_with_key(wrapper, f"{MARKS} {id(open_runs)}", outer_sample)
    return run
