"""Guidance rules inside ComfyUI: as a GUIDER, and as a patch on a MODEL that acts under any guider.

Both hand the branches' estimates to the library's GuidanceRun. Nothing here is a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance import Branch, GuidanceRun, check_chain, check_on_model
from ....latent_guidance.guidance.base import Rule, Stage, Step, network_key
from ....latent_guidance.guidance.cfg import cfg
from ....latent_guidance.guidance.passes import Passes, noise_range, passes
from ....latent_guidance.guidance.record import Record
from ....latent_guidance.guidance.report import REPORTS
from ....latent_guidance.guidance.weakened import WeakenedPass
from ....latent_guidance.process import VE_SCALED, Process, process_from_alpha
from . import weakened
from .branches import OtherModel, asked_branches, check_hooks, check_model, other_models, own_conditions
from .branches import evaluate as evaluate_branches
from .checks import check_channels, check_latents, warn_if_distilled, warn_if_replaced
from .gradients import normal_conds, through, unscaled

MARKS = "latent_guidance"
"""Key in model_options and additional_models under which the pack keeps its own."""


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


def networks_in(model_options: Mapping[str, Any]) -> dict[str | int, str]:
    """Key of every network that guides through ``model_options`` -> name of the rule that uses it."""
    return {network_key(handle): rule.node.name for rule in rules_on(model_options) for handle in rule.networks()}


def _with_networks(
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
    return cloned


def _one_run(
    model: comfy.model_patcher.ModelPatcher, rules: Sequence[Any], record: Callable[[], Record] | None = None
) -> Callable[..., GuidanceRun]:
    """``run(model, model_options, base_scale)``, the rules bound to the sampling in progress.

    An OUTER_SAMPLE wrapper on ``model`` opens and closes it, so that state lives for one sampling, nested ones included. Made of
    closures: ComfyUI deep-copies whatever objects it finds in model_options. ``record`` makes
    what keeps the report of a sampling, to be found by the latents in which the sampling ends.
    """
    rules = tuple(rules)
    open_runs: list[dict[str, GuidanceRun]] = []

    def outer_sample(executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
        patcher = executor.class_obj.model_patcher  # as it is now: nodes after ours may have changed what it samples
        check_latents(patcher, rules)
        check_channels(patcher, latent)
        warn_if_replaced(patcher, rules)
        open_runs.append({})
        try:
            samples = executor(noise, latent, *args, **kwargs)
        finally:
            done = open_runs.pop()
        if "run" in done and done["run"].record is not None:
            REPORTS.keep(samples, done["run"].record)
        return samples

    def run(real_model: Any, model_options: Mapping[str, Any], base_scale: float) -> GuidanceRun:
        here = open_runs[-1] if open_runs else {}
        if "run" not in here:
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


def _needs_uncond(rules: Sequence[Any]) -> bool:
    return GuidanceRun(rules, VE_SCALED).may_need_uncond


def _scale(step: Step) -> float | Tensor:
    """w of a step as ComfyUI's hooks take it: one number, or (B, 1, 1, 1) where it differs inside the batch."""
    w = step.guidance_scale
    return float(w[0]) if bool((w == w[0]).all()) else w.reshape(-1, *(1,) * (step.x.ndim - 1))


def _host_combination(step: Step, model: Any, options: Mapping[str, Any], conds: Sequence[Any]) -> Tensor:
    """How ComfyUI combines the branches: another node's sampler_cfg_function if there is one, else plain CFG."""
    cond, scale, x = step.cond_denoised, _scale(step), step.x
    uncond = step.estimates.get("uncond")
    if "sampler_cfg_function" not in options:
        return cond if uncond is None else cfg(cond, uncond, step.guidance_scale)
    zeros = torch.zeros_like(cond) if uncond is None else uncond
    args = {
        "cond": x - cond,
        "uncond": x - zeros,
        "cond_scale": scale,
        "timestep": step.sigma,
        "input": x,
        "sigma": step.sigma,
        "cond_denoised": cond,
        "uncond_denoised": zeros,
        "model": model,
        "model_options": options,
        "input_cond": conds[0],
        "input_uncond": conds[1],
    }
    return x - options["sampler_cfg_function"](args)


