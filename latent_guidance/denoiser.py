"""The Denoiser protocol, and the adapter that makes one of a network.

``denoiser(x, sigma, cond) -> denoised`` estimates E[x0 | x]. It is all that samplers and guidance rules ever see:
networks that predict eps, v, x0 or a flow are converted here, at the edge. ``denoiser.process`` says what x is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from .attention import AttentionPatch, unreachable
from .errors import UserError
from .parameterization import Parameterization
from .process import Process

Cond = Tensor | Mapping[str, "Cond"] | None
"""A condition: nothing, a tensor (B, ...), or a mapping of those. Its batch size is that of x."""


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of E[x0 | x], with x (B, ...) in the coordinates of ``process``, sigma (B,).

    A denoiser may offer further methods of the same arguments, for samplers that need more than the estimate:
    ``with_variance -> (denoised, variance)`` (see :meth:`NetworkDenoiser.with_variance`), and ``with_uncond ->
    (denoised, uncond_denoised)``, for a guided one: what a call gives, and the unconditional branch as its network
    gave it, before rules changed it (see `guidance.Guider.with_uncond`).
    """

    process: Process

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor: ...


class TimestepSchedule(Protocol):
    """What :class:`NetworkDenoiser` needs of a schedule (see ``schedules``)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's own time input for ``sigma`` (B,)."""
        ...


def for_run(denoiser: Denoiser, sigmas: Tensor) -> Denoiser:
    """The denoiser to use for one run over ``sigmas`` (N + 1,).

    A denoiser whose answers may depend on earlier calls (momentum) has a method ``begin(sigmas)`` that returns a
    fresh one; every sampler calls this first, so that state lives for one run and two runs are identical.
    """
    begin = getattr(denoiser, "begin", None)
    return denoiser if begin is None else cast(Denoiser, begin(sigmas))


def concat_conds(conds: Sequence[Cond]) -> Cond:
    """Conditions joined along the batch, so that several branches go through the network in one call.

    Token tensors (B, L, C) of different lengths L are repeated to the least common multiple of the lengths, which
    leaves cross-attention unchanged: every key is there equally often.

    Raises:
        UserError: the conditions are not of the same kind.
    """
    first = conds[0]
    if all(cond is None for cond in conds):
        return None
    if isinstance(first, Tensor) and all(isinstance(cond, Tensor) for cond in conds):
        tensors = cast(Sequence[Tensor], conds)
        if first.ndim == 3:
            length = math.lcm(*(cond.shape[1] for cond in tensors))
            tensors = [cond.repeat(1, length // cond.shape[1], 1) for cond in tensors]
        return torch.cat(list(tensors))
    if isinstance(first, Mapping) and all(isinstance(c, Mapping) and c.keys() == first.keys() for c in conds):
        mappings = cast(Sequence[Mapping[str, Cond]], conds)
        return {key: concat_conds([cond[key] for cond in mappings]) for key in first}
    raise UserError(
        f"conditions of different kinds: {', '.join(_kind(cond) for cond in conds)}",
        expected="the same kind, and the same entries, for every branch",
        mend="encode the unconditional branch the same way as the conditional one",
    )


def repeat_cond(cond: Cond, batch: int) -> Cond:
    """``cond`` of batch size 1 repeated to ``batch``; one that has this batch size already is returned as it is.

    Raises:
        UserError: another batch size.
    """
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {key: repeat_cond(entry, batch) for key, entry in cond.items()}
    if cond.shape[0] not in (1, batch):
        raise UserError(
            f"a condition of batch size {cond.shape[0]} for a batch of {batch} latents",
            expected=f"batch size 1 or {batch}",
            mend="encode one prompt for all latents, or one for each",
        )
    return cond.expand(batch, *cond.shape[1:]) if cond.shape[0] != batch else cond


def _kind(cond: Cond) -> str:
    if isinstance(cond, Mapping):
        return f"entries {sorted(cond)}"
    return "none" if cond is None else f"a tensor of shape {tuple(cond.shape)}"


class Network(Protocol):
    def __call__(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor: ...


class NetworkDenoiser:
    """A network as a Denoiser.

    ``network(x, timestep, cond)`` takes x (B, C, H, W) scaled by the parameterization's ``c_in``, ``timestep`` (B,)
    and returns (B, C, H, W), or (B, 2C, H, W) if ``learned_range`` (see :meth:`with_variance`). The answer has the dtype
    of x or fp32, whichever is wider, whatever the network computes in.

    Raises:
        UserError: an eps network under a schedule of zero terminal SNR.
    """

    def __init__(
        self,
        network: Network,
        parameterization: Parameterization,
        schedule: TimestepSchedule,
        *,
        learned_range: bool = False,
    ) -> None:
        if parameterization.name == "epsilon" and getattr(schedule, "zero_terminal", False):
            raise UserError(
                "an eps network under a schedule of zero terminal SNR",
                expected="a v or x0 network: at pure noise eps says nothing of x0",
                mend="use the schedule the network was trained with (rescale_betas_zero_snr off)",
            )
        self.network = network
        self.parameterization = parameterization
        self.schedule = schedule
        self.learned_range = learned_range
        self.process = parameterization.process

    def _output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        sigma = sigma.expand(x.shape[0])
        scaled = self.parameterization.c_in(sigma).reshape(-1, *(1,) * (x.ndim - 1)) * x
        output = self.network(scaled, self.schedule.timestep(sigma), cond)
        channels = x.shape[1] * (2 if self.learned_range else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise UserError(
                f"a network output of shape {tuple(output.shape)} for a latent of shape {tuple(x.shape)}",
                expected=f"{channels} channels and the latent's other sizes",
                mend="use the network with latents of its own number of channels (and say learned_range if it predicts a variance)",
            )
        return output.to(torch.promote_types(x.dtype, torch.float32))

    def check_patch(self, patch: AttentionPatch) -> None:
        """Refuse a change of attention that the network does not let in, or that names layers which it has not got.

        Raises:
            UserError: saying so.
        """
        check = getattr(self.network, "check_patch", None)
        if check is None:
            raise unreachable(patch, type(self.network).__name__)
        check(patch)

    def patched(self, patches: Sequence[AttentionPatch | None]) -> AbstractContextManager[Any]:
        """In this context sample i of a call goes through the network with ``patches[i]``; None leaves it as it is."""
        network: Any = self.network
        return network.patched(patches)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        output = self._output(x, sigma, cond)[:, : x.shape[1]]
        return self.parameterization.denoised(x.to(output.dtype), output, sigma)

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """Denoised, and the learned interpolation v in [-1, 1] between log beta-tilde and log beta (both like x).

        Reference: arXiv 2102.09672, eq. 15; the variance is exp(f * log beta + (1 - f) * log beta-tilde), f = (v + 1) / 2.
        """
        if not self.learned_range:
            raise UserError(
                "a network that predicts no variance",
                expected="a learned-range network (2C output channels)",
                mend="choose variance 'beta' or 'beta_tilde' in the DDPM sampler",
            )
        output = self._output(x, sigma, cond)
        output, variance = output.split(x.shape[1], dim=1)
        return self.parameterization.denoised(x.to(output.dtype), output, sigma), variance
