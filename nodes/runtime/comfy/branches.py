"""The branches that rules name for themselves, inside ComfyUI: their conditions, their models, and the calls in which
they are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance import GuidanceRun
from ....latent_guidance.guidance.latents import check_other_model
from .checks import latent_format, latents_of


def asked_branches(run: GuidanceRun) -> dict[str, Any]:
    """Name -> branch, of those that some step of ``run`` may ask for."""
    return {name: branch for name, branch in run.branches.items() if name in run.may_ask}


def own_conditions(run: GuidanceRun) -> dict[str, Any]:
    """Name -> CONDITIONING of the branches that go by a condition of their own, as a guider takes them beside its positive.

    ComfyUI passes a condition's name on to the model unless it says itself what kind of prompt it is.

    Raises:
        UserError: a rule's condition that is none.
    """
    found: dict[str, Any] = {}
    for name, branch in asked_branches(run).items():
        if isinstance(branch.cond, str):
            continue
        if not isinstance(branch.cond, list) or not branch.cond:
            raise UserError(
                "an empty conditioning in a guidance rule", expected="an encoded prompt", mend="connect CLIPTextEncode"
            )
        if all(entry[1].get("area") is not None or entry[1].get("mask") is not None for entry in branch.cond):
            raise UserError(
                "a conditioning in a guidance rule that covers a part of the picture only",
                expected="one without area and mask, which gives an estimate everywhere",
                mend="take the node that sets the area or the mask out from before the rule",
            )
        found[name] = [[entry[0], {**entry[1], "prompt_type": "negative"}] for entry in branch.cond]
    return found


def evaluate(
    model: Any, pair: Sequence[Any], further: Mapping[str, Any], x: Tensor, sigma: Tensor, options: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The estimates of [positive, negative or None], and of further conditions by name, in one call of ``model``.

    Where another node has taken over the call for the pair, as it may since it knows those two, the further ones go by themselves.
    """
    by_node: Callable[..., Any] | None = options.get("sampler_calc_cond_batch_function")
    if by_node is None:
        out = comfy.samplers.calc_cond_batch(model, [*pair, *further.values()], x, sigma, options)
        return out[: len(pair)], dict(zip(further, out[len(pair) :], strict=True))
    out = by_node({"conds": list(pair), "input": x, "sigma": sigma, "model": model, "model_options": options})
    more = comfy.samplers.calc_cond_batch(model, list(further.values()), x, sigma, options) if further else []
    return out, dict(zip(further, more, strict=True))


class OtherModel:
    """A rule's own MODEL in a guider, loaded and freed by ComfyUI with the guider's, and evaluated on conditions of the guider.

    Args:
        patcher: the MODEL.
        conds: for every branch name, the name of the guider's condition that the branch goes by.
    """

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher, conds: Mapping[str, str]) -> None:
        self.patcher, self.conds = patcher, dict(conds)
        self._ready: dict[str, Any] = {}
        self._options: dict[str, Any] = {}

    @contextmanager
    def running(
        self, conds: Mapping[str, Any], noise: Tensor, latent: Any, device: Any, sigmas: Tensor, **more: Any
    ) -> Iterator[None]:
        """Ready for one sampling, after ComfyUI has loaded the model; what it needs is let go of at the end, whatever happens.

        Args:
            conds: the guider's conditions by name, not yet processed for its own model.
            noise: as ComfyUI hands it to a guider's inner_sample, like ``latent``, ``device`` and ``sigmas``.
            latent: the latent to start from, not yet scaled.
            device: where sampling runs.
            sigmas: the run's noise levels.
            more: what process_conds takes besides.
        """
        model, options = self.patcher.model, comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        options.pop("multigpu_clones", None)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        comfy.sampler_helpers.prepare_model_patcher(self.patcher, {}, options)
        try:
            comfy.samplers.cast_to_load_options(options, device=device, dtype=self.patcher.model_dtype())
            self.patcher.pre_run()
            if "latent_shapes" in more:
                model.latent_shapes = more["latent_shapes"]
            if latent is not None and torch.count_nonzero(latent) > 0:
                latent = model.process_latent_in(latent)
            raw = {name: list(conds[name]) for name in set(self.conds.values())}
            self._ready = comfy.samplers.process_conds(model, noise, raw, device, latent, **more)
            self._options = options
            yield
        finally:
            self._ready, self._options = {}, {}
            comfy.samplers.cast_to_load_options(options, device=self.patcher.offload_device)
            self.patcher.cleanup()

    def evaluate(
        self, names: Sequence[str], x: Tensor, sigma: Tensor, fit: Callable[[Any], Any] = lambda conds: conds
    ) -> dict[str, Tensor]:
        """The estimates (B, ...) of those of ``names`` that are this model's, in one call; ``fit`` prepares processed conditions."""
        mine = [name for name in names if name in self.conds]
        conds = [fit(self._ready[self.conds[name]]) for name in mine]
        out = comfy.samplers.calc_cond_batch(self.patcher.model, conds, x, sigma, self._options) if mine else []
        return dict(zip(mine, out, strict=True))


def other_models(run: GuidanceRun) -> list[OtherModel]:
    """The models that rules of ``run`` bring, each with its branches."""
    found: dict[int, OtherModel] = {}
    theirs = {"cond": "positive", "uncond": "negative"}
    for name, branch in asked_branches(run).items():
        if branch.model is not None:
            cond = theirs[branch.cond] if isinstance(branch.cond, str) else name
            found.setdefault(id(branch.model), OtherModel(branch.model, {})).conds[name] = cond
    return list(found.values())


def check_model(
    other: Any, model: comfy.model_patcher.ModelPatcher, process_of: Callable[[Any], Any], rules: Sequence[str]
) -> None:
    """Refuse a rule's own MODEL that cannot be evaluated beside the guider's.

    Args:
        other: the rule's.
        model: the guider's.
        process_of: what x is for a model_sampling.
        rules: names of the rules on ``other``.

    Raises:
        UserError: the same network, one of other latents or another process, or one with rules of its own.
    """
    formats = [latent_format(patcher) for patcher in (model, other)]
    mine, theirs = (None if format is None else latents_of(format) for format in formats)
    processes = [process_of(patcher.get_model_object("model_sampling")) for patcher in (model, other)]
    check_other_model(other.is_clone(model), rules, (mine, theirs), (processes[0], processes[1]))


def check_hooks(*conditionings: Any, why: str) -> None:
    """Refuse conditionings that change a model's weights, beside what cannot bear it: ``why``.

    Raises:
        UserError: saying so.
    """
    for entry in [entry for conditioning in conditionings for entry in conditioning or ()]:
        if entry[1].get("hooks") is not None:
            raise UserError(
                f"a conditioning with hooks, which change a model's weights, and {why}",
                expected="conditionings without hooks",
                mend="take the hook nodes out, or put the LoRA on the model",
            )
