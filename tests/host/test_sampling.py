"""What stands for MODEL, GUIDER, SAMPLER and NOISE, on a denoiser whose answers can be worked out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.denoiser import Cond
from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    ClassifierGuidance,
    ClassifierMeanShift,
    DynamicThresholding,
    LimitedInterval,
    RescaleGuidance,
    check_chain,
)
from latent_guidance.guidance.latents import Latents
from latent_guidance.guidance.steps import check_not_twice
from latent_guidance.host import memory
from latent_guidance.host.objects import GuiderNode, LatentSpace, Model, Noise, Sampler, Vae
from latent_guidance.host.sampling import fit_latent, sample, starts_at_top
from latent_guidance.host.stock.sampling import (
    SAMPLERS,
    SCHEDULERS,
    BasicScheduler,
    KSampler,
    sigma_grid,
    stock_sampler,
)
from latent_guidance.models.checkpoint import load_classifier
from latent_guidance.models.classifier import Classifier, new_classifier
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process
from latent_guidance.schedules import DiscreteSchedule, FlowSchedule, scaled_linear_betas

SPACE = LatentSpace(channels=4, scaling_factor=0.5, spatial_ratio=8, name="test")


class Linear:
    """denoised = x * 0.1 + mean of the tokens; keeps what it was called with."""

    def __init__(self, process: Process = VE_SCALED) -> None:
        self.process = process
        self.calls: list[tuple[Tensor, Tensor, Cond]] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        assert isinstance(cond, Tensor)
        self.calls.append((x, sigma, cond))
        return 0.1 * x + cond.mean((1, 2)).reshape(-1, 1, 1, 1)


def model(process: Process = VE_SCALED, **more: Any) -> Model:
    schedule: Any = (
        FlowSchedule(shift=3.0) if process is RECTIFIED_FLOW else DiscreteSchedule.from_betas(scaled_linear_betas())
    )
    return Model(Linear(process), schedule, SPACE, torch.device("cpu"), **more)


def tokens(value: float) -> list[Any]:
    return [[torch.full((1, 7, 3), value), {}]]


def latent(batch: int = 2, channels: int = 4) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, channels, 5, 6)}


EULER = stock_sampler("euler")


def calls(guider: GuiderNode) -> list[tuple[Tensor, Tensor, Cond]]:
    denoiser = guider.model.denoiser
    assert isinstance(denoiser, Linear)
    return denoiser.calls


def test_a_run_from_the_top_starts_at_unit_variance_of_the_vp_latent() -> None:
    guider = GuiderNode(model(), tokens(0.0))
    sigmas = sigma_grid(guider.model, "normal", 4, 1.0)
    assert starts_at_top(sigmas, guider.model.schedule.sigma_max)
    sample(Noise(3), guider, EULER, sigmas, latent())
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(calls(guider)[0][0], noise * (1 + sigmas[0] ** 2).sqrt())


def test_a_later_start_adds_sigma_times_noise_to_the_scaled_latent() -> None:
    guider = GuiderNode(model(), tokens(0.0))
    sigmas = sigma_grid(guider.model, "normal", 4, 0.5)
    assert len(sigmas) == 5
    start = {"samples": torch.randn(2, 4, 5, 6)}
    sample(Noise(3), guider, EULER, sigmas, start)
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(calls(guider)[0][0], start["samples"] * 0.5 + sigmas[0] * noise, atol=1e-6)


def test_flow_starts_between_latent_and_noise() -> None:
    guider = GuiderNode(model(RECTIFIED_FLOW), tokens(0.0))
    sigmas = torch.tensor([0.75, 0.5, 0.0])
    start = {"samples": torch.randn(2, 4, 5, 6)}
    sample(Noise(3), guider, EULER, sigmas, start)
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(calls(guider)[0][0], 0.25 * start["samples"] * 0.5 + 0.75 * noise, atol=1e-6)


def test_flow_from_pure_noise_is_finite() -> None:
    guider = GuiderNode(model(RECTIFIED_FLOW), tokens(1.0))
    sigmas = sigma_grid(guider.model, "simple", 4, 1.0)
    assert sigmas[0] == 1
    out, _ = sample(Noise(3), guider, EULER, sigmas, latent())
    assert bool(torch.isfinite(out).all())


def test_the_result_is_unscaled() -> None:
    guider = GuiderNode(model(), tokens(1.0))
    out, denoised = sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    x = calls(guider)[0][0]
    assert torch.allclose(out, (0.1 * x + 1) / 0.5)
    assert torch.allclose(denoised, out)


def test_no_steps_leave_the_latent() -> None:
    start = {"samples": torch.randn(2, 4, 5, 6)}
    guider = GuiderNode(model(), tokens(1.0))
    out, _ = sample(Noise(3), guider, EULER, sigma_grid(guider.model, "normal", 4, 0.0), start)
    assert torch.equal(out, start["samples"])
    assert not calls(guider)


def test_both_branches_in_one_call_and_combined() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=3.0)
    out, _ = sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    [(x, sigma, cond)] = calls(guider)
    assert x.shape[0] == sigma.shape[0] == 4
    assert isinstance(cond, Tensor)
    assert cond[:, 0, 0].tolist() == [0.25, 0.25, 1.0, 1.0]
    assert torch.allclose(out, (0.1 * x[:2] + 0.25 + 3 * 0.75) / 0.5)


def test_scale_1_skips_the_negative() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=1.0)
    sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    assert calls(guider)[0][0].shape[0] == 2


def test_several_entries_are_averaged() -> None:
    guider = GuiderNode(model(), [*tokens(1.0), *tokens(3.0)])
    out, _ = sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    [(x, _, _)] = calls(guider)
    assert x.shape[0] == 4
    assert torch.allclose(out, (0.1 * x[:2] + 2) / 0.5)


def test_prompts_of_different_length() -> None:
    short = [[torch.full((1, 2, 3), 0.25), {}]]
    guider = GuiderNode(model(), tokens(1.0), short, cfg=3.0)
    sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    cond = calls(guider)[0][2]
    assert isinstance(cond, Tensor)
    assert cond.shape[1] == 14


def test_a_patched_model_and_a_guider_agree() -> None:
    rules = (CFG(guidance_scale=3.0), LimitedInterval(sigma_lo=0.5, sigma_hi=5.0))
    sigmas = torch.tensor([8.0, 2.0, 0.4, 0.0])
    by_guider = GuiderNode(model(), tokens(1.0), tokens(0.25), rules)
    by_patch = GuiderNode(model().with_rules(rules), tokens(1.0), tokens(0.25), cfg=7.0)
    results = [sample(Noise(3), guider, EULER, sigmas, latent())[0] for guider in (by_guider, by_patch)]
    assert torch.equal(*results)
    assert [x.shape[0] for x, _, _ in calls(by_guider)] == [2, 4, 2]
    plain = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=3.0)
    assert not torch.equal(results[0], sample(Noise(3), plain, EULER, sigmas, latent())[0])


def test_an_interval_on_the_hosts_own_scale() -> None:
    patched = model().with_rules((LimitedInterval(sigma_lo=0.5, sigma_hi=5.0),))
    guider = GuiderNode(patched, tokens(1.0), tokens(0.25), cfg=3.0)
    sample(Noise(3), guider, EULER, torch.tensor([8.0, 2.0, 0.4, 0.0]), latent())
    assert [x.shape[0] for x, _, _ in calls(guider)] == [2, 4, 2]


def test_two_runs_are_the_same() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=3.0)
    sigmas = sigma_grid(guider.model, "karras", 5, 1.0)
    for name in SAMPLERS:
        first, second = (sample(Noise(3), guider, stock_sampler(name), sigmas, latent())[0] for _ in range(2))
        assert torch.equal(first, second), name


def test_a_negative_that_is_needed_and_missing() -> None:
    guider = GuiderNode(model().with_rules((CFG(guidance_scale=3.0),)), tokens(1.0))
    with pytest.raises(UserError, match=r"no negative conditioning.*connect the negative input"):
        sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())


def test_two_rules_that_combine_are_refused() -> None:
    with pytest.raises(UserError, match="two rules that combine"):
        model().with_rules((CFG(guidance_scale=3.0), CFG(guidance_scale=2.0)))


class StepRule:
    sampler_option = "mean_shift"

    class node:
        name = "step rule"

    def __init__(self, network: object) -> None:
        self.network = network

    def networks(self) -> tuple[object, ...]:
        return (self.network,)

    def check_latents(self, latents: Latents) -> None:
        if latents.channels != 4:
            raise UserError("a rule for 4 channels", expected="4 channels", mend="use another")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        assert len(shape) == 4


def test_one_classifier_cannot_guide_twice() -> None:
    network = object()
    rule = CFG(guidance_scale=3.0)
    object.__setattr__(rule, "networks", lambda: (network,))
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), (rule,))
    sampler = Sampler(EULER.function, step_rules=(StepRule(network),))
    with pytest.raises(UserError, match="guides twice"):
        sample(Noise(3), guider, sampler, torch.tensor([1.0, 0.0]), latent())
    other = replace(sampler, step_rules=(StepRule(object()),))
    sample(Noise(3), guider, other, torch.tensor([1.0, 0.0]), latent())


def test_a_rule_of_a_step_made_for_other_latents_is_refused() -> None:
    guider = GuiderNode(model(), tokens(1.0))
    wide = replace(guider.model, latent_space=replace(SPACE, channels=16))
    sampler = Sampler(EULER.function, step_rules=(StepRule(object()),))
    with pytest.raises(UserError, match="4 channels"):
        sample(Noise(3), replace(guider, model=wide), sampler, torch.tensor([1.0, 0.0]), latent(channels=16))


def test_nodes_act_one_after_the_other_and_none_undoes_another() -> None:
    """The guider acts before what is on its model, whose rules come in the order of their nodes."""
    threshold, rescale = DynamicThresholding(plain_scale=2.0), RescaleGuidance(phi=0.5)
    patched = model().with_rules([threshold]).with_rules([rescale])
    assert GuiderNode(patched, tokens(1.0), rules=(CFG(),)).chain == (CFG(), threshold, rescale)
    with pytest.raises(UserError, match="Dynamic Thresholding did would be lost"):
        model().with_rules([threshold]).with_rules([LimitedInterval()])
    model().with_rules([LimitedInterval()]).with_rules([threshold])


def test_latents_of_other_channels() -> None:
    assert fit_latent(torch.zeros(2, 16, 5, 6), SPACE).shape == (2, 4, 5, 6)
    with pytest.raises(UserError, match="16 channels for a model of 4"):
        fit_latent(torch.ones(2, 16, 5, 6), SPACE)
    with pytest.raises(UserError, match="latent of shape"):
        fit_latent(torch.zeros(4, 5, 6), SPACE)


def test_what_only_comfyui_can_do_is_refused() -> None:
    guider = GuiderNode(model(), [[torch.ones(1, 7, 3), {"area": (1, 2, 3, 4)}]])
    with pytest.raises(UserError, match="positive conditioning holds area"):
        sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())
    guider = GuiderNode(model(), tokens(1.0))
    with pytest.raises(UserError, match="noise mask"):
        sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), {**latent(), "noise_mask": torch.ones(5, 6)})
    pooled = GuiderNode(model(needs=("tokens", "vector")), tokens(1.0))
    with pytest.raises(UserError, match="has no vector"):
        sample(Noise(3), pooled, EULER, torch.tensor([1.0, 0.0]), latent())


def test_a_run_that_is_not_finite_says_so() -> None:
    guider = GuiderNode(model(), tokens(float("inf")))
    with pytest.raises(UserError, match=r"not finite \(items \[0, 1\] of the batch\)"):
        sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent())


def test_sampling_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device=None: 2.0**20)
    guider = GuiderNode(model(widest=64), tokens(1.0), tokens(0.25), cfg=3.0)
    sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent(1))
    with pytest.raises(UserError, match="sampling a batch of 64 latents of 6x5 needs at least"):
        sample(Noise(3), guider, EULER, torch.tensor([1.0, 0.0]), latent(64))
    assert len(calls(guider)) == 1


def test_prompts_whose_common_length_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(length: int) -> list[Any]:
        return [[torch.zeros(1, length, 3), {}]]

    monkeypatch.setattr(memory, "available", lambda device=None: 2.0**20)
    sigmas = torch.tensor([1.0, 0.0])
    sample(Noise(3), GuiderNode(model(), long(770), long(77), cfg=3.0), EULER, sigmas, latent(1))
    with pytest.raises(UserError, match=r"prompts of 59290 tokens needs .*shorten the prompts"):
        sample(Noise(3), GuiderNode(model(), long(770), long(7 * 77 * 11), cfg=3.0), EULER, sigmas, latent(1))


def test_pictures_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device=None: 2.0**20)
    vae = Vae(None, SPACE, torch.device("cpu"), widest=32)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the VAE on 1 pictures of 80x80 needs at least 2 MB"):
        vae.decode(torch.zeros(1, 4, 10, 10))
    with pytest.raises(UserError, match=r"^200 pictures of 40x40 needs at least 4 MB"):
        vae.encode(torch.zeros(200, 40, 40, 3))


def test_seeded_noise_is_the_same_alone_and_in_a_batch() -> None:
    together = Noise(5, (5, 9)).generate(latent(2))
    alone = Noise(9, (9,)).generate(latent(1))
    assert torch.equal(together[1:], alone)
    for batch in (1, 3):
        message = f"noise for 2 pictures and a latent of {batch}. Expected: one seed for every picture"
        with pytest.raises(UserError, match=message):
            Noise(5, (5, 9)).generate(latent(batch))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler: str) -> None:
    sigmas = sigma_grid(model(), scheduler, 7, 1.0)
    assert sigmas[-1] == 0
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    assert len(sigma_grid(model(), scheduler, 7, 0.3)) == 8


def test_ddim_uniform_keeps_its_noisiest_level_in_a_ksampler_only() -> None:
    patched = model()
    whole = sigma_grid(patched, "ddim_uniform", 7, 1.0)
    assert len(whole) == 9  # 1000 // 7 = 142, and 1 + 7 * 142 is still in the table
    assert whole[0] == patched.schedule.sigmas[1 + 7 * 142]
    KSampler().sample(patched, 0, 7, 1.0, "euler", "ddim_uniform", tokens(1.0), tokens(0.0), latent(1))
    denoiser = patched.denoiser
    assert isinstance(denoiser, Linear)
    assert [float(sigma[0]) for _, sigma, _ in denoiser.calls] == pytest.approx(whole[:-1].tolist())
    [sigmas] = BasicScheduler().get_sigmas(patched, "ddim_uniform", 7, 1.0)
    assert torch.equal(sigmas, whole[1:])


def test_an_sde_on_a_flow_model_starts_below_pure_noise() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.2, 0.0])
    starts = {}
    for name in ("dpmpp_2m_sde", "dpmpp_2m"):
        guider = GuiderNode(model(RECTIFIED_FLOW), tokens(1.0))
        out, _ = sample(Noise(3), guider, stock_sampler(name), sigmas, latent())
        assert bool(torch.isfinite(out).all())
        x, sigma, _ = calls(guider)[0]
        starts[name] = float(sigma[0])
        assert torch.equal(x, torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3)))
    t = 1 - 1e-4
    assert starts["dpmpp_2m_sde"] == pytest.approx(3 * t / (1 + 2 * t), rel=1e-7)
    assert starts["dpmpp_2m"] == 1
    guider = GuiderNode(model(), tokens(1.0))
    sample(Noise(3), guider, stock_sampler("dpmpp_2m_sde"), torch.tensor([1.0, 0.6, 0.0]), latent())
    assert float(calls(guider)[0][1][0]) == 1


def test_the_stock_ddpm_is_refused_on_flow_models() -> None:
    """ComfyUI's takes a VP step there; its picture is another one than that of the flow's own posterior."""
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(UserError, match=r"'ddpm' on a flow model.*DDPM Sampler"):
        sample(Noise(3), GuiderNode(model(RECTIFIED_FLOW), tokens(1.0)), stock_sampler("ddpm"), sigmas, latent())
    out, _ = sample(Noise(3), GuiderNode(model(), tokens(1.0)), stock_sampler("ddpm"), sigmas, latent())
    assert bool(torch.isfinite(out).all())


def test_the_seeds_of_a_batch_wrap_around() -> None:
    drawn: list[int] = []

    class Autoencoder:
        def encode(self, pixels: Tensor, *, sample: bool, generator: torch.Generator) -> Tensor:
            drawn.append(generator.initial_seed() % 2**64)
            return torch.zeros(1, 4, 1, 1)

    vae = Vae(Autoencoder(), SPACE, torch.device("cpu"))  # type: ignore[arg-type]
    vae.encode(torch.zeros(2, 8, 8, 3), sample=True, seed=2**64 - 1)
    assert drawn == [2**64 - 1, 0]


def test_one_classifier_loaded_twice_is_known_as_one(models: Path) -> None:
    folder = models / "latent_guidance" / "tiny"
    first, second = load_classifier(folder), load_classifier(folder)
    assert first.network is not second.network
    settings = {"label": "food", "guidance_scale": 2.0}
    rule, again = (ClassifierGuidance(scaling="raw", classifier=loaded, **settings) for loaded in (first, second))
    with pytest.raises(UserError, match=r"twice, with the same settings"):
        check_chain([rule, again])
    check_chain([rule, replace(again, label="flags")])

    step = ClassifierMeanShift(classifier=second, **settings)
    sampler = Sampler(EULER.function, step_rules=(step,))
    with pytest.raises(UserError, match="guides twice"):
        check_not_twice((rule,), sampler.step_rules)
    other = Classifier(new_classifier(first.config))
    check_not_twice((replace(rule, classifier=other),), sampler.step_rules)
