"""CFG++ and Rectified-CFG++ against their papers' equations, written out here, and against the plain samplers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.analytic import GaussianMixture
from latent_guidance.denoiser import Cond
from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, Guider
from latent_guidance.noise import SeededNoise
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand
from latent_guidance.samplers import (
    sample_ddim,
    sample_ddim_cfg_pp,
    sample_dpmpp_2m,
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_rectified_cfg_pp,
)

SAME, APART = 1e-10, 1e-2
PROCESSES = {"ve": VE_SCALED, "flow": RECTIFIED_FLOW}
LEVELS = {"ve": [14.6, 6.0, 2.5, 1.0, 0.3, 0.0], "flow": [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]}
CLASS = torch.tensor([1, 1, 0])
both = pytest.mark.parametrize("process", PROCESSES)
Sampler = Callable[..., Tensor]


def sigmas_of(process: str) -> Tensor:
    return torch.tensor(LEVELS[process], dtype=torch.float64)


def mixture(process: Process) -> GaussianMixture:
    means = torch.tensor([[1.2, 0.1], [-0.4, 0.9], [-0.3, -1.0]], dtype=torch.float64)
    covs = torch.diag_embed(torch.tensor([[0.25, 0.3], [0.2, 0.35], [0.3, 0.15]], dtype=torch.float64))
    return GaussianMixture(process, torch.tensor([0.2, 0.5, 0.3]), means, covs, torch.tensor([0, 1, 1]))


def guided(process: str, scale: float) -> Guider:
    return Guider(mixture(PROCESSES[process]), [CFG(guidance_scale=scale)], uncond=torch.tensor([-1]))


def start(process: str) -> Tensor:
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return sigmas_of(process)[0] * noise


def toy_noise(seed: int = 5) -> Callable[[float, float], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(3, 2, generator=generator, dtype=torch.float64)


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


class Both:
    """The guided and the unconditional estimate at one level, for loops that are written out here."""

    def __init__(self, process: str, scale: float) -> None:
        self.model, self.scale = mixture(PROCESSES[process]), scale

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        levels = sigma.expand(len(x))
        uncond, cond = self.model(x, levels), self.model(x, levels, CLASS)
        return uncond + self.scale * (cond - uncond), uncond


def algorithm_2(scale: float, x: Tensor, sigmas: Tensor, *, by_uncond: bool = True) -> Tensor:
    """Algorithm 2 of the paper in its own, VP, coordinates: z = sqrt(abar) x0 + sqrt(1 - abar) eps."""
    model = mixture(VE_SCALED)
    abars = 1 / (1 + sigmas**2)
    z = x * abars[0].sqrt()
    for abar, abar_next in pairwise(abars):
        sigma = ((1 - abar) / abar).sqrt().expand(len(x))
        eps_u, eps_c = (
            (z - abar.sqrt() * model(z / abar.sqrt(), sigma, cond)) / (1 - abar).sqrt() for cond in (None, CLASS)
        )
        eps = eps_u + scale * (eps_c - eps_u)
        z0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
        z = abar_next.sqrt() * z0 + (1 - abar_next).sqrt() * (eps_u if by_uncond else eps)
    return z / abars[-1].sqrt()


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 2.5])
def test_ddim_is_algorithm_2_of_the_paper(scale: float) -> None:
    x, sigmas = start("ve"), sigmas_of("ve")[:-1]
    found = sample_ddim_cfg_pp(guided("ve", scale), x, sigmas, CLASS)
    assert far(found, algorithm_2(scale, x, sigmas)) < SAME
    plain = algorithm_2(scale, x, sigmas, by_uncond=False)
    assert (far(found, plain) > APART) is (scale != 0), "noise of the guided estimate is plain CFG"


def k_diffusion(kind: str, scale: float, x: Tensor, sigmas: Tensor, noise: Callable[..., Tensor]) -> Tensor:
    """The solvers in VE coordinates as the paper's authors have them, in their order of operations."""
    estimates, old = Both("ve", scale), None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond = estimates(x, sigma)
        if kind == "2m" and old is not None and sigma_next > 0:
            t_last, t, t_next = (-level.log() for level in sigmas[i - 1 : i + 2])
            h, r = t_next - t, (t - t_last) / (t_next - t)
            mixed = -torch.exp(-h) * uncond - torch.expm1(-h) * (denoised - old) / (2 * r)
            x = denoised + mixed + torch.exp(-h) * x
        else:
            up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).sqrt() if kind == "ancestral" else 0 * sigma
            x = denoised + (sigma_next**2 - up**2).sqrt() * (x - uncond) / sigma
            if up > 0:
                x = x + up * noise(sigma, sigma_next)
        old = uncond
    return x


