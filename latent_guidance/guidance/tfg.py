r"""TFG: the unified form of training-free guidance, of which MPGD, FreeDoM, LGD and others are settings.

    delta_t = rho_t grad_{x_t} log f~(x0),     x0 = D(x_t)                              (variance guidance)
    delta_0 = sum of n_iter steps mu_t grad_{x0} log f~(x0 + delta_0)                   (mean guidance)
    x_{t-1} = Sample(x_t, x0, t) + delta_t / sqrt(alpha_t) + sqrt(alpha_bar_{t-1}) delta_0
    log f~(x0) = log 1/n sum_i exp(-l(x0 + gamma sqrt(1 - alpha_bar_t) z_i))            (implicit dynamics)

with alpha_t = alpha_bar_t / alpha_bar_{t-1}, and rho_t, mu_t constant over a run, or in proportion to alpha_t (*increase*) or 1 - alpha_t
(*decrease*), with the knob as their mean.

Reference: arXiv 2409.15761, Algorithm 1, eq. 5-7 and sec. 4.1 (schedules); its N_recur is a sampler's option (recurrence).
Space: x in VP coordinates and x0. What is added to D makes an Euler or DDIM (eta = 0) step end where the algorithm does, exactly: what the
next x gains, divided by 1 - sigma_next / sigma. Settings, with scaling raw and gamma 0: mean_scale 0 is FreeDoM's form; guidance_scale 0,
one iteration and schedule constant is MPGD (raw). With scaling *relative* the variance part is guidance_scale times as long as x - D, and
each iteration mean_scale times. Deviations: the draws z_i are shared by a batch and by the repeats of a step under recurrence; rho and mu
follow one schedule (the authors' code has one for each); gradients are clipped by the knob clip, off by default (the authors' code clips
for molecules alone). The authors sample with eta = 1 (``Process.step_to_denoised_shift``). Its bias is measured, as FreeDoM's, in
tests/guidance/test_x0_oracles.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..process import Process, expand
from .base import NodeText, Step
from .grid import next_level
from .knobs import Choice, Number, Whole
from .loss_rule import LossRule, x0_only, x_step
from .smoothing import draws_like, smoothed_gradient

MOST_LOOKS = 256
"""How often one step may ask the loss at most, in the iterations at the estimate: iterations times draws."""


def alpha_ratio(process: Process, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """alpha_t = alpha_bar_t / alpha_bar_{t-1} (B,) of a step from sigma to sigma_next, in [0, 1)."""
    return process.alphas_cumprod(sigma) / process.alphas_cumprod(sigma_next)


def schedule_weight(process: Process, sigma: Tensor, sigmas: Tensor | None, sigma_next: Tensor, kind: str) -> Tensor:
    """What rho and mu are multiplied by at ``sigma`` (B,): its mean over the run's grid ``sigmas`` (N + 1,) is 1.

    1 without a grid, and where the mean of what it is in proportion to is 0: in a flow run of the one step from pure noise.
    """
    if kind == "constant" or sigmas is None:
        return torch.ones_like(sigma)
    grid = sigmas.to(sigma)
    ratios = alpha_ratio(process, grid[:-1], grid[1:])
    here = alpha_ratio(process, sigma, sigma_next)
    if kind == "decrease":
        ratios, here = 1 - ratios, 1 - here
    mean = ratios.mean()
    return here / mean if mean > 0 else torch.ones_like(sigma)


@dataclass(frozen=True, kw_only=True)
class TrainingFreeGuidance(LossRule):
    through_denoiser: ClassVar[bool] = True
    node: ClassVar[NodeText] = NodeText(
        id="LGTrainingFreeGuidance",
        name="TFG (Unified Training-Free Guidance)",
        name_zh="TFG（统一的免训练引导）",
        description="Pulls towards a loss through the diffusion model and at the estimate itself, with the loss smoothed: the "
        "unified form of which "
        "MPGD, FreeDoM and LGD are settings. With guidance_scale 0 nothing goes through the model. In Guider; with guidance_scale 0 also "
        "in Apply Guidance to Model.",
        description_zh="同时穿过扩散模型并在估计处拉向（平滑后的）损失：MPGD、FreeDoM、LGD "
        "都是它的特例。guidance_scale 为 0 时不经过扩散模型。用于引导器；guidance_scale 为 0 时也可用于“将引导应用于模型”。",
        search_aliases=("TFG", "training-free guidance", "unified", "mean guidance", "variance guidance"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.25 to 8 (raw)",
            label_zh="方差引导 rho",
            help="Strength rho of the pull through the diffusion model; 0 leaves it out. Its unit is that of scaling.",
            help_zh="穿过扩散模型的拉力强度 rho；0 表示不使用。单位取决于强度换算。",
        ),
    ] = 0.1
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "raw"),
            label_zh="强度换算",
            help="relative: rho and mu are fractions of the length of x - denoised; raw: the paper's.",
            help_zh="relative：rho 与 mu 是 x - denoised 长度的比例；raw：论文中的取值。",
        ),
    ] = "relative"
    mean_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.25 to 8 (raw)",
            label_zh="均值引导 mu",
            help="Strength mu of each iteration at the estimate; 0 leaves them out. Its unit is that of scaling.",
            help_zh="在估计处每次迭代的强度 mu；0 表示不使用。单位取决于强度换算。",
        ),
    ] = 0.1
    iterations: Annotated[
        int,
        Whole(
            min=0,
            max=100,
            neutral=0,
            label_zh="迭代次数",
            help="Iterations at the estimate (N_iter); each costs the loss and the VAE for every draw. The paper takes 4.",
            help_zh="在估计处的迭代次数 N_iter；每次都要对每个抽样计算损失和 VAE。论文取 4。",
        ),
    ] = 2
    gamma: Annotated[
        float,
        Number(
            min=0.0,
            max=4.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.001 to 1",
            label_zh="平滑 gamma",
            help="How far around the estimate the loss is looked at, times sqrt(1 - alpha_bar); 0 looks at the estimate itself.",
            help_zh="计算损失的半径，相对于 sqrt(1 - alpha_bar) 的倍数；0 表示只看估计本身。",
        ),
    ] = 0.1
    draws: Annotated[
        int,
        Whole(
            min=1,
            max=64,
            label_zh="抽样数",
            help="In how many places around the estimate the loss is looked at, if gamma is above 0.",
            help_zh="gamma 大于 0 时，在估计附近计算损失的位置数。",
        ),
    ] = 1
    schedule: Annotated[
        str,
        Choice(
            options=("increase", "constant", "decrease"),
            label_zh="强度随步变化",
            help="How rho and mu change over the run: grow as the noise goes "
            "(the paper's choice), stay, or fall; their mean is the knob's.",
            help_zh="rho 与 mu 在采样过程中的变化：随噪声减小而增大（论文的选择）、不变或减小；平均值等于所设数值。",
        ),
    ] = "increase"
    seed: Annotated[
        int,
        Whole(
            min=0,
            max=2**31,
            label_zh="随机种子",
            help="Of the draws; they are the same for every picture of a batch.",
            help_zh="抽样的随机种子；同一批的每张图片使用相同的抽样。",
        ),
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        looks = self.iterations * (self.draws if self.gamma > 0 else 1)
        if looks > MOST_LOOKS:
            raise UserError(
                f"{self.iterations} iterations of {self.draws} draws each in {self.node.name}, which ask the loss {looks} times a step",
                expected=f"iterations times draws of at most {MOST_LOOKS} (the paper takes 4 iterations)",
                mend="lower iterations or draws; with gamma 0 the draws do not count",
            )

    @property
    def off(self) -> bool:
        return self.guidance_scale == 0 and (self.mean_scale == 0 or self.iterations == 0)

    def may_differentiate(self) -> bool:
        return self.guidance_scale != 0

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        sigma_next = next_level(step.sigma, sigmas)
        weight = schedule_weight(step.process, step.sigma, sigmas, sigma_next, self.schedule)
        radius = self.gamma * (1 - step.process.alphas_cumprod(step.sigma)).sqrt()
        around = draws_like(step.denoised, self.draws, self.seed, step.index, radius)

        def smoothed(at: Tensor) -> Tensor:
            return smoothed_gradient(lambda there: self.loss_gradient(step, there), at, radius, around)[1]

        return self._variance_part(step, sigma_next, weight, smoothed) + self._mean_part(
            step, sigma_next, weight, smoothed
        )

    def _variance_part(
        self, step: Step, sigma_next: Tensor, weight: Tensor, smoothed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.guidance_scale == 0:
            return torch.zeros_like(step.denoised)
        delta = -self.guidance_scale * self.pulled_back(smoothed(step.denoised), step)
        ratio = alpha_ratio(step.process, step.sigma, sigma_next)
        factor = torch.where(ratio > 0, weight / ratio.clamp_min(torch.finfo(ratio.dtype).tiny).sqrt(), 0 * weight)
        shift = x_step(step.process, expand(factor, delta) * delta, step.sigma, sigma_next)
        return expand(weight, shift) * self.relative(shift, step) if self.scaling == "relative" else shift

    def _mean_part(
        self, step: Step, sigma_next: Tensor, weight: Tensor, smoothed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        delta = torch.zeros_like(step.denoised)
        if self.mean_scale == 0:
            return delta
        for _ in range(self.iterations):
            gradient = self.kept(smoothed(step.denoised + delta), step)
            move = -self.mean_scale * gradient
            move = self.relative(move, step, self.mean_scale) if self.scaling == "relative" else move
            delta = delta + expand(weight, move) * move
        return delta if self.scaling == "relative" else x0_only(step.process, delta, step.sigma, sigma_next)
