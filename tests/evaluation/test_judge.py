"""The judge: it learns what it is shown, sees only what it may see, and comes back from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.evaluation.augment import augmented, seen_by_judge
from latent_guidance.evaluation.bench import Bench
from latent_guidance.evaluation.judge import FILE, Judge, accuracies, held_out, load_judge, measure_judge, train_judge

CPU = torch.device("cpu")


def train(bench: Bench, classes: torch.Tensor, seen: torch.Tensor, steps: int) -> Judge:
    sources = [bench.large, bench.data.images]
    return train_judge(sources, classes, count=2, seen=seen, size=32, steps=steps, batch=16, seed=0, device=CPU)


def test_a_judge_learns_colours_that_it_saw_and_tells_them_on_pictures_that_it_did_not(bench: Bench) -> None:
    left_out = held_out(24)
    judge = train(bench, bench.data.classes, ~left_out, 30)
    assert not judge.training
    result = accuracies(judge, bench.data.images[left_out], bench.data.classes[left_out], bench.labels)
    assert result["all"] == 1 and result["pictures"] == 3
    swapped = accuracies(judge, bench.data.images, 1 - bench.data.classes, bench.labels)
    assert swapped["all"] < 0.2 and swapped["mean_of_groups"] < 0.2


def test_held_out_pictures_are_never_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.Tensor] = []

    def spy(pictures: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        shown.append(pictures)
        return augmented(pictures, size, generator)

    monkeypatch.setattr("latent_guidance.evaluation.judge.augmented", spy)
    only = torch.zeros(24, dtype=torch.bool)
    only[[3, 4]] = True
    train(bench, bench.data.classes, only, 4)
    allowed = [source[i] for source in (bench.large, bench.data.images) for i in (3, 4)]
    assert len(shown) == 4
    for picture in (picture for batch in shown for picture in batch):
        assert any(torch.equal(picture, kind) for kind in allowed)


def test_the_examined_judge_never_sees_the_tenth_and_the_final_one_sees_all(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def spy(*args: Any, **options: Any) -> Judge:
        seen.append(options["seen"])
        return train_judge(*args, **options)

    monkeypatch.setattr("latent_guidance.evaluation.judge.train_judge", spy)
    measure_judge(bench)
    assert [mask.tolist() for mask in seen] == [(~held_out(24)).tolist(), [True] * 24]


def test_one_in_ten_is_held_out_and_not_the_guides_tenth() -> None:
    from latent_guidance.training.classifier import held_out as guides

    mask = held_out(1870)
    assert int(mask.sum()) == 187
    assert not torch.equal(mask, guides(1870))


def test_a_group_that_is_never_seen_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match="group without pictures"):
        train(bench, bench.data.classes, bench.data.classes == 0, 1)


def test_accuracy_is_counted_per_group_and_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(2, 32)
    monkeypatch.setattr(judge, "verdicts", lambda pictures: torch.tensor([0, 0, 0, 1, 0]))
    result = accuracies(judge, torch.zeros(5, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1]), ("a", "b"))
    assert result["all"] == pytest.approx(0.8)
    assert result["by_group"] == {"a": 1.0, "b": 0.5} and result["mean_of_groups"] == 0.75


def test_augmentation_changes_every_picture_but_not_what_it_is_of(bench: Bench) -> None:
    x = augmented(bench.large, 32, torch.Generator().manual_seed(0))
    assert x.shape == (24, 3, 32, 32) and bool(torch.isfinite(x).all())
    assert float(x.abs().max()) < 3
    plain = seen_by_judge(bench.large, 32)
    assert float(plain.min()) >= -1.001 and float(plain.max()) <= 1.001
    assert float((x - plain).abs().mean((1, 2, 3)).min()) > 0.02
    a, b = (augmented(bench.large[:1].expand(2, -1, -1, -1), 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert float((a[0] - a[1]).abs().mean()) > 0.02 and a.shape == b.shape


def test_the_judge_is_read_back_from_its_file_and_not_trained_twice(bench: Bench) -> None:
    first = measure_judge(bench)
    judge, labels = load_judge(bench.out / FILE)
    assert labels == bench.labels
    again = accuracies(judge, bench.data.images, bench.data.classes, bench.labels)
    assert again == first["final"]["real"]
    written = (bench.out / FILE).stat().st_mtime_ns
    assert measure_judge(bench) == first and (bench.out / FILE).stat().st_mtime_ns == written
    (bench.out / FILE).unlink()
    measure_judge(bench)
    assert (bench.out / FILE).is_file()


def test_another_file_is_no_judge(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="holds no judge"):
        load_judge(tiny_model / "classifier" / "model.safetensors")
