"""A GUIDER for one run: the branches that its rules ask for, and the networks that evaluate them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionPatch, check_patch, patched
from ..denoiser import Cond, Denoiser, concat_conds, for_run
from ..errors import UserError
from ..guidance import Branch, GuidanceRun
from ..guidance.gradient import normal
from ..guidance.guided import GuidedDenoiser
from ..guidance.latents import check_other_model
from ..guidance.passes import Passes, noise_range, passes
from ..guidance.record import Record
from ..guidance.run import no_negative
from ..windows import Windows
from .objects import Conditioning, GuiderNode, Model


@dataclass
class Network:
    """A model of a run, and the conditions of the branches that it evaluates, all in one batched call.

    Attributes:
        model: the MODEL.
        denoiser: its denoiser for this run.
        windows: those through which it sees the latent in this call, if it does not see it whole.
        branches: the conditions of every branch, by name.
        changes: the change of attention for each sample of a branch, given their noise levels.
    """

    model: Model
    denoiser: Denoiser
    windows: Windows | None = None
    branches: dict[str, list[Cond]] = field(default_factory=dict)
    changes: dict[str, Callable[[Tensor], list[AttentionPatch | None]]] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """The most network passes that one call is made of, each on what :meth:`seen` says."""
        windows = 1 if self.windows is None else self.windows.count**2
        return windows * sum(len(conds) for conds in self.branches.values())

    def seen(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what one pass sees of a latent of ``shape`` (B, C, H, W)."""
        return shape if self.windows is None else (*shape[:-2], *self.windows.boxes(*shape[-2:])[0][2:])

    @property
    def tokens(self) -> tuple[int, int]:
        """The common length of all prompts, and the width of a token; zeros without tokens."""
        conds = [cond for branch in self.branches.values() for cond in branch]
        found = [cond.get("tokens") if isinstance(cond, Mapping) else cond for cond in conds]
        shapes = [cond.shape for cond in found if isinstance(cond, Tensor)]
        return (math.lcm(*(shape[1] for shape in shapes)), shapes[0][2]) if shapes else (0, 0)

    def evaluate(
        self, names: tuple[str, ...], x: Tensor, sigma: Tensor, *, variance: bool = False
    ) -> list[dict[str, Tensor]]:
        """The named branches' estimates (B, ...) by name, and with ``variance`` their learned variances."""
        pieces = x if self.windows is None else self.windows.crops(x)
        batch, times = x.shape[0], len(pieces) // len(x)
        own = [(name, cond) for name in self.branches if name in names for cond in self.branches[name]]
        conds = [_expand(cond, batch) for _, cond in own for _ in range(times)]
        levels = sigma.expand(batch).repeat(times)
        many = (torch.cat([pieces] * len(own)), levels.repeat(len(own)), concat_conds(normal(conds)))
        denoiser: Any = self.denoiser
        with patched(denoiser, [patch for name, _ in own for patch in self.changes[name](levels)]):
            outputs = denoiser.with_variance(*many) if variance else (denoiser(*many),)
        averaged = []
        for output in outputs:
            parts: dict[str, list[Tensor]] = {}
            for (name, _), part in zip(own, output.chunk(len(own)), strict=True):
                whole = part if self.windows is None else self.windows.joined(part, *x.shape[-2:])
                parts.setdefault(name, []).append(whole)
            averaged.append(
                {name: found[0] if len(found) == 1 else sum(found) / len(found) for name, found in parts.items()}
            )
        return averaged


