"""Rules with branches of their own in the embedded host: one call of each network, what is counted, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.attention import AttentionPatch, select_layers
from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    Autoguidance,
    LimitedInterval,
    PerturbedAttention,
    SlidingWindow,
    TokenPerturbation,
    TwoConditions,
)
from latent_guidance.host import memory
from latent_guidance.host.objects import GuiderNode, Noise
from latent_guidance.host.sampling import sample
from latent_guidance.process import RECTIFIED_FLOW

from .test_sampling import EULER, SPACE, Linear, calls, latent, model, tokens

ONE_STEP = torch.tensor([1.0, 0.0])


def two(value: float = 0.5, **more: Any) -> TwoConditions:
    return TwoConditions(condition=tokens(value), **{"first_scale": 2.0, "second_scale": 3.0, **more})


def run(guider: GuiderNode, sigmas: Tensor = ONE_STEP) -> Tensor:
    return sample(Noise(3), guider, EULER, sigmas, latent())[0]


def test_three_conditions_go_through_the_network_in_one_call() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), (two(),))
    out = run(guider)
    [(x, sigma, cond)] = calls(guider)
    assert len(x) == len(sigma) == 6 and isinstance(cond, Tensor)
    assert cond[:, 0, 0].tolist() == [0.25, 0.25, 1.0, 1.0, 0.5, 0.5]
    torch.testing.assert_close(out, (0.1 * x[:2] + 0.25 + 2 * 0.25 + 3 * 0.5) / 0.5)


def test_entries_of_a_rules_own_condition_are_averaged_and_lengths_made_equal() -> None:
    rule = TwoConditions(
        condition=[*tokens(0.25), [torch.full((1, 2, 3), 0.75), {}]], first_scale=2.0, second_scale=3.0
    )
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), (rule,))
    out = run(guider)
    [(x, _, cond)] = calls(guider)
    assert len(x) == 8 and isinstance(cond, Tensor) and cond.shape[1] == 14
    torch.testing.assert_close(out, run(GuiderNode(model(), tokens(1.0), tokens(0.25), (two(),))))


def test_a_closed_window_pays_for_the_prompt_alone() -> None:
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), (two(), LimitedInterval(sigma_lo=0.5, sigma_hi=5.0)))
    run(guider, torch.tensor([8.0, 2.0, 0.4, 0.0]))
    assert [len(x) for x, _, _ in calls(guider)] == [2, 6, 2]
    neutral = GuiderNode(model(), tokens(1.0), None, (two(first_scale=1.0, second_scale=1.0),))
    run(neutral)
    assert [len(x) for x, _, _ in calls(neutral)] == [2]


def test_the_memory_estimate_counts_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []

    def count(shape: Any, branches: int, widest: int, device: Any, *, tokens: int, width: int) -> None:
        counted.append((branches, tokens))

    monkeypatch.setattr(memory, "check_sampling", count)
    rule = TwoConditions(condition=[*tokens(0.5), [torch.ones(1, 2, 3), {}]])
    run(GuiderNode(model(), tokens(1.0), tokens(0.25), (rule,)))
    run(GuiderNode(model(), tokens(1.0), tokens(0.25), (two(),)))
    run(GuiderNode(model(), tokens(1.0), tokens(0.25), (two(first_scale=1.0),)))
    run(GuiderNode(model(), tokens(1.0), tokens(0.25)))
    assert counted == [(4, 14), (3, 7), (2, 7), (1, 7)]


def test_what_cannot_be_evaluated_is_refused_before_the_first_step() -> None:
    area = [[tokens(1.0)[0][0], {"area": (1, 1, 0, 0)}]]
    for rule, negative, words in (
        (two(), None, "no negative conditioning"),
        (TwoConditions(condition=area), tokens(0.25), "rule's own conditioning holds area"),
        (TwoConditions(condition=[]), tokens(0.25), "empty rule's own conditioning"),
    ):
        guider = GuiderNode(model(), tokens(1.0), negative, (rule,))
        with pytest.raises(UserError, match=words):
            run(guider)
        assert not calls(guider)


def test_a_rule_with_branches_of_its_own_is_refused_on_a_model(embedded: dict[str, Any]) -> None:
    inputs = {"condition": tokens(1.0), "first_scale": 1.5, "second_scale": 3.0, "form": "nested"}
    (rules,) = embedded["LGTwoConditions"]().append(**inputs)
    with pytest.raises(UserError, match="'Two-Condition Guidance' on a model"):
        embedded["LGApplyGuidance"]().patch(model(), rules)


def test_perp_neg_takes_every_entry_of_its_conditioning_as_a_negative(embedded: dict[str, Any]) -> None:
    from latent_guidance.host import stock

    combine: Any = stock.NODE_CLASS_MAPPINGS["ConditioningCombine"]
    (both,) = combine().combine(tokens(0.5), tokens(0.75))
    (rules,) = embedded["LGPerpNeg"]().append(negative=both, guidance_scale=3.0, negative_scale=0.5)
    guider = GuiderNode(model(), tokens(1.0), tokens(0.25), rules)
    out = run(guider)
    [(x, _, cond)] = calls(guider)
    assert isinstance(cond, Tensor) and cond[::2, 0, 0].tolist() == [0.25, 1.0, 0.5, 0.75]
    # all estimates differ along one direction: nothing of the negatives is at right angles to it
    torch.testing.assert_close(out, (0.1 * x[:2] + 0.25 + 3 * 0.75) / 0.5)


def auto(weak: Any, scale: float = 3.0) -> Autoguidance:
    return Autoguidance(weak_model=weak, guidance_scale=scale)


def test_a_weak_model_is_called_once_a_step_with_the_prompt_and_no_negative_is_needed() -> None:
    class Half(Linear):
        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return super().__call__(x, sigma, cond) / 2

    weak = replace(model(), denoiser=Half())
    guider = GuiderNode(model(), tokens(1.0), None, (auto(weak), LimitedInterval(sigma_lo=0.5, sigma_hi=5.0)))
    run(guider, torch.tensor([8.0, 2.0, 0.4, 0.0]))
    seen: Any = weak.denoiser
    assert [len(x) for x, _, _ in calls(guider)] == [2, 2, 2] and [len(x) for x, _, _ in seen.calls] == [2]
    assert seen.calls[0][2][:, 0, 0].tolist() == [1.0, 1.0]
    guider = GuiderNode(model(), tokens(1.0), None, (auto(weak),))
    out = run(guider)
    x = calls(guider)[0][0]
    torch.testing.assert_close(out, (0.1 * x + 1) * (0.5 + 3 * 0.5) / 0.5)


def test_the_memory_estimate_takes_the_models_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        memory, "check_sampling", lambda shape, branches, widest, *_, **__: counted.append((branches, widest))
    )
    run(GuiderNode(model(widest=64), tokens(1.0), tokens(0.25), (auto(model(widest=32)),)))
    run(GuiderNode(model(widest=64), tokens(1.0), tokens(0.25), (auto(model(widest=32), 1.0),)))
    assert counted == [(1, 64), (1, 32), (1, 64)]


def test_a_weak_model_that_does_not_fit_is_refused_before_the_first_step(embedded: dict[str, Any]) -> None:
    mine = model()
    for weak, words in (
        (mine, "one model as a rule's own"),
        (replace(mine, rules=(CFG(),)), "one model as a rule's own"),
        (model(rules=(CFG(),)), "with rules on it"),
        (model(RECTIFIED_FLOW), "own model of rectified flow latents, for a guider's of VE-scaled"),
        (replace(model(), latent_space=replace(SPACE, channels=16)), "16 channels"),
        (replace(model(), latent_space=replace(SPACE, scaling_factor=0.25)), "scaling factor 0.25"),
    ):
        with pytest.raises(UserError, match=words):
            run(GuiderNode(mine, tokens(1.0), None, (auto(weak),)))
        with pytest.raises(UserError, match=words):
            embedded["LGGuider"]().make(mine, tokens(1.0), None, (auto(weak),))
    assert not calls(GuiderNode(mine, tokens(1.0)))


class Patchable(Linear):
    """Takes changed attention, and notes it; a changed sample's estimate is halved."""

    def __init__(self) -> None:
        super().__init__()
        self.now: list[Any] = []
        self.patches: list[list[Any]] = []

    def check_patch(self, patch: AttentionPatch) -> None:
        select_layers(patch.layers, ["d0", "m0"])

    @contextmanager
    def patched(self, patches: Any) -> Iterator[None]:
        self.now = list(patches)
        yield
        self.now = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.patches.append(self.now)
        factors = torch.tensor([0.5 if patch else 1.0 for patch in self.now or [None] * len(x)])
        return super().__call__(x, sigma, cond) * factors.reshape(-1, 1, 1, 1)


