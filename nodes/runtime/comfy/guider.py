"""Guidance rules inside ComfyUI as a GUIDER; as a patch on a MODEL they are in :mod:`.patch`.

Both hand the branches' estimates to the library's GuidanceRun. Nothing here is a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ....latent_guidance.guidance import Branch, GuidanceRun, check_order
from ....latent_guidance.guidance.base import Step
from ....latent_guidance.guidance.cfg import cfg
from ....latent_guidance.guidance.passes import Passes, noise_range, passes
from ....latent_guidance.guidance.record import Record
from ....latent_guidance.guidance.run import no_negative
from ....latent_guidance.guidance.weakened import WeakenedPass
from ....latent_guidance.process import VE_SCALED
from . import weakened
from .branches import OtherModel, asked_branches, check_hooks, check_model, other_models, own_conditions
from .branches import evaluate as evaluate_branches
from .checks import warn_if_distilled, warn_if_overridden
from .gradients import check_differentiable, normal_conds, plain_patcher, through
from .marks import one_run, process_of, rules_on, with_networks


def needs_uncond(rules: Sequence[Any]) -> bool:
    """Whether a chain may ask for the negative's estimate."""
    return GuidanceRun(rules, VE_SCALED).may_need_uncond


def _scale(step: Step) -> float | Tensor:
    """w of a step as ComfyUI's hooks take it: one number, or (B, 1, 1, 1) where it differs inside the batch."""
    w = step.guidance_scale
    return float(w[0]) if bool((w == w[0]).all()) else w.reshape(-1, *(1,) * (step.x.ndim - 1))


def host_combination(step: Step, model: Any, options: Mapping[str, Any], conds: Sequence[Any]) -> Tensor:
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

    shows_the_pair = True
    """Whatever conditions its rules bring, hooks on its model are shown the prompt's and the negative's estimates."""
    others: Sequence[OtherModel] = ()
    """The models that rules bring, beside the guider's own."""
    weakened: Mapping[str, Branch] = MappingProxyType({})
    """The weakened passes of the positive condition that rules ask for, by name."""
    rules: Sequence[Any] = ()
    """The guider's own chain, without what is on its model."""
    overridden = False
    """Whether it was said that another node sets its cfg."""

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
        if self.cfg != run.base_scale and not self.overridden:
            self.overridden = True
            warn_if_overridden(self.cfg, run.base_scale)
        always = bool(options.get("disable_cfg1_optimization"))
        if always and negative is None and not self.model_options.get("disable_cfg1_optimization"):
            # the sampler has set it: one of ComfyUI's own *_cfg_pp
            raise no_negative("a CFG++ sampler, which goes by the negative's estimate")
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
            host_combine=lambda step: host_combination(step, model, options, seen["conds"]),
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
    if needs_uncond(rules) and negative is None:
        raise no_negative("rules that compare the prompt with a negative one")
    check_order(rules, rules_on(model.model_options))
    run = GuidanceRun(rules, VE_SCALED)
    if needs_uncond(rules):
        warn_if_distilled(model, rules)
    own, others = own_conditions(run), other_models(run)
    for other in others:
        check_model(
            other.patcher, model, process_of, [rule.node.name for rule in rules_on(other.patcher.model_options)]
        )
        check_hooks(positive, negative, *own.values(), why="a rule with a model of its own")
    if any(rule.may_differentiate() for rule in rules):
        why = "a rule that differentiates through the model"  # hooks change weights between two conds of one call
        check_hooks(positive, negative, *own.values(), why=why)
        check_differentiable(model, positive, negative, *own.values(), why=why)
        model = plain_patcher(model, f"{why} and a MODEL")
        for other in others:
            other.patcher = plain_patcher(other.patcher, f"{why} and another MODEL")
    passes = weakened_passes(run)
    weakened.check(passes.values(), model.get_model_object("diffusion_model"), positive)
    guided = with_networks(model, rules, others)
    made: list[Guider] = []
    record = (lambda: Record(entries=made[0].entries())) if report else None
    bound_run = one_run(guided, rules, record)  # before the guider is made, which may sample with a clone of `guided`
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
