"""What rules that follow a network on noisy latents share: where they act, and the gradient.

Such a network sees x brought to unit variance, ``u = x / sqrt(alpha**2 + sigma**2)``, and the log signal-to-noise ratio
``log(alpha**2 / sigma**2)``, so that one network guides every model on its VAE: eps, v or flow. The gradient is taken
with respect to u, which is x in VP coordinates, and brought back by the chain rule, grad_x = grad_u / sqrt(alpha**2 + sigma**2).
Outside the noise range that the network was trained on the gradient is zero by definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..process import Process, expand
from .base import Rule
from .gradient import clip_norm, finite_or_unguided, input_gradient, normal_parameters_
from .latents import Latents
from .limited_interval import check_window, inside_window


class NetworkConfig(Protocol):
    """What a rule must know of a network on noisy latents."""

    latent_channels: int
    scaling_factor: float
    shift_factor: float
    log_snr_range: tuple[float, float]
    latent_space: str


class NoisyNetwork(Protocol):
    """A network on noisy latents as rules see it; ``network`` is the module behind it, None for one in closed form.

    One loaded from a file has a ``fingerprint`` too (see :func:`.base.network_key`).
    """

    @property
    def config(self) -> NetworkConfig: ...

    network: nn.Module | None


def check_network_latents(config: NetworkConfig, latents: Latents, what: str, where: str, loader: str) -> None:
    """Refuse a network made for other latents than a model's.

    Args:
        config: of the network.
        latents: the model's.
        what: what errors call the network.
        where: the rule or the loss that goes by it.
        loader: the node that loads one.

    Raises:
        UserError: naming both kinds of latents.
    """
    mine = Latents(config.latent_space, config.latent_channels, config.scaling_factor, config.shift_factor)
    if not mine.same_as(latents):
        raise UserError(
            f"a {what} for the latents of {mine} in {where}, on a model with the latents of {latents}",
            expected=f"a {what} trained on the latents of {latents.name!r}",
            mend=f"choose one in the node {loader}, train one on these latents, or load a model on {mine.name!r}",
        )


def check_network_shape(config: NetworkConfig, shape: tuple[int, ...], what: str, loader: str) -> None:
    """Raise UserError unless ``shape`` is that of the pictures' latents which a network takes; see :func:`check_network_latents`."""
    channels = config.latent_channels
    if len(shape) != 4 or shape[1] != channels:
        raise UserError(
            f"a latent of shape {shape} for a {what} of {channels} channels",
            expected=f"(batch, {channels}, height, width)",
            mend=f"use the {what} with the model it was trained for (the node {loader})",
        )


