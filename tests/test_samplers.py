"""Samplers: equal to ComfyUI's given the same noise, finite at both ends, per sample, the same twice."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.noise import SeededNoise, brownian_noise_sampler
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand
from latent_guidance.samplers import SAMPLERS, sample_ddim, sample_ddpm, sample_dpmpp_2m_sde, sample_euler, sample_heun
from latent_guidance.schedules import FlowSchedule
from latent_guidance.step_grids import off_pure_noise

COMFYUI = json.loads((Path(__file__).parent / "data" / "comfyui_samplers.json").read_text())["runs"]
PROCESSES = {"ve": VE_SCALED, "flow": RECTIFIED_FLOW}
X = torch.tensor([[0.3, -1.1, 0.7], [-0.4, 1.6, 0.05]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


OF_BOTH = [name for name in SAMPLERS if name != "rectified_cfg_pp"]
every = pytest.mark.parametrize("name", OF_BOTH)
both = pytest.mark.parametrize("process", PROCESSES)


class Toy:
    """A smooth nonlinear denoiser of x of any shape, per sample; the one the committed numbers were made with."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.calls: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.calls.append((x, sigma, cond))
        sigma = expand(sigma, x)
        alpha = self.process.alpha(sigma)
        return 0.5 * torch.tanh(2 * x / (1 + sigma) + 0.3) + 0.4 * alpha * x / (alpha**2 + sigma**2)

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self(x, sigma, cond), torch.tanh(x)

    def with_uncond(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self(x, sigma, cond), 0.4 * torch.sin(2 * x)


def toy_noise() -> Callable[[float, float], Tensor]:
    """The noise that the committed numbers were made with: a new one in each call."""
    count = 0

    def noise(sigma: float, sigma_next: float) -> Tensor:
        nonlocal count
        count += 1
        return torch.sin(torch.arange(1, 7, dtype=torch.float64).reshape(2, 3) * (count + 0.5)) * 1.3

    return noise


def run(process: str, name: str, **options: Any) -> Tensor:
    sigmas = torch.tensor(COMFYUI[process]["sigmas"], dtype=torch.float64)
    x = X * sigmas[0]
    if process == "flow" and name == "dpmpp_2m_sde":
        sigmas = off_pure_noise(sigmas, FlowSchedule(shift=3.0))
    return SAMPLERS[name](Toy(PROCESSES[process]), x, sigmas, noise_sampler=toy_noise(), **options)


def parse(case: str) -> tuple[str, dict[str, Any]]:
    name, *options = case.split()
    pairs = (option.split("=") for option in options)
    return name, {key: value if key == "solver_type" else float(value) for key, value in pairs}


CASES = [(process, case) for process in COMFYUI for case in COMFYUI[process]["results"]]


@pytest.mark.parametrize(("process", "case"), CASES)
def test_equal_to_comfyui(process: str, case: str) -> None:
    name, options = parse(case)
    expected = torch.tensor(COMFYUI[process]["results"][case], dtype=torch.float64)
    found = run(process, name, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # the threshold of 1e-5 that parity is claimed for tells every other case of the process apart
    for other in COMFYUI[process]["results"]:
        if other != case:
            difference = found - torch.tensor(COMFYUI[process]["results"][other], dtype=torch.float64)
            assert difference.abs().max() > 1e-5


def test_cases_cover_what_both_have() -> None:
    assert {parse(case)[0] for _, case in CASES} == set(OF_BOTH) - {"ddim", "ddpm", "ddim_cfg_pp", "dpmpp_2m_cfg_pp"}


@both
@every
def test_finite_from_pure_noise_to_zero(process: str, name: str) -> None:
    """Flow starts at alpha = 0; every run ends at sigma = 0."""
    sigmas = torch.tensor([80.0, 1.0, 0.1, 0.0] if process == "ve" else [1.0, 0.5, 0.1, 0.0])
    for steps in (sigmas, sigmas[[0, 3]], sigmas[:2]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = SAMPLERS[name](Toy(PROCESSES[process]), torch.randn(2, 3, 4, 4) * sigmas[0], steps)
        assert torch.isfinite(result).all()


@both
@every
def test_the_last_step_gives_the_denoised_estimate(process: str, name: str) -> None:
    """At sigma = 0 nothing is left of the noise, in the ODE as in every SDE."""
    denoiser = Toy(PROCESSES[process])
    result = SAMPLERS[name](denoiser, X * 0.3, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(
        result, Toy(PROCESSES[process])(X * 0.3, torch.full((2,), 0.3).double()), rtol=0, atol=1e-12
    )


@every
def test_a_first_step_from_pure_noise_is_the_limit_of_those_near_it(name: str) -> None:
    """alpha = 0 is no special case: the runs from sigma = 1 - 1e-6 tend to it."""
    runs = []
    for first in (1.0, 1 - 1e-6, 1 - 1e-3):
        sigmas = torch.tensor([first, 0.7], dtype=torch.float64)
        runs.append(SAMPLERS[name](Toy(RECTIFIED_FLOW), X, sigmas, noise_sampler=toy_noise()))
    assert (runs[0] - runs[1]).abs().max() < 1e-5
    assert (runs[0] - runs[2]).abs().max() > 1e-5


@both
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 4, 3, 5), (2, 4, 2, 3, 5)])
def test_dtype_and_shape_are_kept_and_x_is_not_touched(
    process: str, name: str, dtype: torch.dtype, shape: tuple
) -> None:
    x = torch.randn(shape, dtype=dtype)
    before = x.clone()
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.0])
    result = SAMPLERS[name](Toy(PROCESSES[process]), x, sigmas)
    assert result.dtype == dtype and result.shape == x.shape
    assert torch.equal(x, before)
    assert sigmas.tolist() == pytest.approx([0.9, 0.5, 0.2, 0.0])
    assert not result.requires_grad


