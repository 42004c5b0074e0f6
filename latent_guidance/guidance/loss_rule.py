"""What all rules that follow a loss at the denoised estimate share: the loss and its pictures, strength, gates, scaling.

What each adds is worked out by the rule (:meth:`LossRule.shift`); here it is gated. With scaling *relative* it has a length that a
person can set once: guidance_scale times that of x - D, for each sample by itself, as in classifier guidance.

Every rule here needs only the loss's gradient g at the guided estimate D as a leaf (the VAE's backward, for a loss on pictures).
Those that differentiate through the denoiser carry it on to x with ``step.pull_back``: J^T g, one backward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..process import Process, expand
from .base import NodeText, Rule, Stage, Step
from .decoding import check_pictures, pictures, resized
from .gates import EveryK, GradientClip, SigmaHi, SigmaLo
from .gradient import clip_norm, finite_or_unguided, named_autograd, normal_parameters_, relative_scale
from .knobs import UNLIMITED, Number, Socket, Whole
from .latents import Latents
from .limited_interval import check_window, inside_window
from .losses.base import check_shape, loss_values, name_of, networks_of, parts_of

LossSocket = Annotated[
    Any,
    Socket(
        type="LG_LOSS",
        made_by="a Loss node, such as Loss: Reference Picture",
        label_zh="损失",
        help="What to pull the picture towards: any Loss node, or several joined by Loss: Weighted Sum.",
        help_zh="画面要趋向的目标：任一损失节点，或用“损失：加权和”合并的多个损失。",
    ),
]
VaeSocket = Annotated[
    Any,
    Socket(
        type="VAE",
        optional=True,
        made_by="the VAE of the model's checkpoint",
        label_zh="VAE",
        help="The model's own VAE, for losses that look at pictures: it is run forwards and backwards at each step.",
        help_zh="模型自带的 VAE，用于基于图像的损失：每一步都要做一次前向和反向计算。",
    ),
]
DecodeAt = Annotated[
    float,
    Number(
        min=0.1,
        max=1.0,
        step=0.05,
        neutral=1.0,
        label_zh="解码尺寸",
        help="For losses that look at pictures: shrink the latents to this part of their size before decoding. Time and memory of the VAE "
        "fall with its square, details go.",
        help_zh="用于基于图像的损失：解码前把潜变量缩小到此比例。VAE 的时间和显存按平方下降，细节随之丢失。",
    ),
]
DecodeTile = Annotated[
    int,
    Whole(
        min=0,
        max=4096,
        neutral=0,
        label_zh="解码分块",
        help="For losses that look at pictures: latents longer than this on a side are decoded in overlapping tiles of this size, which "
        "bounds memory. For its gradient the VAE of SD 1.5 or SDXL keeps 5.6 GiB at 64 in fp32, half of that in fp16 or bf16. 0: never in "
        "tiles; else at least 16.",
        help_zh="用于基于图像的损失：边长超过此值的潜变量按此大小分成重叠的块来解码，从而限制显存。"
        "求梯度时，SD 1.5 或 SDXL 的 VAE 在 64 时以 fp32 占用 5.6 GiB，fp16 或 bf16 减半。0 表示从不分块；否则至少为 16。",
    ),
]

_MEND = "use operations that can be differentiated in the loss, and a VAE and networks that are not compiled or quantised for inference"


def x0_only(process: Process, change: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """What a change (B, ...) of x0 alone in a DDIM step adds to the denoised estimate.

    x_next = alpha_next (x0 + change) + sigma_next eps, with eps as it was: alpha_next * change is added to the next x. (A change of the
    estimate itself changes eps with it, and so moves the next x by less.)
    """
    return process.step_to_denoised_shift(expand(process.alpha(sigma_next), change) * change, sigma, sigma_next)


def x_step(process: Process, change: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """What a change (B, ...) of the next x, in VP coordinates (x_{t-1} of DDPM), adds to the denoised estimate."""
    return process.step_to_denoised_shift(change / expand(process.unit_scale(sigma_next), change), sigma, sigma_next)


@dataclass(frozen=True, kw_only=True)
class LossRule(Rule):
    """Base of the rules that follow a loss. A rule defines :meth:`shift`, and says whether it goes through the denoiser."""

    stage: ClassVar[Stage] = Stage.GRADIENT
    node: ClassVar[NodeText]
    through_denoiser: ClassVar[bool] = False
    """It calls ``step.pull_back`` at the steps at which it acts."""

    loss: LossSocket
    guidance_scale: float
    scaling: str
    vae: VaeSocket = None
    decode_at: DecodeAt = 1.0
    decode_tile: DecodeTile = 64
    sigma_lo: SigmaLo = 0.0
    sigma_hi: SigmaHi = UNLIMITED
    every_k: EveryK = 1
    clip: GradientClip = UNLIMITED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)
        if 0 < self.decode_tile < 16:
            raise UserError(
                f"decode_tile = {self.decode_tile} in {self.node.name}",
                expected="0, or at least 16 latent pixels",
                mend="set it to 64, or to 0 to decode in one piece",
            )
        looking = [name_of(part) for _, part in parts_of(self.loss) if part.space == "picture"]
        if looking and self.vae is None:
            raise UserError(
                f"the loss {' and '.join(looking)}, which looks at pictures, in {self.node.name} without a VAE",
                expected="the VAE that decodes the model's latents",
                mend=f"connect the checkpoint's VAE to the vae input of {self.node.name}",
            )

    def decoded_at_once(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape (1, C, h, w) of what the VAE decodes with a graph at once, of latents of ``shape`` (B, C, h, w); None for nothing."""
        looks = not self.off and any(part.space == "picture" for _, part in parts_of(self.loss))
        if not looks or len(shape) != 4:
            return None
        sides = resized(shape[-2:], self.decode_at)
        return (1, shape[1], *(min(side, self.decode_tile or side) for side in sides))

    @property
    def off(self) -> bool:
        """Whether nothing is added at any step."""
        return self.guidance_scale == 0

    def may_differentiate(self) -> bool:
        return self.through_denoiser and not self.off

    def differentiates(self, step: Step) -> bool:
        return self.may_differentiate() and bool(self.active(step).any())

    def networks(self) -> tuple[Any, ...]:
        return (*networks_of(self.loss), *(() if self.vae is None else (self.vae,)))

    def check_latents(self, latents: Latents) -> None:
        own = getattr(self.vae, "latent_channels", None)
        if own not in (None, latents.channels):
            raise UserError(
                f"a VAE of {own} latent channels at {self.node.name}, for a model of the latents of {latents}",
                expected="the VAE that decodes the model's latents",
                mend=f"connect the VAE of the model's own checkpoint to {self.node.name}",
            )
        for _, part in parts_of(self.loss):
            check: Callable[[Latents], None] | None = getattr(part, "check_latents", None)
            if check is not None:
                check(latents)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for _, part in () if self.off else parts_of(self.loss):
            if part.space == "picture":
                check_pictures(shape)
            check_shape(part, shape)

    def closed(self, process: Process, sigmas: Tensor) -> str:
        opens = self.off or bool(inside_window(sigmas[:: self.every_k], self.sigma_lo, self.sigma_hi).any())
        every = f", every {self.every_k} steps" if self.every_k > 1 else ""
        return "" if opens else f"its window is ({self.sigma_lo:g}, {self.sigma_hi:g}]{every}"

    def active(self, step: Step) -> Tensor:
        """Which samples (B,) the rule acts on: sigma window, every k-th step."""
        on_turn = step.index is None or step.index % self.every_k == 0
        return inside_window(step.sigma, self.sigma_lo, self.sigma_hi) & on_turn

    def bind(self, sigmas: Tensor | None) -> Callable[[Step], Tensor]:
        def guide(step: Step) -> Tensor:
            active = self.active(step)
            if self.off or not bool(active.any()):
                return torch.zeros_like(step.denoised)
            shift = self.shift(step, sigmas)
            shift = torch.where(expand(active, shift), shift, torch.zeros_like(shift))
            return self._finite(shift.to(step.denoised.dtype), step)

        return guide

    def shift(self, step: Step, sigmas: Tensor | None) -> Tensor:
        """What is added to the guided estimate (B, ...), before gates; guidance_scale included.

        Args:
            step: at which the rule is active.
            sigmas: the run's noise levels (N + 1,), or None if unknown.
        """
        raise NotImplementedError(f"{type(self).__name__} must define shift")

    def loss_gradient(self, step: Step, at: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (B,) at an estimate ``at`` (B, ...) as a leaf, and its gradient there; whatever is not finite is NaN in both.

        Raises:
            UserError: a loss that answers what is no loss, or keeps tensors that autograd cannot use.
        """
        for handle in self.networks():
            if getattr(handle, "network", None) is not None:
                normal_parameters_(handle.network)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = at.detach().clone().requires_grad_()
            values = self._values(step, leaf)
            whose = f"the gradient of the loss {name_of(self.loss)} in {self.node.name}"
            with named_autograd(whose, mend=_MEND, backward=True):
                (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"the loss {name_of(self.loss)}, whose answer does not depend on the estimate",
                expected="a value computed from the estimate by differentiable operations",
                mend="leave out .detach(), .item(), rounding, comparisons and torch.no_grad() in the loss",
            )
        finite = torch.isfinite(values.detach())
        gradient = torch.where(expand(finite, gradient), gradient, torch.full_like(gradient, torch.nan))
        return values.detach(), gradient.to(at.dtype)

    def _values(self, step: Step, leaf: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {"latent": leaf}

        def estimate_in(space: str) -> Tensor:
            # not by calling itself: a closure that holds itself would keep the pictures until Python looks for cycles
            if space != "latent" and "vae" not in seen:
                seen["vae"] = self._unscaled(step, leaf)
            if space == "picture" and space not in seen:
                with named_autograd(f"the VAE at {self.node.name}", mend=_MEND):
                    seen[space] = pictures(self.vae, seen["vae"], decode_at=self.decode_at, tile=self.decode_tile)
            return seen[space]

        return loss_values(self.loss, estimate_in, step.index)

    def _unscaled(self, step: Step, latents: Tensor) -> Tensor:
        if step.unscaled is not None:
            return step.unscaled(latents)
        factor = getattr(self.vae, "scaling_factor", None)
        if factor is None:
            raise UserError(
                f"the loss {name_of(self.loss)} on unscaled latents in {self.node.name}, and no VAE that says how they are scaled",
                expected="the VAE of the model",
                mend=f"connect a VAE to the vae input of {self.node.name}",
            )
        return latents / factor

    def relative(self, shift: Tensor, step: Step, fraction: float | None = None) -> Tensor:
        """``shift`` (B, ...) made ``fraction`` (guidance_scale) times as long as x - denoised, per sample."""
        return relative_scale(shift, step.x, step.denoised, self.guidance_scale if fraction is None else fraction)

    def kept(self, gradient: Tensor, step: Step) -> Tensor:
        """``gradient`` (B, ...) clipped per sample, and zero with a warning where it is not finite."""
        return clip_norm(self._finite(gradient, step), self.clip)

    def pulled_back(self, gradient: Tensor, step: Step) -> Tensor:
        """A gradient at the estimate (B, ...) carried through the denoiser: with respect to x in VP coordinates, clipped.

        Samples whose gradient is not finite are zero, with a warning.
        """
        if step.pull_back is None:
            raise RuntimeError(f"{type(self).__name__} acts at a step that was evaluated without a graph")
        with_x = step.pull_back(self._finite(gradient, step))
        return self.kept(with_x / expand(step.process.unit_scale(step.sigma), with_x), step)

    def _finite(self, gradient: Tensor, step: Step) -> Tensor:
        """``gradient`` (B, ...), zero with a warning that names the loss where it is not finite."""
        return finite_or_unguided(
            gradient, rule=self.node.name, index=step.index, sigma=step.sigma, loss=name_of(self.loss)
        )
