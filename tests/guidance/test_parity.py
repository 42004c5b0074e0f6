"""Equal numbers to the programs that guidance is known from, written anew here from what their functions say.

* openai/guided-diffusion (the code of arXiv 2105.05233), guided_diffusion/gaussian_diffusion.py: condition_mean, condition_score, and
  p_sample and ddim_sample, which call them;
* LuChengTHU/dpm-solver, dpm_solver_pytorch.py: the branch "classifier" of model_wrapper;
* pamparamm/sd-perturbed-attention, pag_nodes.py and guidance_utils.py: how PAG, SEG and SWG are joined to what CFG gave.

What is written here of the first two was held against their own functions (commits 22e0df8 and 52bc3fb) on these numbers: it differs from
guided-diffusion by the rounding of its float32 coefficients, 2e-6 at most, and from dpm-solver by that of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.guidance import (
    CFG,
    ClassifierGuidance,
    ClassifierMeanShift,
    GuidanceRun,
    Guider,
    PerturbedAttention,
    SlidingWindow,
    SmoothedEnergy,
    WeakenedPass,
)
from latent_guidance.guidance.steps import sampler_options
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.samplers import sample_ddim, sample_ddpm

from .conftest import SmallClassifier, drawn

PROCESSES = [VE_SCALED, RECTIFIED_FLOW]
SCALE = 3.0
LABEL = 2
CLASSIFIER = SmallClassifier()
X_VP = drawn(3, 4, 6, 5)
NOISES = [drawn(3, 4, 6, 5, seed=10 + i) for i in range(4)]


def eps_of(x_vp: Tensor, abar: float) -> Tensor:
    """The network, in VP coordinates."""
    return torch.tanh(x_vp + 0.3 * x_vp.roll(1, dims=-1)) * (1.5 - abar)


def range_of(x_vp: Tensor, abar: float) -> Tensor:
    """Its further channels: where in [-1, 1] the log of the variance lies."""
    return torch.sin(3 * x_vp + abar)


def gradient_of(x_vp: Tensor, abar: float) -> Tensor:
    """cond_fn: the scale times the gradient of log p(LABEL | x) with respect to x in VP coordinates."""
    leaf = x_vp.detach().requires_grad_()
    log_snr = torch.full((len(x_vp),), math.log(abar / (1 - abar)), dtype=torch.float64)
    log_p = CLASSIFIER.logits(leaf, log_snr).log_softmax(dim=1)[:, LABEL]
    return SCALE * torch.autograd.grad(log_p.sum(), leaf)[0]


class Network:
    """The same network as a denoiser of a process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def in_vp(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, float]:
        return x * self.process.unit_scale(sigma[0]), float(self.process.alphas_cumprod(sigma[0]))

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        x_vp, abar = self.in_vp(x, sigma)
        return (x_vp - (1 - abar) ** 0.5 * eps_of(x_vp, abar)) / abar**0.5

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self(x, sigma), range_of(*self.in_vp(x, sigma))