@both
@every
def test_works_under_inference_mode(process: str, name: str) -> None:
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.0])
    noise = torch.randn(2, 3)
    plain = SAMPLERS[name](Toy(PROCESSES[process]), noise, sigmas, noise_sampler=SeededNoise([1, 2], (2, 3)))
    with torch.inference_mode():
        inside = SAMPLERS[name](
            Toy(PROCESSES[process]), noise.clone(), sigmas.clone(), noise_sampler=SeededNoise([1, 2], (2, 3))
        )
    assert torch.equal(plain, inside)


@both
@every
def test_an_item_is_the_same_alone_and_in_a_batch(process: str, name: str) -> None:
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.0])
    x = torch.randn(3, 4, dtype=torch.float64)
    together = SAMPLERS[name](
        Toy(PROCESSES[process]), x, sigmas, noise_sampler=SeededNoise([1, 2, 3], x.shape, dtype=x.dtype)
    )
    alone = SAMPLERS[name](
        Toy(PROCESSES[process]), x[1:2], sigmas, noise_sampler=SeededNoise([2], (1, 4), dtype=x.dtype)
    )
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-14)


@every
def test_the_denoiser_and_the_callback_see_every_step(name: str) -> None:
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.0])
    denoiser, seen = Toy(VE_SCALED), []
    cond = torch.tensor([1, 2])
    SAMPLERS[name](denoiser, X, sigmas, cond, callback=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == [0, 1, 2]
    assert [step[1] for step in seen] == pytest.approx([0.9, 0.5, 0.2])
    assert all(call[2] is cond and call[1].shape == (2,) for call in denoiser.calls)
    assert len(denoiser.calls) == (5 if name == "heun" else 3)
    for _, sigma, x, denoised in seen:
        torch.testing.assert_close(denoised, Toy(VE_SCALED)(x, torch.full((2,), sigma, dtype=torch.float64)))


@every
def test_a_callback_can_interrupt(name: str) -> None:
    denoiser = Toy(VE_SCALED)

    def stop(i: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        if i == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        SAMPLERS[name](denoiser, X, torch.tensor([0.9, 0.5, 0.2, 0.0]), callback=stop)
    assert len(denoiser.calls) == (3 if name == "heun" else 2)


class Counting(Toy):
    """Answers differently in its later calls, unless begun anew."""

    def begin(self, sigmas: Tensor) -> Counting:
        return Counting(self.process)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return super().__call__(x, sigma, cond) * (1 + 0.1 * len(self.calls))


@every
def test_two_runs_are_identical(name: str) -> None:
    denoiser, sigmas = Counting(VE_SCALED), torch.tensor([0.9, 0.5, 0.2, 0.0])
    first, second = (SAMPLERS[name](denoiser, X, sigmas, noise_sampler=toy_noise()) for _ in range(2))
    assert torch.equal(first, second)
    denoiser(X, torch.ones(2))
    assert not torch.equal(denoiser(X, torch.ones(2)), Counting(VE_SCALED)(X, torch.ones(2)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_ancestral", {"eta": 0.0}),
        ("ddim", {"eta": 0.0}),
        ("dpmpp_2m_sde", {"eta": 0.0}),
        ("heun", {}),
        ("dpmpp_2m", {}),
        ("ddim_cfg_pp", {"eta": 0.0}),
        ("dpmpp_2m_cfg_pp", {}),
    ],
)
@both
def test_deterministic_runs_draw_no_noise(process: str, name: str, options: dict) -> None:
    def refuse(sigma: float, sigma_next: float) -> Tensor:
        raise AssertionError("noise was drawn")

    SAMPLERS[name](Toy(PROCESSES[process]), X * 0.9, torch.tensor([0.9, 0.5, 0.0]), noise_sampler=refuse, **options)


@both
def test_ddim_without_noise_and_ancestral_without_noise_are_euler(process: str) -> None:
    sigmas = torch.tensor(COMFYUI[process]["sigmas"], dtype=torch.float64)
    denoiser, x = Toy(PROCESSES[process]), X * sigmas[0]
    euler = sample_euler(denoiser, x, sigmas)
    torch.testing.assert_close(sample_ddim(denoiser, x, sigmas, eta=0.0), euler, rtol=0, atol=1e-10)
    torch.testing.assert_close(SAMPLERS["euler_ancestral"](denoiser, x, sigmas, eta=0.0), euler, rtol=0, atol=1e-10)
    assert (sample_heun(denoiser, x, sigmas) - euler).abs().max() > 1e-3


@both
def test_ddim_with_eta_one_is_ddpm_with_beta_tilde(process: str) -> None:
    sigmas = torch.tensor(COMFYUI[process]["sigmas"], dtype=torch.float64)
    denoiser, x = Toy(PROCESSES[process]), X * sigmas[0]
    ddim = sample_ddim(denoiser, x, sigmas, eta=1.0, noise_sampler=toy_noise())
    for variance, equal in (("beta_tilde", True), ("beta", False)):
        ddpm = sample_ddpm(denoiser, x, sigmas, variance=variance, noise_sampler=toy_noise())
        assert (float((ddim - ddpm).abs().max()) < 1e-10) is equal


def test_ancestral_euler_is_ddpm_in_ve_coordinates() -> None:
    sigmas = torch.tensor(COMFYUI["ve"]["sigmas"], dtype=torch.float64)
    x = X * sigmas[0]
    ancestral = run("ve", "euler_ancestral", eta=1.0)
    ddpm = sample_ddpm(Toy(VE_SCALED), x, sigmas, variance="beta_tilde", noise_sampler=toy_noise())
    torch.testing.assert_close(ancestral, ddpm, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["euler_ancestral", "ddim", "dpmpp_2m_sde", "ddpm"])
@both
def test_noise_of_a_step_restores_the_next_level(process: str, name: str, eta: float) -> None:
    """With a perfect estimate of x0, x after a step is alpha' x0 + sigma' noise: mean and variance of the marginal."""
    generator = torch.Generator().manual_seed(0)
    level, level_next = (0.8, 0.5) if process == "flow" else (4.0, 1.5)
    kind, n = PROCESSES[process], 200_000
    x0 = 0.7

    class Perfect:
        process = kind

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return torch.full_like(x, x0)

    sigmas = torch.tensor([level, level_next], dtype=torch.float64)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = kind.noised(torch.full_like(noise, x0), noise, sigmas[0])
    options: dict[str, Any] = {"variance": "beta_tilde"} if name == "ddpm" else {"eta": eta}
    result = SAMPLERS[name](
        Perfect(), x, sigmas, noise_sampler=lambda *_: torch.randn(n, 1, generator=generator, dtype=x.dtype), **options
    )
    assert abs(float(result.mean()) - float(kind.alpha(sigmas[1])) * x0) < 0.01 * level_next
    assert abs(float(result.std()) / level_next - 1) < 0.01
    if name == "ddpm":  # beta is another variance than the exact posterior's
        wrong = sample_ddpm(Perfect(), x, sigmas, variance="beta", noise_sampler=lambda *_: torch.randn_like(x))
        assert abs(float(wrong.std()) / level_next - 1) > 0.01


def test_learned_range_lies_between_beta_tilde_and_beta() -> None:
    sigmas = torch.tensor([5.0, 2.0], dtype=torch.float64)

    class Learned(Toy):
        def __init__(self, v: float) -> None:
            super().__init__(VE_SCALED)
            self.v = v

        def with_variance(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
            return self(x, sigma, cond), torch.full_like(x, self.v)

    def result(variance: str, v: float) -> Tensor:
        return sample_ddpm(Learned(v), X, sigmas, variance=variance, noise_sampler=toy_noise())

    torch.testing.assert_close(result("learned_range", 1.0), result("beta", 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(result("learned_range", -1.0), result("beta_tilde", 0.0), rtol=0, atol=1e-12)
    # halfway in the logarithm: the noise is scaled by the geometric mean of the standard deviations
    noise = toy_noise()(0, 0)
    mean = sample_ddpm(Learned(0), X, sigmas, noise_sampler=lambda *_: 0 * noise)
    low, middle, high = ((result(name, 0.0) - mean) / noise for name in ("beta_tilde", "learned_range", "beta"))
    torch.testing.assert_close(middle, (low * high).sqrt(), rtol=1e-9, atol=0)
    assert (high / low - 1).min() > 0.05


def test_churn_stays_within_the_process() -> None:
    """Noise put back to flow x keeps alpha and sigma in step, and nothing is noisier than sigma = 1."""
    denoiser, levels = Toy(RECTIFIED_FLOW), [1.0, 0.9, 0.5, 0.2, 0.0]
    sample_euler(denoiser, X, torch.tensor(levels), s_churn=10.0)
    asked = [float(call[1][0]) for call in denoiser.calls]
    assert max(asked) == 1.0
    assert all(hat > sigma for hat, sigma in zip(asked[1:], levels[1:-1], strict=True))
    windowed = Toy(RECTIFIED_FLOW)
    sample_euler(windowed, X, torch.tensor(levels), s_churn=10.0, s_tmin=0.3, s_tmax=0.6)
    raised = [float(call[1][0]) > sigma + 1e-6 for call, sigma in zip(windowed.calls, levels, strict=False)]
    assert raised == [False, False, True, False]


def test_the_sde_default_noise_is_a_brownian_path() -> None:
    x, sigmas = torch.randn(2, 3), torch.tensor([5.0, 2.0, 0.5, 0.0])
    torch.manual_seed(4)
    default = sample_dpmpp_2m_sde(Toy(VE_SCALED), x, sigmas)
    torch.manual_seed(4)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    explicit = brownian_noise_sampler(x, 0.5, 5.0, seed=seed)
    assert torch.equal(default, sample_dpmpp_2m_sde(Toy(VE_SCALED), x, sigmas, noise_sampler=explicit))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("at", ["x_t", "mu"])
@pytest.mark.parametrize("hook", ["mean_shift", "post_step"])
def test_step_gradients_see_x_of_the_process(process: str, at: str, hook: str) -> None:
    """What a step gradient is called with: x at x_t, or the mean or new x at sigma_next; never at sigma = 0."""
    levels = [1.0, 0.6, 0.2, 0.0] if process == "flow" else [9.0, 2.0, 0.3, 0.0]
    sigmas = torch.tensor(levels, dtype=torch.float64)
    denoiser, calls = Toy(PROCESSES[process]), []

    def gradient(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, sigma))
        return torch.zeros_like(x)

    options: dict[str, Any] = {hook: gradient, "mean_shift_at": at}
    result = sample_ddpm(denoiser, X * sigmas[0], sigmas, noise_sampler=lambda *_: torch.zeros_like(X), **options)
    plain = sample_ddpm(denoiser, X * sigmas[0], sigmas, noise_sampler=lambda *_: torch.zeros_like(X))
    assert torch.equal(result, plain)
    here = hook == "mean_shift" and at == "x_t"
    assert [float(sigma[0]) for _, sigma in calls] == pytest.approx(levels[:3] if here else levels[1:3])
    assert all(sigma.shape == (2,) for _, sigma in calls)
    # without noise and gradient, the mean, the new x and the x of the next step are one and the same
    seen = [x for x, _, _ in denoiser.calls[:3]]
    for (x, _), expected in zip(calls, seen if here else seen[1:], strict=True):
        torch.testing.assert_close(x, expected)


def test_no_term_is_no_term() -> None:
    sigmas = torch.tensor([9.0, 2.0, 0.3, 0.0])
    plain = sample_ddpm(Toy(VE_SCALED), X, sigmas, noise_sampler=toy_noise())
    none: Any = {"mean_shift": lambda x, sigma: None, "post_step": lambda x, sigma: None}
    assert torch.equal(sample_ddpm(Toy(VE_SCALED), X, sigmas, noise_sampler=toy_noise(), **none), plain)
