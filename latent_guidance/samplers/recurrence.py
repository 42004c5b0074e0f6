"""Recurrence, also called time travel: a step is taken, its result is noised back to where it began, and it is taken again.

Each repeat gives guidance another chance at the same noise level, for as many network passes as the step costs. With an exact
denoiser and small steps nothing changes: a step carries the marginal of one level to that of the next, and fresh noise carries it back.

Reference:
    Lugmayr et al., arXiv:2201.09865, section 4.2 (resampling); Bansal et al., arXiv:2302.07121, algorithm 1 (self-recurrence, k
    repeats); Yu et al., arXiv:2303.09833, algorithm 2 (time travel, in a window). There in VP coordinates: x_t = sqrt(a) x_{t-1} +
    sqrt(1 - a) noise with a = alpha_bar_t / alpha_bar_{t-1}, which is `common.renoise` in the coordinates of every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UserError
from ..noise import NoiseSampler, PathNoise
from ..process import Process
from .common import check_range, draw, renoise


@dataclass(frozen=True)
class Recurrence:
    """How often the steps of a run are taken.

    Attributes:
        times: how often in all; 1, the neutral value, is once. The step's network passes are multiplied by it.
        sigma_lo: steps that begin at this noise level or below are taken once.
        sigma_hi: steps that begin above this one too.

    Raises:
        UserError: times that is no whole number of at least 1, or a window that never opens.
    """

    times: int = 1
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or self.times < 1:
            raise UserError(
                f"a recurrence of {self.times!r} times",
                expected="a whole number of at least 1",
                mend="set recurrence to 1 to take every step once",
            )
        check_range("recurrence's sigma_lo", self.sigma_lo, 0, math.inf)
        if not self.sigma_lo < self.sigma_hi:
            raise UserError(
                f"a recurrence from sigma_lo = {self.sigma_lo:g} to sigma_hi = {self.sigma_hi:g}, which never opens",
                expected="sigma_lo below sigma_hi",
                mend="lower sigma_lo, or raise sigma_hi",
            )

    def visits(self, process: Process, sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
        """(step, sigma, sigma_next, whether x has to :func:`go_back` afterwards), for every time that a step is taken.

        Where alpha = 0 a step is taken once: going back there would leave nothing of what it found.
        """
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            repeated = self.sigma_lo < float(sigma) <= self.sigma_hi and bool(process.alpha(sigma) > 0)
            for left in reversed(range(self.times if repeated else 1)):
                yield i, sigma, sigma_next, left > 0

    def levels(self, process: Process, sigmas: Tensor) -> Tensor:
        """Where the network is called in a run over ``sigmas`` (N + 1,) by a sampler that calls once a step, (M,), M >= N."""
        return torch.stack([sigma for _, sigma, _, _ in self.visits(process, sigmas)])


ONCE = Recurrence()
"""Every step once."""


def go_back(
    process: Process, x: Tensor, sigma_next: Tensor, sigma: Tensor, noise_sampler: NoiseSampler | None
) -> Tensor:
    """x (B, ...) at sigma_next () brought back to sigma () with fresh noise.

    Raises:
        UserError: the noise is a path's. Back over an interval it gives the step's own noise with its sign turned, and every repeat
            would have the same.
    """
    if isinstance(noise_sampler, PathNoise):
        raise UserError(
            "recurrence with the noise of a Brownian path, which is the same at every repeat of a step",
            expected="a noise sampler that draws anew each time it is called",
            mend="give SeededNoise as noise_sampler, or take every step once",
        )
    return renoise(process, x, sigma_next, sigma, draw(noise_sampler, sigma_next, sigma, x))