class GuidedDiffusion:
    """DDPM and DDIM of guided-diffusion on x in VP coordinates, over alpha-bars (N,) that fall as t counts up; 1 comes after t = 0."""

    def __init__(self, abars: list[float], variance: str) -> None:
        self.abars, self.variance = abars, variance

    def levels(self, t: int) -> tuple[float, float, float]:
        """alpha-bar at t, at t - 1, and beta."""
        before = self.abars[t - 1] if t else 1.0
        return self.abars[t], before, 1 - self.abars[t] / before

    def posterior_mean(self, x0: Tensor, x: Tensor, t: int) -> Tensor:
        abar, before, beta = self.levels(t)
        return (beta * before**0.5 * x0 + (1 - before) * (1 - beta) ** 0.5 * x) / (1 - abar)

    def variance_of(self, x: Tensor, t: int) -> Tensor:
        abar, before, beta = self.levels(t)
        small = beta * (1 - before) / (1 - abar)
        if self.variance == "learned_range":
            share = (range_of(x, abar) + 1) / 2
            return (share * math.log(beta) + (1 - share) * math.log(small)).exp()
        return torch.full_like(x, beta if self.variance == "beta" else small)

    def x0_of(self, eps: Tensor, x: Tensor, t: int) -> Tensor:
        return (x - (1 - self.abars[t]) ** 0.5 * eps) / self.abars[t] ** 0.5

    def p_sample(self, x: Tensor, t: int, noise: Tensor) -> Tensor:
        """With condition_mean: the mean is moved by the variance times the gradient at x_t."""
        abar, variance = self.abars[t], self.variance_of(x, t)
        mean = self.posterior_mean(self.x0_of(eps_of(x, abar), x, t), x, t) + variance * gradient_of(x, abar)
        return mean + variance.sqrt() * noise if t else mean

    def condition_score(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """eps and x0 of the score with the classifier's added to it."""
        abar = self.abars[t]
        eps = eps_of(x, abar) - (1 - abar) ** 0.5 * gradient_of(x, abar)
        return eps, self.x0_of(eps, x, t)

    def ddim_sample(self, x: Tensor, t: int, noise: Tensor, eta: float) -> Tensor:
        eps, x0 = self.condition_score(x, t)
        abar, before, beta = self.levels(t)
        fresh = eta * ((1 - before) / (1 - abar)) ** 0.5 * beta**0.5
        return before**0.5 * x0 + (1 - before - fresh**2) ** 0.5 * eps + (fresh * noise if t else 0)

    def run(self, step: Callable[..., Tensor], **options: float) -> Tensor:
        x = X_VP
        for i, t in enumerate(reversed(range(len(self.abars)))):
            x = step(x, t, NOISES[i], **options)
        return x


def linear_abars(*steps: int) -> list[float]:
    """alpha-bars at some of the thousand steps of guided-diffusion's linear schedule."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return (1 - betas).cumprod(dim=0)[list(steps)].tolist()


def sigmas_of(abars: list[float], process: Process) -> Tensor:
    """The grid of our sampler: the same levels downwards, and 0."""
    return process.sigma_from_alphas_cumprod(torch.tensor([*reversed(abars), 1.0], dtype=torch.float64))


def counted_noise() -> Callable[[float, float], Tensor]:
    noises = iter(NOISES)
    return lambda sigma, sigma_next: next(noises)


def in_process(sigmas: Tensor, process: Process) -> Tensor:
    """X_VP in the coordinates of the process at the first level."""
    return X_VP / process.unit_scale(sigmas[0])


def by_mean_shift(process: Process, sigmas: Tensor, variance: str, scale: float = SCALE) -> Tensor:
    """DDPM with our rule for the mean, from X_VP to VP coordinates."""
    rule = ClassifierMeanShift(classifier=CLASSIFIER, label="bird", guidance_scale=scale)
    options = sampler_options([rule], process, sigmas)
    x, noise = in_process(sigmas, process), counted_noise()
    out = sample_ddpm(Network(process), x, sigmas, variance=variance, noise_sampler=noise, **options)
    return out * process.unit_scale(sigmas[-1])


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned_range"])
def test_the_mean_shift_is_condition_mean_of_guided_diffusion(variance: str, process: Process) -> None:
    """A step that does not end at 0, where guided-diffusion clips the logarithm of a variance of 0."""
    abars = linear_abars(200, 450)
    theirs = GuidedDiffusion(abars, variance).p_sample(X_VP, 1, NOISES[0])
    sigmas = sigmas_of(abars, process)[:2]
    torch.testing.assert_close(by_mean_shift(process, sigmas, variance), theirs, rtol=0, atol=1e-10)
    assert (by_mean_shift(process, sigmas, variance, scale=1.001 * SCALE) - theirs).abs().max() > 1e-6


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_respaced_run_with_the_mean_shift_is_that_of_guided_diffusion(process: Process) -> None:
    abars = linear_abars(50, 300, 600, 950)
    diffusion = GuidedDiffusion(abars, "beta_tilde")
    ours = by_mean_shift(process, sigmas_of(abars, process), "beta_tilde")
    torch.testing.assert_close(ours, diffusion.run(diffusion.p_sample), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["score", "eps"])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_ddim_run_is_condition_score_of_guided_diffusion(process: Process, form: str, eta: float) -> None:
    abars = linear_abars(50, 300, 600, 950)
    diffusion = GuidedDiffusion(abars, "beta_tilde")
    theirs = diffusion.run(diffusion.ddim_sample, eta=eta)
    sigmas = sigmas_of(abars, process)

    def ours(scale: float) -> Tensor:
        rule = ClassifierGuidance(scaling="raw", classifier=CLASSIFIER, label="bird", guidance_scale=scale, form=form)
        guider, x = Guider(Network(process), [rule]), in_process(sigmas, process)
        return sample_ddim(guider, x, sigmas, eta=eta, noise_sampler=counted_noise())

    torch.testing.assert_close(ours(SCALE), theirs, rtol=0, atol=1e-10)
    assert (ours(1.001 * SCALE) - theirs).abs().max() > 1e-6, "the tolerance has teeth"


@pytest.mark.parametrize("time", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("form", ["score", "eps"])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_guided_noise_is_that_of_dpm_solver(process: Process, form: str, time: float) -> None:
    """model_fn of "classifier": noise - scale * sigma_t * gradient, in continuous time, with sigma_t the noise's share of x."""
    alpha_t = math.exp(-0.25 * time**2 * (20.0 - 0.1) - 0.5 * time * 0.1)  # marginal_alpha of the linear schedule
    sigma_t = math.sqrt(1 - alpha_t**2)
    abar = alpha_t**2
    noise = eps_of(X_VP, abar) - sigma_t * gradient_of(X_VP, abar)  # SCALE is in the gradient

    sigma = process.sigma_from_alphas_cumprod(torch.tensor(abar, dtype=torch.float64)).expand(3)
    rule = ClassifierGuidance(scaling="raw", classifier=CLASSIFIER, label="bird", guidance_scale=SCALE, form=form)
    x = X_VP / process.unit_scale(sigma[0])
    denoised = Guider(Network(process), [rule])(x, sigma)
    torch.testing.assert_close(process.eps(x, denoised, sigma), noise, rtol=0, atol=1e-10)
    assert (noise - eps_of(X_VP, abar)).abs().max() > 1e-6


SIGMA = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)


