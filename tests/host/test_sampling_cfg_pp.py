"""CFG++ samplers and recurrence in the embedded host, on a denoiser whose answers can be worked out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, LimitedInterval
from latent_guidance.host import memory
from latent_guidance.host.context import Host, running
from latent_guidance.host.objects import GuiderNode, Noise, Sampler
from latent_guidance.host.progress import Silent
from latent_guidance.host.sampling import sample
from latent_guidance.host.stock.sampling import stock_sampler
from latent_guidance.process import RECTIFIED_FLOW
from latent_guidance.samplers import Recurrence, sample_ddim_cfg_pp, sample_euler

from .test_sampling import calls, latent, model, tokens

TWO_STEPS = torch.tensor([2.0, 1.0, 0.0])
NAMES = ["euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp"]


def noise_of(shape: Any) -> Any:
    return lambda sigma, sigma_next: torch.full(shape, 0.25)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg", [1.0, 0.6])
def test_prompt_and_negative_go_through_the_network_in_one_call_at_every_scale(name: str, cfg: float) -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=cfg)
    sample(Noise(3), guider, stock_sampler(name), TWO_STEPS, latent())
    assert [len(x) for x, _, _ in calls(guider)] == [4, 4]


def test_one_step_by_hand() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=0.6)
    sample(Noise(3), guider, stock_sampler("euler_cfg_pp"), TWO_STEPS, latent())
    (first, _, _), (second, _, _) = calls(guider)
    x = first[:2]
    denoised, uncond = 0.1 * x + 0.25 + 0.6 * 0.75, 0.1 * x + 0.25
    torch.testing.assert_close(second[:2], denoised + 0.5 * (x - uncond))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_negative_is_said_before_the_first_step(name: str) -> None:
    guider = GuiderNode(model(), tokens(1.0))
    with pytest.raises(UserError, match=r"a CFG\+\+ sampler that needs .*no negative conditioning"):
        sample(Noise(3), guider, stock_sampler(name), TWO_STEPS, latent())
    assert not calls(guider)


def test_a_rule_that_rests_at_scale_1_is_refused() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), (CFG(guidance_scale=0.6), LimitedInterval()))
    with pytest.raises(UserError, match="Limited Interval"):
        sample(Noise(3), guider, stock_sampler("euler_cfg_pp"), TWO_STEPS, latent())
    assert not calls(guider)


def test_the_negative_counts_in_the_memory_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "check_sampling", lambda shape, passes, *more, **named: asked.append(passes))
    for name in ("euler", "euler_cfg_pp"):
        sample(Noise(3), GuiderNode(model(), tokens(1.0), tokens(0.25)), stock_sampler(name), TWO_STEPS, latent())
    assert asked == [1, 2]


def test_stock_2m_is_refused_on_flow_where_comfyui_does_something_else() -> None:
    guider = GuiderNode(model(RECTIFIED_FLOW), tokens(1.0), tokens(0.25), cfg=0.6)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(UserError, match=r"'dpmpp_2m_cfg_pp' on a flow model.*velocity.*DPM\+\+ 2M CFG\+\+ Sampler"):
        sample(Noise(3), guider, stock_sampler("dpmpp_2m_cfg_pp"), sigmas, latent())
    sample(Noise(3), guider, stock_sampler("euler_cfg_pp"), sigmas, latent())


@pytest.mark.parametrize("function", [sample_euler, sample_ddim_cfg_pp])
def test_a_bar_ends_with_the_steps_however_often_they_are_taken(function: Any) -> None:
    moved: list[int] = []

    class Watched(Silent):
        def steps(self, total: int) -> Any:
            assert total == 2

            class Bar:
                def update(self, steps: int) -> None:
                    moved.append(steps)

                def close(self) -> None:
                    pass

            return Bar()

    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), cfg=0.6)
    sampler = Sampler(function, {"recurrence": Recurrence(3)}, noise=lambda x, *_: noise_of(x.shape))
    with running(Host(progress=Watched())):
        sample(Noise(3), guider, sampler, TWO_STEPS, latent())
    assert moved == [1, 0, 0, 1, 0, 0] and len(calls(guider)) == 6