@pytest.mark.parametrize(
    ("kind", "sampler", "options"),
    [
        ("euler", sample_ddim_cfg_pp, {}),
        ("ancestral", sample_ddim_cfg_pp, {"eta": 1.0}),
        ("2m", sample_dpmpp_2m_cfg_pp, {}),
    ],
)
def test_the_authors_solvers_in_ve_coordinates(kind: str, sampler: Sampler, options: dict[str, Any]) -> None:
    x, sigmas = start("ve"), sigmas_of("ve")
    found = sampler(guided("ve", 0.7), x, sigmas, CLASS, noise_sampler=toy_noise(), **options)
    for other in ("euler", "ancestral", "2m"):
        expected = k_diffusion(other, 0.7, x, sigmas, toy_noise())
        assert far(found, expected) < SAME if other == kind else far(found, expected) > APART


def test_on_flow_the_noise_is_kept_and_not_the_velocity() -> None:
    x, sigmas = start("flow"), sigmas_of("flow")
    found = sample_ddim_cfg_pp(guided("flow", 0.7), x, sigmas, CLASS)
    ours, theirs, estimates = x, x, Both("flow", 0.7)
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = estimates(ours, sigma)
        ours = (1 - sigma_next) * denoised + sigma_next * (ours - (1 - sigma) * uncond) / sigma
        denoised, uncond = estimates(theirs, sigma)
        theirs = denoised + sigma_next * (theirs - uncond) / sigma  # the appendix's form
    assert far(found, ours) < SAME and far(found, theirs) > APART


