"""The bench: samples that depend on their own seed alone, and everything on the device it was told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_guidance.errors import UserError
from latent_guidance.evaluation.bench import TINY, Bench
from latent_guidance.evaluation.judge import Judge
from latent_guidance.evaluation.unseen import UNSEEN


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return int((a.int() - b.int()).abs().max()) <= 1


def test_a_sample_is_the_same_alone_and_in_any_batch(bench: Bench) -> None:
    seeds = [5, 6, 7, 8, 9]
    together = bench.by_prompt([f"red square {s}" for s in seeds], seeds)
    assert together.shape == (5, 3, 32, 32) and together.dtype == torch.uint8
    assert near(together[4:], bench.by_prompt(["red square 9"], [9]))
    assert not near(together[4:], bench.by_prompt(["red square 9"], [8]))
    assert not near(together[4:], bench.by_prompt(["blue square 1"], [9]))


def test_the_label_steers_and_a_neutral_scale_does_not(bench: Bench) -> None:
    seeds = bench.seeds(2)
    plain = bench.from_nothing(seeds)
    assert torch.equal(bench.by_classifier("reds", seeds, scale=0.0), plain)
    reds, blues = (bench.by_classifier(label, seeds, scale=300.0) for label in bench.labels)
    assert not near(reds, plain) and not near(reds, blues)
    assert not near(bench.by_classifier("reds", seeds, scale=0.5, scaling="relative"), plain)


def test_seeds_of_different_blocks_do_not_meet(bench: Bench) -> None:
    assert bench.seeds(3) == [1000, 1001, 1002]
    assert not set(bench.seeds(500, block=1)) & set(bench.seeds(500, block=2))


def test_a_smaller_choice_of_names_begins_a_larger_one(bench: Bench) -> None:
    assert bench.names(10)[:4] == bench.names(4)
    assert sorted(bench.names(24)) == list(range(24))


def test_reconstructions_are_kept_for_this_vae_and_made_again_for_another(bench: Bench, tiny_model: Path) -> None:
    first = bench.reconstructions
    assert first.shape == bench.data.images.shape and first.dtype == torch.uint8
    said: list[str] = []
    again = Bench(tiny_model, bench.pictures, bench.out, plan=TINY, device="cpu", batch=3, say=said.append)
    assert torch.equal(again.reconstructions, first) and not said
    other = Bench(tiny_model, bench.pictures, bench.out, plan=TINY, device="cpu", batch=3, say=said.append)
    other.vae_mark = "another"
    assert torch.equal(other.reconstructions, first) and said


def test_wrong_pictures_and_devices_are_refused(bench: Bench, tiny_model: Path, models_folder: Path) -> None:
    def make(model: Path, device: str = "cpu", batch: int = 1) -> None:
        Bench(model, bench.pictures, bench.out, plan=TINY, device=device, batch=batch, say=print)

    with pytest.raises(UserError, match="same groups"):
        make(models_folder / "latent_guidance" / "tiny")
    with pytest.raises(UserError, match="batch"):
        make(tiny_model, batch=0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees 0 GPUs"):
            make(tiny_model, "cuda")


class _Mixing(TorchDispatchMode):
    """Notes the operations that mix tensors of another device with CPU tensors of at least one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        elsewhere = [t for t in tensors if t.device.type != "cpu"]
        self.seen += bool(elsewhere)
        if elsewhere and any(t.device.type == "cpu" and t.ndim for t in tensors) and "copy" not in func.name():
            self.mixed.add(func.name())
        return func(*args, **(kwargs or {}))


def test_the_judge_runs_where_its_weights_are() -> None:
    judge = Judge(3, 32).to("meta").eval()
    from latent_guidance.evaluation.augment import augmented, seen_by_judge

    with _Mixing() as watch:
        pictures = torch.zeros(2, 3, 40, 40, dtype=torch.uint8, device="meta")
        assert judge(augmented(pictures, 32, torch.Generator().manual_seed(0))).device.type == "meta"
        assert judge(seen_by_judge(pictures, 32)).device.type == "meta"
    assert watch.seen > 50 and not watch.mixed


def test_there_are_fifty_captions_and_none_twice() -> None:
    assert len(UNSEEN) == 50 == len(set(UNSEEN))