def patchable() -> tuple[Any, Patchable]:
    denoiser = Patchable()
    return replace(model(), denoiser=denoiser), denoiser


def test_a_weakened_pass_shares_the_call_and_every_entry_of_the_prompt_is_weakened() -> None:
    host_model, denoiser = patchable()
    positive = [*tokens(1.0), *tokens(0.5)]
    chain = (CFG(guidance_scale=2.0), PerturbedAttention(scale=3.0))
    out = run(GuiderNode(host_model, positive, tokens(0.25), chain))
    [(x, _, _)] = denoiser.calls
    [patches] = denoiser.patches
    assert len(x) == 10 and [bool(patch) for patch in patches] == [False] * 6 + [True] * 4
    plain = run(GuiderNode(patchable()[0], positive, tokens(0.25), chain[:1]))
    weak = 0.5 * run(GuiderNode(patchable()[0], positive, None))
    torch.testing.assert_close(out, plain + 3 * weak)
    on_model = host_model.with_rules([PerturbedAttention(scale=3.0)])
    torch.testing.assert_close(run(GuiderNode(on_model, positive, tokens(0.25), chain[:1])), out)


def test_a_shuffle_is_another_one_at_every_step() -> None:
    host_model, denoiser = patchable()
    run(GuiderNode(host_model, tokens(1.0), None, (TokenPerturbation(layers="d0"),)), torch.tensor([8.0, 2.0, 0.0]))
    assert [[patch and patch.step for patch in patches] for patches in denoiser.patches] == [
        [None, None, 0, 0],
        [None, None, 1, 1],
    ]


