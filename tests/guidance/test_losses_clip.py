"""The loss by a clean CLIP: distances, cutouts, texts, and a tiny random open_clip network against a computation of its own."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.errors import UserError
from latent_guidance.guidance import DPS, MPGD, GuidanceRun, TrainingFreeGuidance
from latent_guidance.guidance.losses import CLIPText, MaskedLoss, WeightedSum
from latent_guidance.guidance.losses.clip_text import cosine_distance, parse_texts, spherical_distance
from latent_guidance.guidance.losses.cutouts import Crop, cutouts, drawn_crops
from latent_guidance.models.picture_clip import CONFIG, WEIGHTS, load_picture_clip
from latent_guidance.models.tiny import make_tiny_picture_clip
from latent_guidance.process import VE_SCALED

from .conftest import SmallPictureCLIP, drawn, latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_picture_clip(tmp_path_factory.mktemp("clips") / "tiny")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Any:
    """The tiny CLIP in float64."""
    loaded = load_picture_clip(folder)
    loaded.network.double()
    return loaded


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(drawn(*shape, seed=seed), dim=-1)


class TestDistances:
    def test_they_are_those_of_the_angle(self) -> None:
        image, text = unit(5, 2, 8), unit(3, 8, seed=1)
        cosine = torch.einsum("kbe,ne->kbn", image, text)
        torch.testing.assert_close(cosine_distance(image, text), 1 - cosine)
        torch.testing.assert_close(spherical_distance(image, text), cosine.acos().square() / 2)
        chord = (image[:, :, None] - text).norm(dim=-1)
        torch.testing.assert_close(spherical_distance(image, text), 2 * (chord / 2).asin().square())

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_values_and_slopes_are_finite_where_vectors_are_alike_or_opposite(self, sign: float) -> None:
        text = unit(1, 8).float()
        leaf = (sign * text).requires_grad_()
        value = spherical_distance(leaf, text)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert float(value.detach()) == pytest.approx(0.0 if sign > 0 else math.pi**2 / 2, abs=1e-5)
        assert torch.isfinite(gradient).all()
        plain = sign * text.clone()
        plain = (plain * (1 + 1e-6)).requires_grad_()  # what rounding does to a unit vector
        (naive,) = torch.autograd.grad((2 * ((plain - text).norm(dim=-1) / 2).asin().square()).sum(), plain)
        if sign < 0:
            assert not torch.isfinite(naive).all(), "the formula as it is written fails where ours does not"


class TestCutouts:
    def test_they_follow_from_seed_and_step(self) -> None:
        def at(seed: int = 3, index: int | None = 2) -> tuple[Crop, ...]:
            return drawn_crops(40, 60, 8, smallest=0.3, mirror=True, seed=seed, index=index)

        assert at() == at() and at() != at(seed=4) and at() != at(index=3)
        assert at(index=None) == at(index=0)

    def test_they_lie_inside_reach_the_borders_and_are_mirrored_half_the_time(self) -> None:
        crops = drawn_crops(40, 60, 4000, smallest=0.3, mirror=True, seed=0, index=0)
        assert all(12 <= c.side <= 40 and 0 <= c.top <= 40 - c.side and 0 <= c.left <= 60 - c.side for c in crops)
        assert min(c.side for c in crops) == 12 and max(c.side for c in crops) == 40
        assert any(c.top == 0 for c in crops) and any(c.left == 60 - c.side for c in crops)
        assert sum(c.mirrored for c in crops) / 4000 == pytest.approx(0.5, abs=0.04)
        assert sum(c.side for c in crops) / 4000 == pytest.approx(26, abs=0.6)
        assert not any(c.mirrored for c in drawn_crops(40, 60, 50, smallest=0.3, mirror=False, seed=0, index=0))

    def test_neutral_ones_are_the_picture_itself(self) -> None:
        picture = drawn(2, 3, 16, 16)
        crops = drawn_crops(16, 16, 2, smallest=1.0, mirror=False, seed=0, index=0)
        torch.testing.assert_close(cutouts(picture, crops, 16), picture.expand(2, -1, -1, -1, -1))

    def test_they_are_resized_with_antialiasing(self) -> None:
        checked = torch.ones(1, 3, 64, 64, dtype=torch.float64)
        checked[..., ::2, 1::2] = checked[..., 1::2, ::2] = -1
        seen = cutouts(checked, [Crop(0, 0, 60, False)], 12)
        assert seen[..., 2:-2, 2:-2].abs().max() < 0.02
        aliased = nn.functional.interpolate(checked[..., :60, :60], size=(12, 12), mode="bicubic")
        assert aliased.abs().max() > 0.9
        ramp = torch.arange(16.0, dtype=torch.float64).expand(1, 3, 16, 16)
        [[plain], [mirrored]] = cutouts(ramp, [Crop(2, 4, 8, False), Crop(2, 4, 8, True)], 8)
        torch.testing.assert_close(plain, ramp[0, :, 2:10, 4:12])
        torch.testing.assert_close(mirrored, plain.flip(-1))


class TestTexts:
    def test_they_are_read_with_their_weights(self) -> None:
        assert parse_texts(" a red apple | a lamp:0.5|blurry, grey: -1 ") == (
            ("a red apple", 1.0), ("a lamp", 0.5), ("blurry, grey", -1.0),
        )  # fmt: skip
        assert parse_texts("ratio: good") == (("ratio: good", 1.0),)

    @pytest.mark.parametrize(
        ("written", "word"),
        [("", "''"), ("a | ", "''"), (":2", "''"), ("a:0", "weight 0"), ("a:nan", "nan"), ("a:1e9", "1e+09"), ("a|" * 64 + "a", "65")],
    )  # fmt: skip
    def test_wrong_ones_are_said_when_the_loss_is_made(self, written: str, word: str) -> None:
        with pytest.raises(UserError) as error:
            CLIPText(clip=SmallPictureCLIP(), texts=written)
        assert word in str(error.value) and "blurry:-0.5" in str(error.value)

    def test_the_text_encoder_runs_once(self) -> None:
        small = SmallPictureCLIP()
        loss = CLIPText(clip=small, texts="a | b:-1")
        for asked in (loss, loss.at_step(1)):
            asked(drawn(2, 3, 6, 5))
        assert small.read == [["a", "b"]]


def test_the_loss_is_the_mean_over_crops_of_weighted_distances(clip: Any) -> None:
    """Against open_clip's own calls, one cutout and one picture at a time."""
    picture = drawn(2, 3, 24, 20) / 2
    loss = CLIPText(clip=clip, texts="a red apple:2 | blurry:-0.5", crops=5, seed=7, distance="cosine")
    from open_clip.tokenizer import SimpleTokenizer

    text = clip.network.encode_text(SimpleTokenizer()(["a red apple", "blurry"]))
    expected = []
    for one in picture:
        total = 0.0
        for crop in loss.at_step(3).crops(24, 20):
            part = one[:, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
            part = part.flip(-1) if crop.mirrored else part
            seen = nn.functional.interpolate(part[None], size=(16, 16), mode="bicubic", antialias=True)
            mean, std = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
            seen = torch.stack([((seen[0, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)])[None]
            alike = nn.functional.cosine_similarity(clip.network.encode_image(seen), text, dim=1)
            total += float(2 * (1 - alike[0]) - 0.5 * (1 - alike[1])) / 5
        expected.append(total)
    found = loss.at_step(3)(picture)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not torch.allclose(found, loss.at_step(4)(picture))
    assert torch.equal(found, loss.at_step(3)(picture))


@pytest.mark.parametrize("distance", ["spherical", "cosine"])
def test_in_groups_or_at_once_and_each_sample_by_itself(clip: Any, distance: str) -> None:
    """Three pictures and seven crops go in groups of two crops; one picture goes at once."""
    loss = CLIPText(clip=clip, texts="a | b:-1", crops=7, distance=distance).at_step(1)
    leaf = drawn(3, 3, 18, 22).requires_grad_()
    values = loss(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    for i in range(3):
        alone = leaf[i : i + 1].detach().requires_grad_()
        value = loss(alone)
        torch.testing.assert_close(values[i : i + 1], value)
        torch.testing.assert_close(gradient[i : i + 1], torch.autograd.grad(value.sum(), alone)[0])
    with torch.no_grad():
        torch.testing.assert_close(loss(leaf), values.detach())


class StepAware:
    """A loss that notes at which steps it was asked."""

    space = "latent"

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def at_step(self, index: int | None) -> Callable[[Tensor], Tensor]:
        def asked(estimate: Tensor) -> Tensor:
            self.steps.append(index)
            return estimate.square().flatten(1).sum(dim=1)

        return asked

    def __call__(self, estimate: Tensor) -> Tensor:
        raise AssertionError("the loss of the step is to be asked")


@pytest.mark.parametrize(("rule_class", "times"), [(MPGD, 1), (DPS, 1), (TrainingFreeGuidance, 3)])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss,
        lambda loss: WeightedSum(loss_1=loss),
        lambda loss: MaskedLoss(loss=loss, mask=torch.ones(1, 6, 5)),
    ],
)
def test_rules_ask_the_loss_of_the_step(rule_class: Any, times: int, wrap: Any) -> None:
    loss, x = StepAware(), latents()
    run = GuidanceRun(
        [rule_class(loss=wrap(loss))], VE_SCALED, sigmas=torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    )

    def evaluate(names: Sequence[str], at: Tensor = x, level: Any = None) -> dict[str, Tensor]:
        return dict.fromkeys(names, torch.tanh(at))

    for sigma in (0.9, 0.3):
        run(x, torch.full((3,), sigma, dtype=torch.float64), evaluate, differentiable=evaluate)
    assert loss.steps == [0] * times + [2] * times


class TestFiles:
    def test_the_folder_and_its_file_are_one_clip(self, folder: Path) -> None:
        first, second = load_picture_clip(folder), load_picture_clip(folder / WEIGHTS[0])
        assert torch.equal(first.text_features(["a"]), second.text_features(["a"]))
        assert (first.image_size, first.mean, first.std) == (16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="vit_base"),
                ["timm_model_name", "open_clip's own"],
            ),
            (lambda c: c["model_cfg"]["text_cfg"].update(hf_tokenizer_name="t5"), ["hf_tokenizer_name"]),
            (lambda c: c["model_cfg"]["text_cfg"].update(vocab_size=250), ["250", "49408"]),
            (lambda c: c["model_cfg"].update(custom_text=True), ["custom_text"]),
            (lambda c: c["model_cfg"]["vision_cfg"].update(layers=10**9), ["1000000000", "1024"]),
            (lambda c: c["model_cfg"]["vision_cfg"].update(layers=2), ["does not hold this CLIP", "lacks"]),
            (lambda c: c["model_cfg"]["vision_cfg"].update(nonsense=2), ["No CLIP can be built", "nonsense"]),
            (lambda c: c["preprocess_cfg"].update(std=[0, 1, 1]), ["std", "above 0"]),
            (lambda c: c.pop("model_cfg"), ["model_cfg is None"]),
        ],
    )
    def test_a_wrong_config_is_refused_with_words(
        self, folder: Path, tmp_path: Path, change: Any, words: list[str]
    ) -> None:
        copied = shutil.copytree(folder, tmp_path / "copy")
        config = json.loads((copied / CONFIG).read_text("utf-8"))
        change(config)
        (copied / CONFIG).write_text(json.dumps(config), "utf-8")
        with pytest.raises(UserError) as error:
            load_picture_clip(copied)
        assert all(word in str(error.value) for word in words), str(error.value)

    def test_without_open_clip_it_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(UserError, match="pip install open_clip_torch"):
            load_picture_clip(folder)

    def test_missing_pickled_and_damaged_files_are_refused_with_words(self, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / CONFIG, tmp_path)
        with pytest.raises(UserError, match="holds no weights"):
            load_picture_clip(tmp_path)
        (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(UserError, match="pickled"):
            load_picture_clip(tmp_path)
        with pytest.raises(UserError, match="pickled"):
            load_picture_clip(tmp_path / "open_clip_pytorch_model.bin")
        (tmp_path / WEIGHTS[0]).write_bytes((folder / WEIGHTS[0]).read_bytes()[:1000])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_picture_clip(tmp_path)
        (tmp_path / CONFIG).unlink()
        with pytest.raises(UserError, match="without an open_clip_config"):
            load_picture_clip(tmp_path)
        with pytest.raises(UserError, match="was not found"):
            load_picture_clip(tmp_path / "nowhere")