class RunDenoiser(GuidedDenoiser):
    """A GuiderNode as the Denoiser of one run; all branches of a step that one model evaluates on the whole latent go through it in one
    call.

    Args:
        guider: the model, its conditions and rules.
        sigmas: the run's noise levels (N + 1,).
        by_uncond: the sampler goes by the unconditional estimate too, and calls :meth:`with_uncond`.

    Raises:
        UserError: rules that cannot act together, or a branch that cannot be evaluated.
    """

    def __init__(self, guider: GuiderNode, sigmas: Tensor, *, by_uncond: bool = False) -> None:
        self.process = guider.model.denoiser.process
        record = Record() if guider.report or guider.model.report else None
        factor = guider.model.latent_space.scaling_factor
        self.run = GuidanceRun(
            guider.chain,
            self.process,
            sigmas=sigmas,
            base_scale=guider.cfg,
            unscaled=lambda latents: latents / factor,
            record=record,
        )
        needs_uncond = by_uncond or self.run.may_need_uncond
        if needs_uncond and guider.negative is None:
            raise no_negative(
                f"{'a CFG++ sampler' if by_uncond else 'guidance'} that needs an unconditional estimate",
                mend="connect the negative input of the guider, or use CFGGuider instead of BasicGuider",
            )
        self.own = Network(guider.model, for_run(guider.model.denoiser, sigmas))
        further: dict[tuple[int | None, Windows | None], Network] = {(None, None): self.own}
        wanted = {"uncond": Branch("uncond"), "cond": Branch("cond")} if needs_uncond else {}
        asked = self.run.may_ask
        wanted |= {"cond": Branch("cond")} | {name: own for name, own in self.run.branches.items() if name in asked}
        for name, branch in wanted.items():
            model = guider.model if branch.model is None else branch.model
            if branch.model is not None:
                check_model(model, guider.model)
            if branch.attention is not None:
                check_patch(model.denoiser, branch.attention)
            key = (None if branch.model is None else id(model), branch.windows)
            fresh = Network(model, for_run(model.denoiser, sigmas), branch.windows)
            network = further.setdefault(key, fresh)
            conditioning, what = _conditioning(branch, guider)
            network.branches[name] = entries(conditioning, network.model, what)
            network.changes[name] = partial(branch.patches, sigmas=sigmas)
        self.networks = list(further.values())
        if record is not None:
            record.entries = {name: len(conds) for net in self.networks for name, conds in net.branches.items()}

    def denoisers(self) -> Iterable[Any]:
        return (network.denoiser for network in self.networks)

    def evaluate(
        self, names: tuple[str, ...], x: Tensor, sigma: Tensor, cond: Cond, *, variance: bool = False
    ) -> list[dict[str, Tensor]]:
        """The estimates (B, ...) of the named branches on their own conditions; ``cond`` is not looked at."""
        estimates, *more = self.own.evaluate(names, x, sigma, variance=variance)
        for network in self.networks[1:]:
            if any(name in names for name in network.branches):
                estimates |= network.evaluate(names, x, sigma)[0]
        return [estimates, *more]


def guider_passes(guider: GuiderNode, sigmas: Tensor | None = None) -> Passes:
    """What a guider costs in network passes: over a run's ``sigmas`` (N + 1,), else over the model's whole noise range."""
    model = guider.model
    run = GuidanceRun(guider.chain, model.denoiser.process, sigmas=sigmas, base_scale=guider.cfg)
    branches = {"cond": Branch("cond"), "uncond": Branch("uncond")} | run.branches
    entries = {name: len(_conditioning(branch, guider)[0]) for name, branch in branches.items()}
    whole = (float(model.schedule.sigma_max), float(model.schedule.sigma_min))
    return passes(run, noise_range(run, *whole) if sigmas is None else sigmas[:-1], entries=entries)


def _conditioning(branch: Branch, guider: GuiderNode) -> tuple[Conditioning, str]:
    """The CONDITIONING of a branch, and what errors call it."""
    if branch.cond == "cond":
        return guider.positive, "positive"
    if branch.cond == "uncond":
        return guider.negative or (), "negative"
    return branch.cond, "rule's own"


def check_model(other: Any, model: Model) -> None:
    """Refuse a rule's own model that cannot be evaluated beside the guider's.

    Raises:
        UserError: the same network, one of other latents or of another process, or one with rules of its own.
    """
    rules = [rule.node.name for rule in other.rules]
    latents = (model.latent_space.latents, other.latent_space.latents)
    check_other_model(
        other.denoiser is model.denoiser, rules, latents, (model.denoiser.process, other.denoiser.process)
    )


_KNOWN_ENTRIES = {"pooled_output", "attention_mask"}


def entries(conditioning: Conditioning, model: Model, what: str) -> list[Cond]:
    """The conditions (batch size 1 or B) in ``conditioning``, on the model's device.

    Raises:
        UserError: something that only ComfyUI can do, such as areas or ControlNets.
    """
    if not conditioning:
        raise UserError(f"an empty {what} conditioning", expected="an encoded prompt", mend="connect CLIPTextEncode")
    found: list[Cond] = []
    for tokens, extra in conditioning:
        unknown = sorted(key for key, value in extra.items() if key not in _KNOWN_ENTRIES and value is not None)
        if unknown:
            raise UserError(
                f"the {what} conditioning holds {', '.join(unknown)}",
                expected="encoded prompts",
                mend="run this workflow in ComfyUI, or leave out the node that adds it",
            )
        cond: dict[str, Cond] = {}
        for need in model.needs:
            value = {"tokens": tokens, "vector": extra.get("pooled_output")}.get(need)
            if value is None:
                raise UserError(
                    f"the {what} conditioning has no {need}, which this model takes",
                    expected="an encoding like the one the model was trained with",
                    mend="encode the prompt with the CLIP of the same checkpoint",
                )
            cond[need] = value.to(model.device)
        found.append(cond["tokens"] if cond.keys() == {"tokens"} else (cond or None))
    return found


def _expand(cond: Cond, batch: int) -> Cond:
    if isinstance(cond, Mapping):
        return {key: _expand(value, batch) for key, value in cond.items()}
    if cond is None or cond.shape[0] == batch:
        return cond
    times = -(-batch // cond.shape[0])
    return cond.repeat(times, *(1,) * (cond.ndim - 1))[:batch]