def test_windows_are_a_call_of_their_own_and_counted_as_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(memory, "check_sampling", lambda shape, branches, *_, **__: counted.append((shape, branches)))
    guider = GuiderNode(model(), [*tokens(1.0), *tokens(0.5)], tokens(0.25), (CFG(guidance_scale=2.0), SlidingWindow()))
    run(guider)
    shape = tuple(latent()["samples"].shape)
    part = tuple(-(-size * 5 // 8) for size in shape[2:])
    assert counted == [(shape, 3), ((*shape[:2], *part), 8)]
    assert [tuple(x.shape) for x, _, _ in calls(guider)] == [
        (3 * shape[0], *shape[1:]),
        (8 * shape[0], shape[1], *part),
    ]
    counted.clear()
    run(GuiderNode(patchable()[0], tokens(1.0), tokens(0.25), (CFG(guidance_scale=2.0), PerturbedAttention())))
    run(GuiderNode(patchable()[0], tokens(1.0), None, (PerturbedAttention(scale=0.0),)))
    assert [branches for _, branches in counted] == [3, 1]


def test_attention_that_cannot_be_changed_is_refused_before_the_first_step() -> None:
    for host_model, rule, words in (
        (model(), PerturbedAttention(), "does not let that be changed"),
        (patchable()[0], PerturbedAttention(layers="u0"), "d0, m0"),
    ):
        for guider in (
            GuiderNode(host_model, tokens(1.0), None, (rule,)),
            GuiderNode(host_model.with_rules([rule]), tokens(1.0), None),
        ):
            with pytest.raises(UserError, match=words):
                run(guider)
            assert calls(guider) == []
