r"""What all weakened passes have in common: the estimate is led away from that of the same model on the same prompt, made worse.

    D' = D + s * (D_cond - D_weak)

D is the guided estimate, whatever guides it, so that a weakened pass adds up with classifier-free guidance and its variants, and with
other weakened passes: the papers' eps_uncond + w (eps_cond - eps_uncond) + s (eps_cond - eps_weak). D_cond is what the network gave for the
prompt. s = 0 is neutral, and then, as outside the window of noise levels, no pass is paid for.

Several implementations count otherwise where there is no classifier-free guidance beside it: they go from the weak estimate, and 1 is
neutral there (diffusers' guiders). Here s means the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..attention import AttentionPatch
from ..process import expand
from ..windows import Windows
from .base import Branch, Rule, Stage, Step
from .knobs import UNLIMITED, Number
from .limited_interval import check_window, inside_window


def away_from(guided: Tensor, cond_denoised: Tensor, weak_denoised: Tensor, scale: Tensor) -> Tensor:
    """D + s (D_cond - D_weak), (B, ...); exactly D where s is 0.

    Args:
        guided: D (B, ...).
        cond_denoised: D_cond (B, ...), of the same network and condition as the weak one.
        weak_denoised: D_weak (B, ...).
        scale: s (B,).
    """
    shift = expand(scale, guided) * (cond_denoised - weak_denoised)
    return torch.where(expand(scale == 0, guided), guided, guided + shift)


@dataclass(frozen=True, kw_only=True)
class WeakenedPass(Rule):
    """Base of these rules: what weakens the pass is ``patch()``."""

    stage: ClassVar[Stage] = Stage.POST

    scale: float = 0.0
    """s; every rule has its own knob for it."""
    sigma_lo: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=0.0,
            label_zh="区间下限 sigma",
            help="The rule acts, and its pass is paid for, at noise levels sigma above this one.",
            help_zh="噪声水平 sigma 高于此值时本规则才起作用，也才付出额外计算。",
        ),
    ] = 0.0
    sigma_hi: Annotated[
        float,
        Number(
            min=0.0,
            max=UNLIMITED,
            step=0.01,
            neutral=UNLIMITED,
            label_zh="区间上限 sigma",
            help="The rule acts at noise levels sigma up to and including this one; 1000 is no upper limit.",
            help_zh="噪声水平 sigma 不高于此值时本规则才起作用；1000 表示没有上限。",
        ),
    ] = UNLIMITED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)

    def patch(self) -> AttentionPatch | Windows:
        """What weakens the pass."""
        raise NotImplementedError(f"{type(self).__name__} must define patch")

    @property
    def idle(self) -> bool:
        """Whether the rule does nothing at any step."""
        return self.scale == 0

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("cond", patch=self.patch()),)

    def may_ask(self) -> frozenset[str]:
        return frozenset() if self.idle else super().may_ask()

    def asks(self, step: Step) -> frozenset[str]:
        return self.may_ask() if bool(inside_window(step.sigma, self.sigma_lo, self.sigma_hi).any()) else frozenset()

    def apply(self, step: Step) -> Tensor:
        [branch] = self.branches()
        if self.idle or branch.name not in step.evaluated:
            return step.denoised
        inside = inside_window(step.sigma, self.sigma_lo, self.sigma_hi)
        scale = torch.where(inside, torch.full_like(step.sigma, self.scale), torch.zeros_like(step.sigma))
        return self.guided(step, step.evaluated[branch.name], scale)

    def guided(self, step: Step, weak_denoised: Tensor, scale: Tensor) -> Tensor:
        """The estimate led away from ``weak_denoised`` (B, ...) with s = ``scale`` (B,)."""
        return away_from(step.denoised, step.evaluated["cond"], weak_denoised, scale)
