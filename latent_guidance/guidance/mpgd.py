r"""MPGD: a loss's gradient at the denoised estimate as a leaf, without a pass back through the denoiser.

    x0 = D - c grad_D L(D)
    x_next = sqrt(alpha_bar_next) x0 + sqrt(1 - alpha_bar_next) eps(x)                  (DDIM, eta = 0)

Reference: arXiv 2311.16424, Algorithm 1 with eq. 9 (the shortcut), and Algorithm 3 for latent diffusion (MPGD-LDM), where D is a latent and
L looks at what the VAE decodes of it.
Space: the denoised estimate. In the paper's step eps stays that of the unguided estimate, so that the next x moves by alpha_next c grad L;
scaling *raw* adds to D what makes an Euler or DDIM (eta = 0) step end there: c grad L * alpha_next / (1 - sigma_next / sigma), exactly (for
other samplers see ``Process.step_to_denoised_shift``; under CFG++ *estimate* is the paper's step). *estimate* moves D itself by c grad L,
and eps with it: the limit of the former on the last step, and the same for every sampler and step count.

Deviation: the paper's projections for pixel-space models (MPGD-AE, MPGD-Z: gradients kept on the manifold by an autoencoder) have no
counterpart here, since x is a latent already; that is the paper's own argument for MPGD-LDM. Its c is a constant here; the authors' code
divides it by sqrt(alpha_bar_next) and by the root mean square of the gradient, or scales it with the CFG correction, and for Stable
Diffusion and CLIP takes a norm for the loss and the posterior mean of DDPM for the step. It samples with eta = 0.5 or 1, so that its
strengths do not carry over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from .base import NodeText, Step
from .grid import next_level
from .knobs import Choice, Number
from .loss_rule import LossRule, x0_only


@dataclass(frozen=True, kw_only=True)
class MPGD(LossRule):
    node: ClassVar[NodeText] = NodeText(
        id="LGMPGD",
        name="MPGD (Loss at the Estimate)",
        name_zh="MPGD（估计处的损失引导）",
        description="Pulls the picture towards a loss at each step, by its gradient at the denoised estimate. Cheap: nothing goes back "
        "through the diffusion model. Works in Guider and in Apply Guidance to Model.",
        description_zh="在每一步用去噪估计处的梯度把画面拉向某个损失。开销小：不经过扩散模型反向传播。可用于引导器，也可用于“将引导应用于模型”。",
        search_aliases=("MPGD", "loss guidance", "x0 guidance", "training-free", "manifold", "leaf"),
    )

    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.01,
            neutral=0.0,
            paper_range="0.05 to 0.5 (relative)",
            label_zh="引导强度",
            help="Strength of the pull; 0 is off, below 0 pushes away. Its unit is that of scaling.",
            help_zh="拉力强度；0 关闭，负值则推离。单位取决于强度换算。",
        ),
    ] = 0.2
    scaling: Annotated[
        str,
        Choice(
            options=("relative", "raw", "estimate"),
            label_zh="强度换算",
            help="relative: the pull is guidance_scale times as long as x - denoised; raw: the paper's c, for Euler and DDIM steps; "
            "estimate: c at the estimate itself, whatever the sampler.",
            help_zh="relative：拉力长度为 x - denoised 的 guidance_scale 倍；raw："
            "论文中的 c（用于 Euler 和 DDIM）；estimate：直接作用于估计，与采样器无关。",
        ),
    ] = "relative"

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        _, gradient = self.loss_gradient(step, step.denoised)
        change = -self.guidance_scale * self.kept(gradient, step)
        if self.scaling == "relative":
            return self.relative(change, step)
        if self.scaling == "raw":
            return x0_only(step.process, change, step.sigma, next_level(step.sigma, sigmas))
        return change
