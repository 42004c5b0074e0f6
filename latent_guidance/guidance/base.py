"""What a guidance rule is: a frozen dataclass of knobs that acts at one stage of the denoised estimate.

A rule is one file in this folder: a module docstring with the paper, the equation and the space it acts in; a pure function
of tensors; and a dataclass that is the rule. The node, its help page, its translations and its conformance tests are made
from the dataclass (see CONTRIBUTING, "add a guidance rule").

The stages, in the order in which they act:

| stage    | is given                          | answers                                           |
|----------|-----------------------------------|---------------------------------------------------|
| SCALE    | sigma, the scale so far           | guidance_scale w (B,)                             |
| BRANCHES | the branches' estimates           | changed estimates, by branch name                 |
| COMBINE  | the branches, w                   | the guided estimate                               |
| POST     | the guided estimate               | a changed guided estimate                         |
| GRADIENT | the guided estimate, x            | what to add to the guided estimate                |
| STEP     | (inside a sampler's step)         | a gradient, through :meth:`Rule.step_gradient`    |

A SCALE rule acts before the network is called, so that a branch with w = 1 costs nothing. One that ``needs`` the branches acts after
BRANCHES instead, and they are evaluated for it at every step. One that ``looks_at_branches`` acts at both times: before, without
estimates, and after BRANCHES at the steps at which the unconditional branch was evaluated anyway, so that it may remember what it
saw and lower w for the next step before that branch is paid for. All GRADIENT rules of a chain see the same estimate, so their
order does not matter.

Besides "cond" and "uncond" a rule may name branches of its own (:class:`Branch`): the estimate of another condition, of another
model, or of a weakened pass. It finds them in ``step.estimates`` by their names at the steps at which it asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..attention import AttentionPatch
from ..process import Process
from ..windows import Windows
from .grid import levels_above
from .knobs import Socket, check_fields, knobs
from .latents import Latents


class Stage(Enum):
    SCALE = "scale"
    BRANCHES = "branches"
    COMBINE = "combine"
    POST = "post"
    GRADIENT = "gradient"
    STEP = "step"


@dataclass(frozen=True)
class NodeText:
    """How the rule appears in a node graph. ``id`` is for ever; the other texts may change."""

    id: str
    name: str
    name_zh: str
    description: str
    description_zh: str
    search_aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Everything a rule may look at, at one call of the denoiser. Tensors are never changed in place.

    Attributes:
        process: what x is.
        x: noisy latent (B, ...), in the coordinates of ``process``.
        sigma: noise level (B,).
        index: how many of the run's noise levels are above this one (0 at the first step); None if the grid is unknown.
        guidance_scale: w in force (B,).
        estimates: denoised estimates by branch name: "cond", "uncond", and those of further branches; empty before the network
            was called.
        evaluated: the same as the networks gave them, before BRANCHES rules changed any.
        guided: the guided estimate (B, ...), from COMBINE on.
        pull_back: at GRADIENT, where a rule of the chain differentiates through the denoiser at this step: takes a gradient with
            respect to the guided estimate (B, ...) to the one with respect to x (B, ...). None elsewhere.
        unscaled: brings estimates (B, ...) to the scale of the model's VAE; None where the host does not know it.
        note: takes a number per sample that the rule came by anyway and a report should show, ``note("probability", (B,))``;
            None where nobody keeps a report, so that nothing is computed for it.
    """

    process: Process
    x: Tensor
    sigma: Tensor
    index: int | None
    guidance_scale: Tensor
    estimates: Mapping[str, Tensor]
    evaluated: Mapping[str, Tensor] = field(default_factory=dict)
    guided: Tensor | None = None
    pull_back: Callable[[Tensor], Tensor] | None = None
    unscaled: Callable[[Tensor], Tensor] | None = None
    note: Callable[[str, Tensor], None] | None = None

    @property
    def cond_denoised(self) -> Tensor:
        return self.estimates["cond"]

    @property
    def uncond_denoised(self) -> Tensor:
        return self.estimates["uncond"]

    @property
    def denoised(self) -> Tensor:
        """The guided estimate, for the stages that come after COMBINE."""
        return cast(Tensor, self.guided)

    def share_of(self, guidance_scale: float) -> Tensor:
        """How much of guidance at ``guidance_scale`` the rules for the scale have left, (B,): 1 is all, 0 is none (w = 1).

        For rules with more than one scale: all of them go towards neutral together. 1 everywhere if ``guidance_scale`` is 1.
        """
        own = torch.full_like(self.guidance_scale, guidance_scale)
        share = (self.guidance_scale - 1) / torch.where(own == 1, torch.ones_like(own), own - 1)
        return torch.where((own == 1) | (self.guidance_scale == own), torch.ones_like(own), share)

    def replace(self, **changes: Any) -> Step:
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Branch:
    """An estimate that a rule asks for besides those of the prompt and of the negative one.

    Attributes:
        cond: "cond" or "uncond" for the run's own conditions; else a condition as the host has it, in a node graph a
            CONDITIONING (a list of entries), in the library's Guider a Cond.
        model: what makes the estimate, where it is not the run's own model: a MODEL, in the library a Denoiser.
        patch: what weakens the pass: a change of the network's attention, or windows through which it sees the latent.
    """

    cond: Any
    model: Any = None
    patch: AttentionPatch | Windows | None = None

    @property
    def name(self) -> str:
        """By which the estimate is found; the same for the same entries of a condition, the same model and equal patches."""
        entries = self.cond if isinstance(self.cond, list) else [self.cond]
        cond = self.cond if isinstance(self.cond, str) else "condition " + " ".join(str(id(entry)) for entry in entries)
        by_model = cond if self.model is None else f"{cond} by model {id(self.model)}"
        return by_model if self.patch is None else f"{by_model} with {self.patch}"

    @property
    def windows(self) -> Windows | None:
        """Those through which the network sees the latent, if it does not see it whole."""
        return self.patch if isinstance(self.patch, Windows) else None

    @property
    def pieces(self) -> int:
        """How many passes one sample's estimate is made of: one, or one for every window."""
        return 1 if self.windows is None else self.windows.count**2

    @property
    def attention(self) -> AttentionPatch | None:
        """The change of the network's attention, if there is one."""
        return self.patch if isinstance(self.patch, AttentionPatch) else None

    def patches(self, sigma: Tensor, sigmas: Tensor | None) -> list[AttentionPatch | None]:
        """The change of attention for each sample at noise levels ``sigma`` (B,): what is drawn is drawn anew at every level of
        the run's grid ``sigmas`` (N + 1,)."""
        patch = self.attention
        if patch is None or patch.op != "shuffle" or sigmas is None:
            return [patch] * len(sigma)
        return [replace(patch, step=index) for index in levels_above(sigma, sigmas).tolist()]


