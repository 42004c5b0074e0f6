"""Where samplers' noise comes from.

A *noise sampler* is `noise_sampler(sigma, sigma_next) -> noise`, called once for each step that adds noise;
noise is unit Gaussian of the shape of x. All noise is drawn on the CPU, so that a seed means the same on
every device.

* `batch_noise` is ComfyUI's: one generator for the whole batch. Item 0 of the *initial* noise does not depend
  on the batch; everything later does.
* `SeededNoise` has one generator per item: item i is the same alone and in any batch, in every step.
* `brownian_noise_sampler` reads increments off Brownian paths over sigma, so that the noise of an SDE sampler
  stays the same picture's noise when the number of steps changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from .errors import UserError

NoiseSampler = Callable[[float, float], Tensor]
"""noise_sampler(sigma, sigma_next) -> unit Gaussian noise, shape of x."""

MAX_SEED = 2**64 - 1


def batch_noise(shape: Sequence[int], seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Initial noise as ComfyUI's RandomNoise and KSampler draw it: one CPU generator for the batch.

    The global generator of torch is left alone.

    Args:
        shape: (B, ...).
        seed: in [0, 2**64 - 1].
        dtype: of the noise; ComfyUI draws in the dtype of the latent, float32.

    Returns:
        Unit Gaussian noise, on the CPU.
    """
    return torch.randn(tuple(shape), generator=_generator(seed), dtype=dtype)


class SeededNoise:
    """Noise with one seed per item of the batch; an object is good for one run.

    Call `initial` first and hand the object itself to a sampler as `noise_sampler`. The two continue the same
    streams, so the noise of the steps is never the initial noise again.

    Args:
        seeds: one per item, each in [0, 2**64 - 1].
        shape: (B, ...) of x, B = len(seeds); may be left to `initial`.
        dtype: of the noise.
        device: where the noise goes; it is drawn on the CPU.

    Raises:
        UserError: no seed, a seed out of range, or a shape of another batch size.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not seeds:
            raise UserError(
                "no seed", expected="one seed per item of the batch", mend="give a batch size of at least 1"
            )
        self.seeds = tuple(int(seed) for seed in seeds)
        self.dtype = dtype
        self.device = torch.device(device)
        self._generators = [_generator(seed) for seed in self.seeds]
        self._shape = None if shape is None else self._checked(shape)

    def initial(self, shape: Sequence[int] | None = None) -> Tensor:
        """Noise of shape (B, ...) to start from; later calls of the noise sampler have this shape too."""
        if shape is not None:
            self._shape = self._checked(shape)
        return self._draw()

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The noise of one step; the levels do not matter."""
        return self._draw()

    def _draw(self) -> Tensor:
        if self._shape is None:
            raise UserError(
                "noise of no known shape",
                expected="the shape of x",
                mend="call initial(shape) first, or give shape to SeededNoise",
            )
        item = self._shape[1:]
        noise = [torch.randn(item, generator=generator, dtype=self.dtype) for generator in self._generators]
        return torch.stack(noise).to(self.device)

    def _checked(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(shape) < 1 or shape[0] != len(self.seeds):
            raise UserError(
                f"{len(self.seeds)} seeds for a batch of shape {tuple(shape)}",
                expected="one seed per item of the batch",
                mend="make the noise's batch size that of the latent",
            )
        return tuple(shape)


class PathNoise:
    """A noise sampler that reads increments off a path: asked again for an interval, either way round, it gives no other noise.

    Args:
        increment: (sigma, sigma_next) -> unit Gaussian noise, its sign turned where the two change places.
    """

    def __init__(self, increment: NoiseSampler) -> None:
        self._increment = increment

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The path's noise of one step."""
        return self._increment(sigma, sigma_next)


def brownian_noise_sampler(
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
) -> PathNoise:
    """Noise from Brownian paths over sigma: (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|).

    With `seed`, one path for the whole batch, equal to k-diffusion's and ComfyUI's (on the CPU). With
    `seeds`, one path per item: item i is the same alone and in any batch.

    Args:
        x: (B, ...), for its shape, dtype and device.
        sigma_min: the smallest sigma above 0 of the run.
        sigma_max: its largest.
        seed: for the batch; give either this or seeds.
        seeds: one per item.

    Raises:
        UserError: both or neither of seed and seeds, a wrong number of seeds, or 0 < sigma_min < sigma_max
            not so.

    Reference:
        Li et al., arXiv:2001.01328, section 4 (virtual Brownian tree).
    """
    if (seed is None) == (seeds is None):
        raise UserError(
            "both seed and seeds" if seed is not None else "neither seed nor seeds",
            expected="one seed for the batch, or a list with one per item",
            mend="give exactly one of the two",
        )
    if not 0 < sigma_min < sigma_max:
        raise UserError(
            f"a Brownian path from sigma = {sigma_min:g} to {sigma_max:g}",
            expected="0 < sigma_min < sigma_max",
            mend="use a run of more steps, or a sampler without SDE noise",
        )
    if seeds is not None and len(seeds) != x.shape[0]:
        raise UserError(
            f"{len(seeds)} seeds for a batch of {x.shape[0]}",
            expected="one seed per item of the batch",
            mend="make the noise's batch size that of the latent",
        )
    from torchsde import BrownianTree  # slow to import

    start, end = (torch.tensor(float(sigma), dtype=torch.float32) for sigma in (sigma_min, sigma_max))

    def path(entropy: int, shape: torch.Size) -> BrownianTree:
        return BrownianTree(start, torch.zeros(shape, dtype=x.dtype), end, entropy=_checked_seed(entropy))

    whole = None if seed is None else path(seed, x.shape)
    paths = [path(entropy, x.shape[1:]) for entropy in seeds or ()]

    def increment(low: Tensor, high: Tensor) -> Tensor:
        if whole is not None:
            return cast(Tensor, whole(low, high))
        return torch.stack([cast(Tensor, single(low, high)) for single in paths])

    def noise_sampler(sigma: float, sigma_next: float) -> Tensor:
        here, there = (torch.tensor(float(level), dtype=torch.float32) for level in (sigma, sigma_next))
        low, high = torch.minimum(here, there), torch.maximum(here, there)
        sign = 1.0 if bool(here < there) else -1.0
        noise = increment(low, high) * sign / (high - low).sqrt()
        return noise.to(x.device, x.dtype)

    return PathNoise(noise_sampler)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed {seed}", expected=f"a whole number from 0 to {MAX_SEED}", mend="choose another seed")
    return int(seed)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_checked_seed(seed))
