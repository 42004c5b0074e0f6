"""What a rule with momentum remembers, one entry for each noise level and not for each call.

Some samplers evaluate the model twice at one level (Heun corrects at the level where the next step begins). The second evaluation
takes the place of the first, so that momentum means the same with every sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..process import expand
from .gradient import normal
from .grid import ROUNDING


class LevelMemory:
    """A tensor per sample, carried from noise level to noise level of one run. Make it when a rule is bound."""

    def __init__(self) -> None:
        self._sigma: Tensor | None = None
        self._settled = self._latest = torch.empty(0)
        self._known = torch.empty(0, dtype=torch.bool)

    def recall(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What was kept at the noise level before ``sigma`` (B,), as (B, ...), and whether anything was, as (B,).

        Args:
            sigma: the level of the estimate at hand.
            like: (B, ...), of the shape, dtype and device that the answer is to have; where nothing was kept it is zeros. A
                memory of another shape is forgotten: it is of other samples.
        """
        if self._sigma is None or self._latest.shape != like.shape:
            self._settled = torch.zeros_like(like)
            self._known = torch.zeros_like(sigma, dtype=torch.bool)
        else:
            self._latest, self._settled, self._known = normal((self._latest, self._settled, self._known))
            before = normal(self._sigma).to(sigma)
            moved = (sigma - before).abs() > ROUNDING * torch.maximum(sigma, before)
            self._settled = torch.where(expand(moved, like), self._latest.to(like), self._settled.to(like))
            self._known = self._known | moved
        self._sigma = sigma
        return self._settled, self._known

    def keep(self, value: Tensor) -> None:
        """Remember ``value`` (B, ...) of the level that was last recalled for; a second one there takes its place.

        It is remembered as a number: gradients through the denoiser stop at the step.
        """
        self._latest = value.detach()