def network_key(handle: Any) -> str | int:
    """What is equal for two handles of one network: the same object, or two that were loaded from the same file.

    Args:
        handle: its ``fingerprint`` (a hash of its file) counts if it has one, else which ``network`` it holds, else which object it is.
    """
    fingerprint = getattr(handle, "fingerprint", None)
    if fingerprint is not None:
        return str(fingerprint)
    network = getattr(handle, "network", None)
    return id(handle if network is None else network)


class Rule:
    """Base of all rules. Subclasses are frozen dataclasses whose fields are annotated with knobs.

    Constructing one raises UserError if a field is out of its range.
    """

    stage: ClassVar[Stage]
    node: ClassVar[NodeText]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Branches besides "cond" that the rule cannot do without: a subset of {"uncond"}."""
    looks_at_branches: ClassVar[bool] = False
    """It compares the two branches at every step that has both. A SCALE rule that does is asked a second time, with them."""
    rests_at_one: ClassVar[bool] = False
    """Of a SCALE rule: where it guides less, it moves w towards 1, the plain conditional model."""
    may_spare: ClassVar[bool] = False
    """It may find, by what it saw in a run, that a later step needs no second branch; so what a run costs is known as a bound only."""
    guider_only: ClassVar[bool] = False
    """It never acts on a model under another guider, whatever its settings."""
    uses_uncond: ClassVar[bool] = True
    """Of a COMBINE rule: it goes from the unconditional estimate. One that does not never has it evaluated."""

    def __post_init__(self) -> None:
        check_fields(self, self.node.name)

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Any]:
        """The rule for one run over ``sigmas`` (N + 1,): a callable of :class:`Step` that answers as its stage says.

        Whatever changes from step to step lives in what this returns, and dies with the run.
        """
        return self.apply

    def apply(self, step: Step) -> Any:
        """The stage's answer, for rules without state."""
        raise NotImplementedError(f"{type(self).__name__} must define apply or bind")

    def branches(self) -> tuple[Branch, ...]:
        """Every branch of its own that the rule may ask for; the hosts check them before the first step."""
        return ()

    def may_ask(self) -> frozenset[str]:
        """Names of the estimates, besides "cond", that some step of a run may have to have for this rule."""
        own = self.needs | {branch.name for branch in self.branches()}
        guides = self.stage is Stage.COMBINE and getattr(self, "guidance_scale", None) != 1
        return own | {"uncond"} if guides and self.uses_uncond else own

    def asks(self, step: Step) -> frozenset[str]:
        """Names of the estimates, besides "cond", that the rule wants at this step; ``step`` has its scale and no estimates yet.

        A rule that combines wants none where w = 1, and then the conditional estimate stands.
        """
        own = self.needs | {branch.name for branch in self.branches()}
        if self.stage is not Stage.COMBINE:
            return own
        if bool((step.guidance_scale == 1).all()):
            return self.needs
        return own | {"uncond"} if self.uses_uncond else own

    def may_differentiate(self) -> bool:
        """Whether some step of a run may have to give the rule gradients through the denoiser (``step.pull_back``)."""
        return False

    def differentiates(self, step: Step) -> bool:
        """Whether the rule wants ``step.pull_back`` at this step; ``step`` has no estimates yet."""
        return self.may_differentiate()

    def networks(self) -> tuple[Any, ...]:
        """The networks that the rule calls; a host loads and frees them with the model."""
        return ()

    def does_the_same_as(self, other: Rule) -> bool:
        """Whether ``other`` is the same rule with the same settings, on the same networks."""
        if type(self) is not type(other):
            return False
        for name, knob in knobs(type(self)).items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(knob, Socket):  # objects that other nodes made
                if network_key(mine) != network_key(theirs):
                    return False
            elif mine != theirs:
                return False
        return True

    def closed(self, process: Process, sigmas: Tensor) -> str:
        """Why the rule acts at none of the noise levels ``sigmas`` (N,) of a run; "" if it acts at one of them."""
        return ""

    def check_latents(self, latents: Latents) -> None:
        """Raise UserError if the rule was made for other latents than ``latents``, a model's."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError if the rule cannot act on latents of ``shape`` (B, ...); asked once, before the first step of a run."""