class Guider(comfy.samplers.CFGGuider):
    """ComfyUI's guider with a chain of rules in the place of its one formula. Make it with :func:`make_guider`."""

    others: Sequence[OtherModel] = ()
    """The models that rules bring, beside the guider's own."""
    weakened: Mapping[str, Branch] = MappingProxyType({})
    """The weakened passes of the positive condition that rules ask for, by name."""
    rules: Sequence[Any] = ()
    """The guider's own chain, without what is on its model."""

    def entries(self) -> dict[str, int]:
        """How many network passes each branch is made of: one for every entry of its condition."""
        counts = {name: len(conds) for name, conds in self.original_conds.items()}
        counts |= {name: counts[cond] for other in self.others for name, cond in other.conds.items() if cond in counts}
        counts |= dict.fromkeys(self.weakened, counts["positive"])
        return counts | {"cond": counts["positive"], "uncond": counts.get("negative", 1)}

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Any,
        device: Any,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Any,
        callback: Any,
        disable_pbar: Any,
        seed: Any,
        **more: Any,
    ) -> Any:
        """ComfyUI's, with the rules' own models made ready; it has loaded them with the guider's."""
        with ExitStack() as stack:
            for other in self.others:
                settings = {"denoise_mask": denoise_mask, "seed": seed, **more}
                stack.enter_context(other.running(self.conds, noise, latent_image, device, sigmas, **settings))
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **more
            )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        """The guided *denoised* estimate (B, ...) of x at sigma = ``timestep`` (B,)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = model_options or {}
        model, positive, negative = self.inner_model, self.conds["positive"], self.conds.get("negative")
        run = self.bound_run(model, options, 1.0)
        always = bool(options.get("disable_cfg1_optimization"))
        if always and negative is None and not self.model_options.get("disable_cfg1_optimization"):
            raise UserError(  # the sampler has set it: one of ComfyUI's own *_cfg_pp
                "a CFG++ sampler, which goes by the negative's estimate, and no negative conditioning",
                expected="a negative conditioning",
                mend="connect one to the guider's negative input, for instance Null Conditioning",
            )
        seen: dict[str, Any] = {"conds": [positive, None]}

        def evaluate(
            names: tuple[str, ...], at: Tensor, level: Tensor, fit: Callable[[Any], Any] = lambda conds: conds
        ) -> Mapping[str, Tensor]:
            conds = [fit(positive), fit(negative) if always or "uncond" in names else None]
            arguments = {"conds": conds, "input": at, "sigma": level, "model": model, "model_options": options}
            theirs = {name for other in self.others for name in other.conds}
            own = {name: fit(self.conds[name]) for name in names if name in self.conds and name not in theirs}
            out, further = evaluate_branches(model, conds, own, at, level, options)
            for other in self.others:
                further |= other.evaluate(names, at, level, fit)
            passes = {name: self.weakened[name] for name in names if name in self.weakened}
            further |= weakened.evaluate(model, conds[0], passes, at, level, options, run.sigmas)
            for hook in options.get("sampler_pre_cfg_function", []):
                out = hook({**arguments, "conds_out": out, "cond_scale": run.base_scale, "timestep": level})
            seen.update(conds=conds, out=[estimate.detach() for estimate in out])
            return {"cond": out[0], **further} | ({} if conds[1] is None else {"uncond": out[1]})

        def differentiable(names: tuple[str, ...], at: Tensor, level: Tensor) -> Mapping[str, Tensor]:
            with ExitStack() as stack:
                for network in (model, *(other.patcher.model for other in self.others)):
                    stack.enter_context(through(network))
                return evaluate(names, at, level, normal_conds)

        denoised = run(
            x,
            timestep,
            lambda names: evaluate(names, x, timestep),
            host_combine=lambda step: _host_combination(step, model, options, seen["conds"]),
            differentiable=differentiable,
        )
        for hook in options.get("sampler_post_cfg_function", []):
            denoised = hook(
                {
                    "denoised": denoised,
                    "cond": seen["conds"][0],
                    "uncond": seen["conds"][1],
                    "cond_scale": run.base_scale,
                    "model": model,
                    "uncond_denoised": seen["out"][1],
                    "cond_denoised": seen["out"][0],
                    "sigma": timestep,
                    "model_options": options,
                    "input": x,
                }
            )
        return denoised

    def bound_run(self, model: Any, options: Mapping[str, Any], base_scale: float) -> GuidanceRun:
        """The rules bound to the sampling in progress; :func:`make_guider` gives it."""
        raise NotImplementedError


def weakened_passes(run: GuidanceRun) -> dict[str, Branch]:
    """Name -> branch, of the weakened passes that some step of ``run`` may ask for."""
    return {name: branch for name, branch in asked_branches(run).items() if branch.patch is not None}


def make_guider(
    model: comfy.model_patcher.ModelPatcher,
    positive: Any,
    negative: Any | None,
    rules: Sequence[Any],
    *,
    report: bool = False,
) -> Guider:
    """A GUIDER that applies ``rules``; with ``report`` every sampling keeps its report.

    Raises:
        UserError: rules that cannot act together or on this model, that need a negative where there is none, or another condition
            that is none.
    """
    if _needs_uncond(rules) and negative is None:
        raise UserError(
            "rules that compare the prompt with a negative one, and no negative conditioning",
            expected="a negative conditioning",
            mend="connect one to the guider's negative input, for instance Null Conditioning",
        )
    run = GuidanceRun(rules, VE_SCALED)
    if _needs_uncond(rules):
        warn_if_distilled(model, rules)
    own, others = own_conditions(run), other_models(run)
    for other in others:
        check_model(other.patcher, model, process_of, MARKS)
        check_hooks(positive, negative, *own.values(), why="a rule with a model of its own")
    if any(rule.may_differentiate() for rule in rules):  # hooks change weights in place between two conds of one call
        check_hooks(positive, negative, *own.values(), why="a rule that differentiates through the model")
    passes = weakened_passes(run)
    weakened.check(passes.values(), model.get_model_object("diffusion_model"), positive)
    guided = _with_networks(model, rules, others)
    made: list[Guider] = []
    record = (lambda: Record(entries=made[0].entries())) if report else None
    bound_run = _one_run(guided, rules, record)  # before the guider is made, which may sample with a clone of `guided`
    guider = Guider(guided)
    made.append(guider)
    guider.bound_run = bound_run  # type: ignore[method-assign]
    guider.others, guider.rules, guider.weakened = others, tuple(rules), passes
    guider.inner_set_conds({"positive": positive, **own} | ({} if negative is None else {"negative": negative}))
    guider.set_cfg(run.base_scale)
    return guider


def guider_passes(guider: Guider, sigmas: Tensor | None = None) -> Passes:
    """What a guider costs in network passes: over a run's ``sigmas`` (N + 1,), else over the model's whole noise range.

    With the weakened passes of rules on its model, without the passes that other nodes' patches make for themselves.
    """
    sampling = guider.model_patcher.get_model_object("model_sampling")
    on_model = [rule for rule in rules_on(guider.model_options) if isinstance(rule, WeakenedPass)]
    on_model = [rule for rule in on_model if rule not in guider.rules]  # the guider's own are marked on its model too
    run = GuidanceRun((*on_model, *guider.rules), process_of(sampling), sigmas=sigmas)
    whole = (float(sampling.sigma_max), float(sampling.sigma_min))
    levels = noise_range(run, *whole) if sigmas is None else sigmas[:-1]
    hooked = guider.model_options.get("disable_cfg1_optimization") and "negative" in guider.original_conds
    entries = dict.fromkeys(weakened_passes(run), len(guider.original_conds["positive"])) | guider.entries()
    return passes(run, levels, entries=entries, always=frozenset({"uncond"} if hooked else ()))


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
    needs_uncond = _needs_uncond(rules)
    if needs_uncond:
        warn_if_distilled(model, rules)
    passes = weakened_passes(GuidanceRun(rules, VE_SCALED))
    weakened.check(passes.values(), model.get_model_object("diffusion_model"))
    changes_branches = any(rule.stage is Stage.BRANCHES for rule in rules)
    patched = _with_networks(model, rules)
    run = _one_run(patched, rules, (lambda: Record("model")) if report else None)

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
                raise UserError(
                    "rules that compare the prompt with a negative one, under a guider that evaluates none",
                    expected="a guider with a negative conditioning: KSampler, CFGGuider or Guider",
                    mend="use one of these in the place of BasicGuider",
                )
            return {"cond": args["cond_denoised"], "uncond": args["uncond_denoised"], **further}

        def combine(step: Step) -> Tensor:
            stands = bound.leaves_combination_alone or (
                not changes_branches and bool((step.guidance_scale == scale).all())
            )
            return (
                args["denoised"]
                if stands
                else _host_combination(step, args["model"], options, (args["cond"], args["uncond"]))
            )

        return bound(args["input"], args["sigma"], evaluate, host_combine=combine)

    patched.set_model_sampler_post_cfg_function(guide, disable_cfg1_optimization=needs_uncond)
    return patched