class NoisyNetworkRule(Rule):
    """Base of the rules that follow one network on noisy latents. Subclasses have these fields, as knobs."""

    what: ClassVar[str]
    """What errors call the network."""
    loader: ClassVar[str]
    """The node that loads one."""

    guidance_scale: float
    sigma_lo: float
    sigma_hi: float
    every_k: int
    mask: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi, self.node.name)

    @property
    def followed(self) -> NoisyNetwork:
        """The network."""
        raise NotImplementedError(f"{type(self).__name__} must say which network it follows")

    def networks(self) -> tuple[Any, ...]:
        return (self.followed,)

    def check_latents(self, latents: Latents) -> None:
        check_network_latents(self.followed.config, latents, self.what, self.node.name, self.loader)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        check_network_shape(self.followed.config, shape, self.what, self.loader)
        if self.mask is not None:
            batch_of_masks(self.mask, shape[0])

    def closed(self, process: Process, sigmas: Tensor) -> str:
        if self.guidance_scale == 0 or any(bool(self.active(process, s[None], i).any()) for i, s in enumerate(sigmas)):
            return ""
        low, high = (
            float(process.sigma_from_alphas_cumprod(torch.tensor(bound, dtype=torch.float64).sigmoid()))
            for bound in reversed(self.followed.config.log_snr_range)
        )
        every = f", every {self.every_k} steps" if self.every_k > 1 else ""
        window = f"its window is ({self.sigma_lo:g}, {self.sigma_hi:g}]{every}"
        return f"{window}, the {self.what} was trained at {low:.3g} to {high:.3g}"

    def active(self, process: Process, sigma: Tensor, index: int | None) -> Tensor:
        """Which samples (B,) the rule acts on: sigma window, every k-th step, the network's own noise range."""
        low, high = self.followed.config.log_snr_range
        log_snr = process.log_snr(sigma)
        on_turn = index is None or index % self.every_k == 0
        trained = (log_snr >= low) & (log_snr <= high)
        return inside_window(sigma, self.sigma_lo, self.sigma_hi) & trained & on_turn

    def pushed(
        self,
        process: Process,
        x: Tensor,
        sigma: Tensor,
        index: int | None,
        value: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        largest: float,
        weight: Callable[[Tensor], Tensor] | None = None,
        heard: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """``w * grad_u value(u)`` (B, C, H, W) with respect to u, the unit-variance x; gated, clipped, masked.

        Args:
            process: what x is.
            x: (B, C, H, W) in the coordinates of ``process``.
            sigma: (B,).
            index: of the step, for ``every_k``; None lets every call act.
            value: (u, log-SNR (B,)) -> what is to grow (B,), and anything (B, ...) that ``weight`` wants. It is called for the samples
                on which the rule acts, outside inference mode.
            largest: norm to which each sample's gradient is clipped.
            weight: from ``value``'s second answer to what each sample's w is multiplied by, (B,).
            heard: is given ``value``'s second answer, and which samples it is for (a mask over the whole batch).

        Raises:
            UserError: x is not of the network's latents.
        """
        self.check_shape(tuple(x.shape))
        result = torch.zeros_like(x)
        active = self.active(process, sigma, index)
        if self.guidance_scale == 0 or not bool(active.any()):
            return result
        if (network := self.followed.network) is not None:
            normal_parameters_(network)
        with torch.inference_mode(False):
            # what autograd saves must not be an inference tensor
            log_snr = process.log_snr(sigma)[active].clone()
            u = (x * expand(process.unit_scale(sigma), x))[active]
            gradient, extra = input_gradient(lambda u: value(u, log_snr), u)
        if heard is not None:
            heard(extra, active)
        gradient = self.guidance_scale * clip_norm(gradient, largest)
        if weight is not None:
            gradient = gradient * expand(weight(extra).to(gradient), gradient)
        result[active] = finite_or_unguided(gradient.to(x.dtype), rule=self.node.name, index=index, sigma=sigma[active])
        return result if self.mask is None else result * resized_mask(self.mask, x)


def spread(values: Tensor, active: Tensor) -> Tensor:
    """``values`` of the samples in the mask ``active`` (B,), as (B,) with NaN for the others."""
    result = torch.full(active.shape, torch.nan, dtype=values.dtype, device=values.device)
    result[active.to(values.device)] = values
    return result


def batch_of_masks(mask: Tensor, batch: int) -> Tensor:
    """A mask (H, W) or (N, H, W) as (N, H, W), N being 1 or ``batch``.

    Raises:
        UserError: another number of masks.
    """
    mask = mask if mask.ndim == 3 else mask[None]
    if mask.shape[0] not in (1, batch):
        raise UserError(
            f"{mask.shape[0]} masks for a batch of {batch}",
            expected="one mask, or one for each picture",
            mend="connect a single mask",
        )
    return mask


def resized_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (H, W) or (B, H, W) in [0, 1] at x's own height and width, (1 or B, 1, h, w) in x's dtype.

    Raises:
        UserError: the mask's batch is neither 1 nor x's.
    """
    mask = batch_of_masks(mask, x.shape[0])
    return nn.functional.interpolate(mask[:, None].to(x), size=x.shape[-2:], mode="bilinear", antialias=True)
