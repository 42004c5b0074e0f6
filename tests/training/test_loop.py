"""The loop: resuming continues bit for bit, NaN stops at the last good state, every epoch sees everything once."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from latent_guidance.errors import UserError
from latent_guidance.models.files import read_safetensors, write_safetensors
from latent_guidance.training.loop import STATE_FILE, LoopSettings, TrainingRun, batch_indices, step_generator
from latent_guidance.training.optimizers import TrainingOptimizer

SETTINGS = LoopSettings(steps=20, learning_rate=0.05, warmup=3, log_every=5, seed=4)


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


class _Loss:
    def __init__(self, network: nn.Module, *, nan_at: int = -1, kill_at: int = -1) -> None:
        self.network, self.nan_at, self.kill_at = network, nan_at, kill_at

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(16, 3, generator=generator)
        loss = (self.network(x) - x.sum(1, keepdim=True)).square().mean()
        return (loss * float("nan") if step == self.nan_at else loss), {}


def _trained(folder: Path, *, stop_at: int | None = None, settings: LoopSettings = SETTINGS) -> TrainingRun:
    run = TrainingRun(_network(), folder, settings)
    loss = _Loss(run.network, kill_at=-1 if stop_at is None else stop_at)
    if stop_at is None:
        run.train(loss, progress=False)
    else:
        with pytest.raises(KeyboardInterrupt, match="state is in"):
            run.train(loss, progress=False)
    return run


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = _trained(tmp_path, settings=replace(SETTINGS, steps=200))
    loss, _ = _Loss(run.network)(10_000, step_generator(0, 10_000))
    start, _ = _Loss(_network())(10_000, step_generator(0, 10_000))
    assert loss.item() < 0.1 * start.item()


@pytest.mark.parametrize("muon", [False, True])
def test_resumed_run_equals_an_unbroken_one(tmp_path: Path, muon: bool) -> None:
    settings = replace(SETTINGS, muon=muon)
    whole = _trained(tmp_path / "whole", settings=settings)
    _trained(tmp_path / "broken", stop_at=7, settings=settings)
    resumed = _trained(tmp_path / "broken", settings=settings)
    assert resumed.step == whole.step == 20
    for name, value in whole.averaged().items():
        assert torch.equal(value, resumed.averaged()[name])
    first, second = ((tmp_path / kind / STATE_FILE) for kind in ("whole", "broken"))
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        names = list(a.keys())
        remembered = "optimizer.momentum_buffer.0.weight" if muon else "optimizer.exp_avg_sq.0.weight"
        assert names == list(b.keys()) and remembered in names and "optimizer.exp_avg_sq.0.bias" in names
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in names)
    other = _trained(tmp_path / "other", settings=replace(SETTINGS, seed=5))
    assert not torch.equal(other.averaged()["0.weight"], whole.averaged()["0.weight"])


def test_nan_stops_at_the_last_good_state(tmp_path: Path) -> None:
    run = TrainingRun(_network(), tmp_path, replace(SETTINGS, save_minutes=0.0))
    with pytest.raises(UserError, match=r"stopped at step 6.*last good state.*learning rate below 0\.05"):
        run.train(_Loss(run.network, nan_at=6), progress=False)
    again = TrainingRun(_network(), tmp_path, SETTINGS)
    assert again.step == 6
    assert all(torch.isfinite(value).all() for value in again.network.state_dict().values())


def test_weights_that_a_step_made_infinite_are_never_saved(tmp_path: Path) -> None:
    run = TrainingRun(_network(), tmp_path, replace(SETTINGS, save_minutes=0.0))
    step = run.optimizer.step

    def leap(learning_rate: float) -> None:
        step(learning_rate)
        if run.step == 6:
            next(iter(run.parameters.values())).data[0] = math.inf

    run.optimizer.step = leap  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"stopped at step 7.*not finite.*last good state"):
        run.train(_Loss(run.network), progress=False)
    again = TrainingRun(_network(), tmp_path, SETTINGS)
    assert again.step == 6
    assert all(torch.isfinite(value).all() for value in again.averaged().values())


@pytest.mark.parametrize("change", [{"seed": 5}, {"muon": True}, {"weight_decay": 0.1}, {"ema_decay": 0.5}])
def test_a_run_keeps_the_settings_that_it_was_begun_with(tmp_path: Path, change: dict[str, Any]) -> None:
    _trained(tmp_path, stop_at=7)
    [(name, value)] = change.items()
    with pytest.raises(UserError, match=f"was trained with {name} = .*{value} is asked for now"):
        TrainingRun(_network(), tmp_path, replace(SETTINGS, **change))
    assert TrainingRun(_network(), tmp_path, replace(SETTINGS, steps=40, learning_rate=0.01)).step == 8
    with pytest.raises(UserError, match="was trained with batch = 4"):
        other = tmp_path / "recipe"
        run = TrainingRun(_network(), other, SETTINGS, recipe={"batch": 4})
        run.save()
        TrainingRun(_network(), other, SETTINGS, recipe={"batch": 5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.exp_avg.0.weight", torch.zeros(7, 3)),
        ("optimizer.step.0.weight", torch.zeros(3)),
        ("ema.0.weight", torch.zeros(1)),
        ("ema.0.weight", None),
        ("ema.0.bias", torch.full((8,), math.nan)),
        ("step", "-5"),
        ("step", "x"),
        ("seconds", "nan"),
        ("seconds", None),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, name: str, value: Tensor | str | None) -> None:
    _trained(tmp_path, stop_at=7)
    path = tmp_path / STATE_FILE
    tensors, metadata = read_safetensors(path)
    place: dict[str, Any] = tensors if "." in name else metadata
    assert name in place
    place[name] = value
    if value is None:
        del place[name]
    write_safetensors(path, tensors, dtype=torch.float32, metadata=metadata)
    with pytest.raises(UserError, match=r"state\.safetensors lacks a part"):
        TrainingRun(_network(), tmp_path, SETTINGS)


def test_a_state_cut_short_is_refused(tmp_path: Path) -> None:
    _trained(tmp_path, stop_at=7)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        TrainingRun(_network(), tmp_path, SETTINGS)


def test_averages_lag_behind_and_decay_draws_weights_to_nothing(tmp_path: Path) -> None:
    at_once = _trained(tmp_path / "0", settings=replace(SETTINGS, ema_decay=0.0))
    lagging = _trained(tmp_path / "0.999")
    decayed = _trained(tmp_path / "decayed", settings=replace(SETTINGS, weight_decay=2.0))
    weights = at_once.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in at_once.averaged().items())
    assert not torch.equal(lagging.averaged()["0.weight"], weights["0.weight"])
    assert float(decayed.network.state_dict()["0.weight"].norm()) < 0.9 * float(weights["0.weight"].norm())


@pytest.mark.parametrize("device", ["banana", "", "meta", "cuda:x", "cuda:99"])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"device {device!r}.*use cpu"):
        replace(SETTINGS, device=device)


def test_states_of_other_networks_are_refused(tmp_path: Path) -> None:
    _trained(tmp_path)
    with pytest.raises(UserError, match="not a state of this network"):
        TrainingRun(nn.Linear(3, 1), tmp_path, SETTINGS)


def test_states_of_other_data_are_refused_where_both_say_what_theirs_is(tmp_path: Path) -> None:
    def step_of(data: str, folder: str) -> int:
        run = TrainingRun(_network(), tmp_path / folder, SETTINGS, data=data)
        run.train(_Loss(run.network), progress=False)
        return run.step

    assert step_of("these", "marked") == step_of("these", "marked") == step_of("", "unmarked") == 20
    assert step_of("these", "unmarked") == 20
    assert step_of("", "marked") == 20
    with pytest.raises(UserError, match="other data"):
        step_of("those", "marked")


def test_learning_rate_rises_and_falls_to_nothing(tmp_path: Path) -> None:
    run = TrainingRun(_network(), tmp_path, replace(SETTINGS, steps=100, warmup=10))
    rates = []
    for run.step in range(101):
        rates.append(run._rate())
    assert rates[0] == pytest.approx(0.005, rel=1e-3) and max(rates) == rates[9] and rates[100] == 0
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_time_limit_ends_the_run_with_the_rate_at_nothing(tmp_path: Path) -> None:
    run = TrainingRun(_network(), tmp_path, replace(SETTINGS, steps=10**9, minutes=0.005))
    run.train(_Loss(run.network), progress=False)
    assert 0 < run.step < 10**6 and run._rate() == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [0, -1]), ("learning_rate", [0.0, -1.0, math.inf, math.nan]), ("warmup", [-1]), ("decay", [0.0, 1.1, math.nan]),
        ("weight_decay", [-0.1]), ("clip", [0.0]), ("ema_decay", [1.0, -0.1]), ("minutes", [0.0, -1.0]), ("save_minutes", [-1.0]),
        ("log_every", [0]),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"{name} = {value} in LoopSettings"):
            replace(SETTINGS, **{name: value})


def test_every_epoch_sees_every_sample_once() -> None:
    steps = [batch_indices(step, batch=4, total=10, seed=3) for step in range(5)]
    first, second = torch.cat(steps).split(10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert torch.equal(batch_indices(3, batch=4, total=10, seed=3), steps[3])


def test_decay_keeps_the_rate_level_until_the_end(tmp_path: Path) -> None:
    def rates(decay: float) -> list[float]:
        settings = LoopSettings(steps=20, learning_rate=1.0, warmup=1, decay=decay)
        run = TrainingRun(torch.nn.Linear(1, 1), tmp_path / str(decay), settings)
        found = []
        for run.step in range(20):
            found.append(run._rate())
        return found

    level = rates(0.25)
    assert level[:16] == [1.0] * 16
    assert all(a > b for a, b in pairwise(level[15:])) and level[-1] < 0.3
    assert all(a > b for a, b in pairwise(rates(1.0)))


def test_muon_moves_matrices_by_equal_singular_values_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3)
    named = {"hidden.weight": first.weight, "conv_in.weight": second.weight, "bias": first.bias}
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = TrainingOptimizer(named, learning_rate=1.0, weight_decay=0.0, muon=True)
    for p in named.values():
        p.grad = torch.randn_like(p) * torch.linspace(1, 100, len(p)).reshape(-1, *(1,) * (p.ndim - 1))
    optimizer.step(1e-3)
    moved = {name: before[name] - p.detach() for name, p in named.items()}
    expected = 1e-3 * 0.2 * (6 * 9) ** 0.5  # the root mean square of AdamW's step, for a matrix (8, 54)
    assert first.weight.grad is not None
    plain = torch.linalg.svdvals(first.weight.grad.flatten(1))
    assert float(plain[-1] / plain[0]) < 0.05  # a step along the gradient itself would be far from even
    singular = torch.linalg.svdvals(moved["hidden.weight"].flatten(1)) / expected
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
    for name in ("conv_in.weight", "bias"):  # AdamW's first step is the sign of the gradient
        grad = named[name].grad
        assert grad is not None and torch.allclose(moved[name], 1e-3 * grad.sign(), atol=1e-6)
