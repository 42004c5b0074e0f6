"""A guided denoiser, whatever evaluates its branches: what the library's Guider and a host's have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..denoiser import Cond
from ..process import Process
from .gradient import normal_model_
from .run import EvaluateAt, GuidanceRun


class GuidedDenoiser(ABC):
    """A Denoiser whose estimates the rules of ``run`` guide. A subclass says how branches are evaluated."""

    process: Process
    run: GuidanceRun

    @abstractmethod
    def denoisers(self) -> Iterable[Any]:
        """Every denoiser that :meth:`evaluate` calls."""

    @abstractmethod
    def evaluate(
        self, names: tuple[str, ...], x: Tensor, sigma: Tensor, cond: Cond, *, variance: bool = False
    ) -> list[dict[str, Tensor]]:
        """The estimates (B, ...) of the named branches by name; with ``variance`` the learned variances, too, of "cond" at least.

        Raises:
            UserError: a condition that is not there, or a model that predicts no variance.
        """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        """Guided estimate (B, ...) of x (B, ...) at sigma (B,); ``cond`` has batch size 1 or B."""
        return self._guided(x, sigma, lambda names, at, level: self.evaluate(names, at, level, cond)[0])

    def with_uncond(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """The guided estimate, as a call gives it, and the unconditional branch as the model gave it, whatever rules made of it.

        Raises:
            UserError: there is no unconditional condition.
        """
        seen: dict[str, Tensor] = {}

        def evaluate(names: tuple[str, ...], at: Tensor, level: Tensor) -> Mapping[str, Tensor]:
            found = self.evaluate(names, at, level, cond)[0]
            seen.update({name: estimate.detach() for name, estimate in found.items()})
            return found

        return self._guided(x, sigma, evaluate, also=("uncond",)), seen["uncond"]

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """The guided estimate and the conditional branch's learned variance (see ``NetworkDenoiser.with_variance``)."""
        variances: list[Tensor] = []

        def evaluate(names: tuple[str, ...], at: Tensor, level: Tensor) -> Mapping[str, Tensor]:
            estimates, variance = self.evaluate(names, at, level, cond, variance=True)
            variances.append(variance["cond"].detach())
            return estimates

        return self._guided(x, sigma, evaluate), variances[0]

    def _guided(self, x: Tensor, sigma: Tensor, evaluate: EvaluateAt, *, also: tuple[str, ...] = ()) -> Tensor:
        def differentiable(names: tuple[str, ...], at: Tensor, level: Tensor) -> Mapping[str, Tensor]:
            for denoiser in self.denoisers():
                normal_model_(denoiser)
            return evaluate(names, at, level)

        return self.run(x, sigma, lambda names: evaluate(names, x, sigma), also=also, differentiable=differentiable)
