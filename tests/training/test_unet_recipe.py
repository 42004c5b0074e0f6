"""The UNet learns, from every kind of caption and from weaker stages of itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.models.checkpoint import load_text_encoder, load_unet, save_unet
from latent_guidance.models.tiny import SCHEDULER_CONFIG, make_tiny_checkpoint
from latent_guidance.schedules import schedule_from_config
from latent_guidance.training.latents import LatentSet
from latent_guidance.training.loop import LoopSettings
from latent_guidance.training.unet import DRAWS, KINDS, UNetRecipe, averaged_unet, caption_ids, captions, train_unet

from .samples import UNET, synthetic


def test_unet_recipe_learns_and_the_empty_prompt_is_trained(tmp_path: Path) -> None:
    latents = synthetic(spread=0.02)
    settings = LoopSettings(steps=80, learning_rate=3e-3, warmup=5, log_every=10, ema_decay=0.9, bf16=False)
    unet, encoder = train_unet(latents, tmp_path, settings=settings, recipe=UNET, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert not unet.training and not any(p.requires_grad for p in encoder.network.parameters())
    ids = caption_ids(encoder, latents)
    assert ids.shape == (6, 8, 40, 77)
    assert torch.equal(ids[3, 0, 0], encoder.prompt_ids([""])[0])
    assert torch.equal(ids[1, 5, 1], encoder.prompt_ids(["thing 1, high"])[0])
    unused = torch.ones(int(encoder.config["vocab_size"]), dtype=torch.bool)
    unused[ids.unique()] = False
    table = encoder.network.token_embedding.weight
    mean = table[~unused].mean(0)
    assert int(unused.sum()) > 40_000 and torch.allclose(table[unused], mean.expand_as(table[unused]), atol=1e-6)
    assert float(mean.abs().max()) > 1e-4
    again, _ = averaged_unet(latents, tmp_path, settings=settings, recipe=UNET)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), unet.parameters(), strict=True))


def test_without_a_state_nothing_is_written_for_trained(tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"state\.safetensors was not found: there are no trained weights"):
        averaged_unet(synthetic(), tmp_path / "wrong", settings=settings, recipe=UNET)


@pytest.mark.parametrize(
    ("config", "predicted"),
    [
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({}, "epsilon"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
    ],
)
def test_only_schedules_of_v_networks_are_trained_on(config: dict[str, str], predicted: str, tmp_path: Path) -> None:
    settings = LoopSettings(steps=1, learning_rate=1e-3, bf16=False)
    with pytest.raises(UserError, match=f"a network that predicts {predicted}"):
        train_unet(synthetic(), tmp_path, settings=settings, recipe=UNET, scheduler_config=config, progress=False)


def test_a_new_run_can_start_from_a_checkpoint(tmp_path: Path) -> None:
    latents = synthetic(spread=0.02)
    settings = LoopSettings(steps=1, learning_rate=1e-12, bf16=False)
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    recipe = replace(UNET, unet={"channels": (32, 64), "attention": (False, True), "heads": 2})
    unet, encoder = train_unet(
        latents, tmp_path / "run", settings=settings, recipe=recipe, start_from=tiny, progress=False
    )
    for ours, theirs in zip(unet.parameters(), load_unet(tiny).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = load_text_encoder(tiny)
    torch.testing.assert_close(encoder.encode("thing 1")[0], before.encode("thing 1")[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="another shape"):
        train_unet(latents, tmp_path / "other", settings=settings, recipe=UNET, start_from=tiny, progress=False)


def _first_loss(folder: Path, latents: LatentSet, recipe: UNetRecipe, **folders: Path) -> float:
    """Of the first step of a run that hardly moves."""
    settings = LoopSettings(steps=1, learning_rate=1e-12, log_every=1, bf16=False)
    train_unet(latents, folder, settings=settings, recipe=recipe, progress=False, **folders)
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]


def test_a_weaker_stage_sharpens_the_empty_prompt_alone(tmp_path: Path) -> None:
    latents = synthetic(spread=0.02)
    strong, weak = (make_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("strong", "weak")))
    tiny = replace(UNET, unet={"channels": (32, 64), "attention": (False, True), "heads": 2})
    empty, named = tiny.dropping(1.0), tiny.dropping(0.0)
    stages = {"start_from": strong, "away_from": weak}
    # the run starts as the strong stage: what is left to learn is (sharpness - 1) * (strong - weak)
    everywhere = replace(empty, sharp_below=math.inf)
    one, two, three = (
        _first_loss(tmp_path / f"{sharpness}", latents, replace(everywhere, sharpness=sharpness), **stages)
        for sharpness in (1.0, 2.0, 3.0)
    )
    assert one < 1e-6 * two and three == pytest.approx(4 * two, rel=1e-3)
    nowhere = _first_loss(tmp_path / "nowhere", latents, replace(empty, sharp_below=-math.inf), **stages)
    usual = _first_loss(tmp_path / "usual", latents, empty, **stages)
    noise = _first_loss(tmp_path / "noise", latents, empty, start_from=strong)
    assert nowhere == noise and len({two, usual, noise}) == 3
    plain = _first_loss(tmp_path / "plain", latents, named, start_from=strong)
    assert plain != noise  # the same pictures, noise and times, and another prompt
    assert _first_loss(tmp_path / "named", latents, named, **stages) == plain
    with pytest.raises(UserError, match="starts from nothing"):
        _first_loss(tmp_path / "alone", latents, empty, away_from=weak)
    with pytest.raises(UserError, match=r"sharpness = 0\.5"):
        replace(tiny, sharpness=0.5)


@pytest.mark.parametrize("power", [1.0, 0.3])
def test_it_learns_v_at_times_spread_by_their_power(tmp_path: Path, power: float) -> None:
    """Where latents are all 1 and the network says 1, the loss is alpha^2 + (1 + sigma)^2 = 2 + 2 sigma, v = alpha e - sigma x."""
    latents = synthetic()
    ones = replace(latents, mean=torch.ones_like(latents.mean), std=torch.zeros_like(latents.std))
    tiny = make_tiny_checkpoint(tmp_path / "tiny")
    unet = load_unet(tiny)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.ones_(unet.conv_out.bias)
    save_unet(unet, tiny)
    recipe = replace(UNET, unet={"channels": (32, 64), "attention": (False, True), "heads": 2}, time_power=power)
    found = _first_loss(tmp_path / "run", ones, recipe, start_from=tiny)
    schedule, _ = schedule_from_config(SCHEDULER_CONFIG)
    ratio = schedule.sigmas.double()
    place = (torch.arange(1000) + 0.5) / 1000
    sigma = (ratio / (1 + ratio**2).sqrt())[(place**power * 1000).long()]
    assert found == pytest.approx(float((2 + 2 * sigma).mean()), abs=0.12)
    assert abs(float(2 * sigma.mean()) - float(2 * (ratio / (1 + ratio**2).sqrt()).mean())) > 0.24 or power == 1


def test_captions_of_every_kind() -> None:
    plain = synthetic(count=3)
    kinds = captions(plain)
    assert kinds[4] == kinds[5] == [list(plain.texts)] * DRAWS  # without keywords and other captions: the caption
    words = (("a", "b", "c", "d", "e"), (), ("f",))
    described = replace(plain, keywords=words, other_texts=(("甲", "🎸"), ("乙",), ()))
    assert torch.allclose(UNetRecipe().shares().sum(), torch.tensor(1.0))
    _, _, groups, null, keywords, others = captions(described)
    assert groups == [["low & dim", "high", "low & dim"]] and null == [[""] * 3]
    drawn = [draw[0].split(", ") for draw in keywords]
    assert all(1 <= len(set(some)) == len(some) <= 4 and set(some) <= set(words[0]) for some in drawn)
    assert len({tuple(some) for some in drawn}) > 3
    assert {draw[1] for draw in keywords} == {"thing 1"} and {draw[2] for draw in keywords} == {"f"}
    assert {draw[0] for draw in others} == {"甲", "🎸"} and {draw[2] for draw in others} == {"thing 2"}


def test_other_captions_share_what_the_empty_prompt_leaves_as_they_did() -> None:
    usual = UNetRecipe()
    much = usual.dropping(0.85)
    empty = KINDS.index("")
    named = [kind for kind in range(len(KINDS)) if kind != empty]
    assert much.drop == 0.85 and abs(float(much.shares()[empty]) - 0.85) < 1e-6
    torch.testing.assert_close(much.shares()[named] / 0.15, usual.shares()[named] / 0.9)
    torch.testing.assert_close(much.dropping(usual.drop).shares(), usual.shares())
    assert usual.dropping(1.0).dropping(0.5).shares().tolist() == [0.5, 0, 0, 0.5, 0, 0]
    for drop in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"empty prompt {drop}.*none below 0"):
            usual.dropping(drop)
