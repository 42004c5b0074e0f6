r"""Guidance by any log-probability of the noisy latent: an object with ``log_prob(x, sigma) -> (B,)``.

    D += w sigma^2 / alpha grad_x log p(y | x, sigma)                                   (score form)

    class Bright:
        def log_prob(self, x, sigma):  # x (B, ...) in the model's own coordinates, sigma (B,)
            return x.flatten(1).mean(dim=1)

Reference: arXiv 2105.05233, eq. 14: classifier guidance, with anything in the place of the classifier.
Space: x as the model has it (VE-scaled or rectified flow), the score. For what is known only of clean pictures take a loss at the estimate
(MPGD, DPS) instead: most functions of pictures mean nothing at high noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..process import expand
from .base import NodeText, Rule, Stage, Step
from .gates import EveryK, GradientClip, SigmaHi, SigmaLo
from .gradient import (
    clip_norm,
    finite_or_unguided,
    input_gradient,
    named_autograd,
    normal,
    normal_parameters_,
    relative_scale,
    score_form,
)
from .knobs import UNLIMITED, Choice, Number, Socket
from .limited_interval import check_window, inside_window
from .losses.base import check_values, name_of, named_errors


@dataclass(frozen=True, kw_only=True)
class LogProbGuidance(Rule):
    stage: ClassVar[Stage] = Stage.GRADIENT
    node: ClassVar[NodeText] = NodeText(
        id="LGLogProbGuidance",
        name="Log-Probability Guidance (Noisy Latent)",
        name_zh="对数概率引导（带噪潜变量）",
        description="Follows any function of the noisy latent that another node pack brings: an object with log_prob(x, sigma).",
        description_zh="遵循其他节点包提供的任意带噪潜变量函数：带有 log_prob(x, sigma) 方法的对象。",
        search_aliases=("log prob", "custom classifier", "energy", "gradient guidance", "noisy latent"),
    )

    loss: Annotated[
        Any,
        Socket(
            type="LG_LOSS",
            made_by="an object with log_prob(x, sigma)",
            label_zh="对数概率",
            help="An object with log_prob(x, sigma), which answers one number for each noisy latent, higher where it is better.",
            help_zh="带有 log_prob(x, sigma) 的对象，对每个带噪潜变量给出一个数，越大越好。",
        ),
    ]
    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="1 (raw)",
            label_zh="引导强度",
            help="Strength of the pull; 0 is off, below 0 pushes away. Its unit is that of scaling.",
            help_zh="拉力强度；0 关闭，负值则推离。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "raw"),
            label_zh="强度换算",
            help="relative: the pull is guidance_scale times as long as x - denoised; raw: 1 is Bayes' rule.",
            help_zh="relative：拉力长度为 x - denoised 的 guidance_scale 倍；raw：1 即贝叶斯公式。",
        ),
    ] = "relative"
    sigma_lo: SigmaLo = 0.0
    sigma_hi: SigmaHi = UNLIMITED
    every_k: EveryK = 1
    clip: GradientClip = UNLIMITED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)
        if not callable(getattr(self.loss, "log_prob", None)):
            raise UserError(
                f"the loss {name_of(self.loss)}, which has no log_prob, in {self.node.name}",
                expected="an object with log_prob(x, sigma), a function of the noisy latent",
                mend="follow a loss at the denoised estimate with MPGD, DPS or another rule for losses",
            )

    def networks(self) -> tuple[Any, ...]:
        networks = getattr(self.loss, "networks", None)
        return () if networks is None else tuple(networks())

    def apply(self, step: Step) -> Tensor:
        active = inside_window(step.sigma, self.sigma_lo, self.sigma_hi)
        if step.index is not None and step.index % self.every_k:
            active = torch.zeros_like(active)
        if self.guidance_scale == 0 or not bool(active.any()):
            return torch.zeros_like(step.denoised)
        for handle in self.networks():
            if getattr(handle, "network", None) is not None:
                normal_parameters_(handle.network)

        def values(x: Tensor) -> tuple[Tensor, Tensor]:
            with named_errors(self.loss):
                found = self.loss.log_prob(x, normal(step.sigma))
            check_values(found, x, name_of(self.loss))
            return found, found

        mend = "leave out what cannot be differentiated in log_prob"
        with named_autograd(f"the gradient of {name_of(self.loss)} in {self.node.name}", mend=mend):
            gradient, found = input_gradient(values, step.x)
        gradient = torch.where(expand(torch.isfinite(found), gradient), gradient, torch.full_like(gradient, torch.nan))
        gradient = gradient / expand(step.process.unit_scale(step.sigma), gradient)  # in VP coordinates, as clip has it
        gradient = finite_or_unguided(
            gradient, rule=self.node.name, index=step.index, sigma=step.sigma, loss=name_of(self.loss)
        )
        shift = score_form(step.process, self.guidance_scale * clip_norm(gradient, self.clip), step.sigma)
        if self.scaling == "relative":
            shift = relative_scale(shift, step.x, step.denoised, self.guidance_scale)
        return torch.where(expand(active, shift), shift, torch.zeros_like(shift)).to(step.denoised.dtype)