class InVeCoordinates:
    """A flow model's denoiser for y = x / alpha, whose noise level is sigma / alpha."""

    process = VE_SCALED

    def __init__(self, guider: Guider) -> None:
        self.guider = guider

    def _at(self, y: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return y / expand(1 + level, y), level / (1 + level)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.guider(*self._at(x, sigma), cond)

    def with_uncond(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self.guider.with_uncond(*self._at(x, sigma), cond)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [(sample_ddim_cfg_pp, {}), (sample_ddim_cfg_pp, {"eta": 1.0}), (sample_dpmpp_2m_cfg_pp, {})],
)
def test_flow_is_ve_in_other_coordinates(sampler: Sampler, options: dict[str, Any]) -> None:
    """One method for both processes: x / alpha of a flow run is the VE run of the same model."""
    sigmas, guider = sigmas_of("flow")[1:], guided("flow", 0.7)
    x = start("flow")
    found = sampler(guider, x, sigmas, CLASS, noise_sampler=toy_noise(), **options)
    levels = sigmas / (1 - sigmas)
    y = x / (1 - sigmas[0])
    expected = sampler(InVeCoordinates(guider), y, levels, CLASS, noise_sampler=toy_noise(), **options)
    assert far(found, expected) < SAME and far(found, x) > APART


@both
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_scale_0_is_the_plain_sampler_of_the_unconditional_model(process: str, eta: float) -> None:
    x, sigmas, model = start(process), sigmas_of(process), mixture(PROCESSES[process])
    found = sample_ddim_cfg_pp(guided(process, 0.0), x, sigmas, CLASS, eta=eta, noise_sampler=toy_noise())
    assert torch.equal(found, sample_ddim(model, x, sigmas, eta=eta, noise_sampler=toy_noise()))
    second = sample_dpmpp_2m_cfg_pp(guided(process, 0.0), x, sigmas, CLASS)
    plain = sample_dpmpp_2m(model, x, sigmas) if process == "ve" else sample_dpmpp_2m_sde(model, x, sigmas, eta=0.0)
    assert far(second, plain) < SAME
    assert far(second, sample_dpmpp_2m_cfg_pp(guided(process, 0.1), x, sigmas, CLASS)) > APART


@both
def test_a_step_is_a_step_of_plain_cfg_at_a_larger_scale(process: str) -> None:
    """lambda = w (1 - r) with r = (sigma' / alpha') / (sigma / alpha); r itself as scale is another run."""
    x, kind = start(process), PROCESSES[process]
    for sigma, sigma_next in pairwise(sigmas_of(process)[1:]):
        grid = torch.stack([sigma, sigma_next])
        ratio = float(kind.alpha(sigma) / sigma * sigma_next / kind.alpha(sigma_next))
        found = sample_ddim_cfg_pp(guided(process, 0.6), x, grid, CLASS)
        assert far(found, sample_euler(guided(process, 0.6 / (1 - ratio)), x, grid, CLASS)) < SAME
        if sigma_next > 0:
            assert far(found, sample_euler(guided(process, 0.6), x, grid, CLASS)) > 1e-4


@both
def test_what_is_added_to_the_estimate_counts_more_than_under_euler(process: str) -> None:
    """1 / (1 - r) times as much, on flow too; an alpha' before it, or r itself, would be another number there."""

    class Pushed:
        def __init__(self, push: float) -> None:
            self.process: Process = PROCESSES[process]
            self.push = push

        def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
            return x / 3 + self.push

        def with_uncond(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
            return self(x, sigma, cond), x / 3

    x, kind = start(process), PROCESSES[process]
    for sigma, sigma_next in pairwise(sigmas_of(process)[1:-1]):
        grid = torch.stack([sigma, sigma_next])
        ratio = float(kind.alpha(sigma) / sigma * sigma_next / kind.alpha(sigma_next))
        ours, eulers = (
            run(Pushed(1.0), x, grid) - run(Pushed(0.0), x, grid) for run in (sample_ddim_cfg_pp, sample_euler)
        )
        assert far(ours, eulers / (1 - ratio)) < SAME
        assert far(ours, eulers) > APART


# --- Rectified-CFG++ ----------------------------------------------------------------------------------------------------


def algorithm_1(x: Tensor, sigmas: Tensor, scale: float, gamma: float, ahead: float = 0.5) -> Tensor:
    """Algorithm 1 of arXiv:2510.07631 on velocities; ``ahead`` is how much of the step the predictor goes."""
    model = mixture(RECTIFIED_FLOW)

    def v(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return (x - model(x, t.expand(len(x)), cond)) / t

    for t, t_next in pairwise(sigmas):
        dt = t_next - t
        v_t = v(x, t, CLASS)
        x_mid, t_mid = x + ahead * dt * v_t, t + ahead * dt
        strength = scale * (1 - t) ** gamma
        x = x + dt * (v_t + strength * (v(x_mid, t_mid, CLASS) - v(x_mid, t_mid, None)))
    return x


@pytest.mark.parametrize(("scale", "gamma"), [(3.0, 0.0), (2.0, 1.5)])
def test_rectified_is_algorithm_1_of_its_paper(scale: float, gamma: float) -> None:
    x, sigmas = start("flow"), sigmas_of("flow")
    found = sample_rectified_cfg_pp(guided("flow", 1.0), x, sigmas, CLASS, scale=scale, gamma=gamma)
    assert far(found, algorithm_1(x, sigmas, scale, gamma)) < SAME
    assert far(found, algorithm_1(x, sigmas, scale, gamma, ahead=0.75)) > APART
    assert far(found, algorithm_1(x, sigmas, scale, gamma + 0.5)) > APART


def test_rectified_at_scale_0_is_euler_and_costs_no_more() -> None:
    class Counting(Guider):
        asked: int = 0

        def begin(self, sigmas: Tensor) -> Guider:
            return self

        def with_uncond(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
            self.asked += 1
            return super().with_uncond(x, sigma, cond)

    x, sigmas = start("flow"), sigmas_of("flow")
    counting = Counting(mixture(RECTIFIED_FLOW), [], uncond=torch.tensor([-1]))
    found = sample_rectified_cfg_pp(counting, x, sigmas, CLASS, scale=0.0)
    assert torch.equal(found, sample_euler(guided("flow", 1.0), x, sigmas, CLASS)) and counting.asked == 0
    sample_rectified_cfg_pp(counting, x, sigmas, CLASS, scale=1.0)
    assert counting.asked == len(sigmas) - 1


def test_rectified_noise_ahead_is_each_pictures_own() -> None:
    x, sigmas = start("flow"), sigmas_of("flow")

    def run(picked: slice, seeds: list[int], level: float) -> Tensor:
        noise = SeededNoise(seeds, x[picked].shape, dtype=x.dtype)
        return sample_rectified_cfg_pp(
            guided("flow", 1.0), x[picked], sigmas, CLASS[picked], noise_sampler=noise, predictor_noise=level
        )

    together = run(slice(0, 3), [1, 2, 3], 0.1)
    torch.testing.assert_close(together[1:2], run(slice(1, 2), [2], 0.1), rtol=0, atol=1e-12)
    assert far(together, run(slice(0, 3), [1, 2, 3], 0.0)) > 1e-4


# --- who can serve them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [sample_ddim_cfg_pp, sample_dpmpp_2m_cfg_pp, sample_rectified_cfg_pp])
def test_a_denoiser_without_an_unconditional_estimate_is_refused(sampler: Sampler) -> None:
    x, sigmas, model = start("flow"), sigmas_of("flow"), mixture(RECTIFIED_FLOW)
    with pytest.raises(UserError, match=r"knows no unconditional estimate.*Guider.*uncond"):
        sampler(model, x, sigmas, CLASS)
    with pytest.raises(UserError, match=r"no unconditional condition.*give uncond="):
        sampler(Guider(model, []), x, sigmas, CLASS)