def weakened(rule: WeakenedPass, estimates: tuple[Tensor, Tensor, Tensor], w: float) -> Tensor:
    """CFG at w and a weakened pass, of given estimates: cond, uncond, weak."""
    given = dict(zip(("cond", "uncond", rule.branches()[0].name), estimates, strict=True))
    run = GuidanceRun([CFG(guidance_scale=w), rule], VE_SCALED)
    return run(X_VP, SIGMA, lambda names: {name: given[name] for name in names})


@pytest.mark.parametrize("w", [1.0, 4.0])
@pytest.mark.parametrize("s", [3.0, 0.7])
@pytest.mark.parametrize(
    "rule_class", [PerturbedAttention, SmoothedEnergy, lambda **knobs: SlidingWindow(masked=False, **knobs)]
)
def test_weakened_passes_are_joined_as_by_the_nodes_of_pamparamm(rule_class: Any, s: float, w: float) -> None:
    """cfg_result + scale * (cond - weak), also where w = 1. Their rescale, which is 0 by default, is not part of these rules here."""
    cond, uncond, weak = (drawn(3, 4, 6, 5, seed=i) for i in (1, 2, 3))
    ours = weakened(rule_class(scale=s), (cond, uncond, weak), w)
    cfg_result = uncond + w * (cond - uncond)
    torch.testing.assert_close(ours, cfg_result + s * (cond - weak), rtol=0, atol=1e-10)

    def rescaled(rescale: float, anew: Tensor) -> Tensor:
        """guidance_utils.rescale_guidance: the guidance alone shrinks, by the spread of what it made of ``anew``."""
        guidance = s * (cond - weak)
        ratios = torch.stack([c.std() / r.std() for c, r in zip(cond, anew + guidance, strict=True)])
        return cfg_result + guidance * (rescale * ratios + 1 - rescale).reshape(3, 1, 1, 1)

    for anew in (cfg_result, cond):  # modes "full" and "partial"
        torch.testing.assert_close(rescaled(0.0, anew), ours, rtol=0, atol=1e-10)
        assert (rescaled(0.5, anew) - ours).abs().max() > 1e-2, "with it theirs is another method"


def swg_of_pamparamm(model: Network, x: Tensor, sigma: Tensor, tile: tuple[int, int], overlap: int) -> Tensor:
    """swg_pred_calc: tiles side by side, each reaching over into the next, summed and divided by how many there are at each place."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    tops, lefts = (range(0, length, size) for length, size in zip(x.shape[-2:], tile, strict=True))
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + tile[0] + overlap), slice(left, left + tile[1] + overlap))
            total[place] += model(x[place], sigma)
            count[place] += 1
    return total / count


def test_windows_side_by_side_are_those_of_pamparamm() -> None:
    """With an overlap theirs are of different sizes, since the last ones end at the border; ours are all of one size."""
    model, x, sigma = Network(VE_SCALED), drawn(3, 4, 8, 12, seed=4), SIGMA[:1].expand(3)
    out = Guider(model, [SlidingWindow(scale=2.0, size=0.5, windows=2, masked=False)])(x, sigma)
    own = model(x, sigma)
    theirs = [own + 2.0 * (own - swg_of_pamparamm(model, x, sigma, (4, 6), overlap)) for overlap in (0, 2)]
    torch.testing.assert_close(out, theirs[0], rtol=0, atol=1e-10)
    assert (theirs[1] - out).abs().max() > 1e-3
