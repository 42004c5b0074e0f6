"""Losses as objects: what anyone may write, what is refused and how, and the ready ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.errors import UserError
from latent_guidance.guidance import DPS, MPGD, GuidanceRun, Rule
from latent_guidance.guidance.latents import Latents
from latent_guidance.guidance.losses import (
    LOSSES,
    ClassLabel,
    CLIPText,
    ColourPalette,
    MaskedLoss,
    ReferenceLatent,
    SketchEdges,
    Symmetry,
    WeightedSum,
)
from latent_guidance.guidance.losses.edges import edges
from latent_guidance.guidance.losses.palette import parse_colours
from latent_guidance.process import VE_SCALED

from .conftest import SmallClassifier, SmallPictureCLIP, drawn, latents

SIGMAS = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)


class SmallVae:
    """A decoder in float64: four latent channels, twice the size, values far past [-1, 1] where latents are."""

    scaling_factor = 0.5

    def __init__(self, channels: int = 4) -> None:
        self.latent_channels = channels
        self.network = nn.ConvTranspose2d(channels, 3, 2, stride=2, dtype=torch.float64).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.batches: list[int] = []

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        self.batches.append(len(latent))
        pictures = self.network(latent)
        return pictures.clamp(-1, 1) if clamp else pictures


def guided(rule: Rule, x: Tensor, sigma: Tensor = SIGMAS, unscaled: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What one rule makes of the estimate tanh(x)."""
    run = GuidanceRun([rule], VE_SCALED, unscaled=unscaled)

    def evaluate(names: tuple[str, ...], at: Tensor = x, level: Tensor = sigma) -> dict[str, Tensor]:
        return dict.fromkeys(names, torch.tanh(at))

    return run(x, sigma, evaluate, differentiable=evaluate)


class Warm:
    space = "picture"

    def __call__(self, picture: Tensor) -> Tensor:  # (B, 3, H, W), about [-1, 1]: red, green, blue
        return (picture[:, 2] - picture[:, 0]).sum(dim=(1, 2))  # blue minus red, (B,)


@pytest.mark.parametrize("rule_class", [MPGD, DPS])
def test_the_five_line_loss_of_the_docs_makes_pictures_warmer(rule_class: Any) -> None:
    vae, x = SmallVae(), latents()
    with torch.inference_mode():
        out = guided(rule_class(loss=Warm(), vae=vae), x)
        warmth = [-Warm()(vae.decode(denoised / vae.scaling_factor)) for denoised in (torch.tanh(x), out)]
    assert (warmth[1] > warmth[0] + 0.1).all()


def test_the_docs_print_the_five_lines_that_were_tested() -> None:
    import inspect
    import re

    from latent_guidance.guidance.losses import base

    code = re.sub(r"self, picture: Tensor\) -> Tensor", "self, picture)", inspect.getsource(Warm))
    assert "\n".join("    " + line if line else "" for line in code.strip().split("\n")) in (base.__doc__ or "")
    page = Path(__file__).parents[2] / "docs" / "LOSSES.md"
    assert code.strip() in page.read_text("utf-8")


class Answers:
    """A loss that answers whatever it is told to."""

    space = "latent"

    def __init__(self, answer: Callable[[Tensor], Any], space: str = "latent") -> None:
        self.answer, self.space = answer, space

    def __call__(self, estimate: Tensor) -> Any:
        return self.answer(estimate)


@pytest.mark.parametrize("rule_class", [MPGD, DPS])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda d: d.square().mean(), ["Answers", "shape ()", "3 samples", "(3,)"]),
        (lambda d: d.square(), ["Answers", "shape (3, 4, 6, 5)"]),
        (lambda d: 1.0, ["Answers", "float"]),
        (lambda d: d.detach().square().flatten(1).sum(dim=1), ["Answers", "no gradient", ".detach()"]),
        (lambda d: d.new_ones(3).requires_grad_() * 2, ["Answers", "does not depend on the estimate"]),
    ],
)
def test_a_loss_that_answers_wrongly_is_named(rule_class: Any, answer: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        guided(rule_class(loss=Answers(answer)), latents())
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule_class", [MPGD, DPS])
def test_a_sample_whose_loss_is_not_finite_goes_unguided_with_a_warning(
    rule_class: Any, broken: float, caplog: pytest.LogCaptureFixture
) -> None:
    def half_broken(estimate: Tensor) -> Tensor:
        factor = torch.tensor([1.0, broken, 1.0], dtype=estimate.dtype)
        return factor * estimate.square().flatten(1).sum(dim=1)

    x = latents()
    out = guided(rule_class(loss=Answers(half_broken)), x)
    assert torch.equal(out[1], torch.tanh(x[1])) and not torch.equal(out[0], torch.tanh(x[0]))
    torch.testing.assert_close(
        out[::2], guided(rule_class(loss=Answers(lambda d: d.square().flatten(1).sum(dim=1))), x)[::2]
    )
    assert rule_class.node.name in caplog.text and "the loss Answers at sample 1" in caplog.text


def test_of_a_sum_that_is_not_finite_every_part_is_named(caplog: pytest.LogCaptureFixture) -> None:
    broken = Answers(lambda d: torch.nan * d.flatten(1).sum(dim=1))
    guided(MPGD(loss=WeightedSum(loss_1=Symmetry(), loss_2=broken), vae=SmallVae()), latents())
    assert f"{Symmetry.node.name} + Answers at sample 0, 1, 2" in caplog.text


def test_a_tensor_made_in_a_node_is_named_and_mended_by_a_clone() -> None:
    with torch.inference_mode():
        target = drawn(3, 4, 6, 5)
        wrong = Answers(lambda d: (d * target).flatten(1).sum(dim=1))
        with pytest.raises(UserError, match=r"clone"):
            guided(MPGD(loss=wrong), latents())
        right = Answers(lambda d: (d * target.clone()).flatten(1).sum(dim=1))
        assert torch.isfinite(guided(MPGD(loss=right), latents())).all()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Answers(lambda d: d, space="pixels"), ["Answers", "pixels", "picture, latent, vae"]),
        (object(), ["object", "cannot be called"]),
        (Warm(), ["Warm", "without a VAE", "vae input of MPGD"]),
        (None, ["loss of MPGD", "is missing"]),
    ],
)
def test_what_is_no_loss_or_lacks_its_vae_is_said_when_the_rule_is_made(loss: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        MPGD(loss=loss)
    assert all(word in str(error.value) for word in words)


def test_spaces_are_what_they_are_said_to_be() -> None:
    seen: dict[str, Tensor] = {}

    def look(space: str) -> Answers:
        def answer(estimate: Tensor) -> Tensor:
            seen[space] = estimate.detach().clone()
            return estimate.flatten(1).sum(dim=1)

        return Answers(answer, space)

    vae, x = SmallVae(), latents()
    for space in ("latent", "vae", "picture"):
        guided(MPGD(loss=look(space), vae=vae), x)
    denoised = torch.tanh(x)
    assert torch.equal(seen["latent"], denoised) and torch.equal(seen["vae"], denoised / 0.5)
    torch.testing.assert_close(seen["picture"], vae.network(denoised / 0.5))
    assert seen["picture"].abs().max() > 1, "not clamped, or nothing would pull saturated pixels back"
    guided(MPGD(loss=look("vae"), vae=vae), x, unscaled=lambda latents: latents * 7)
    assert torch.equal(seen["vae"], denoised * 7), "what the host says of its model goes before what the VAE says"


def test_pictures_are_decoded_one_at_a_time_and_may_be_smaller() -> None:
    sizes: list[Any] = []

    def look(picture: Tensor) -> Tensor:
        sizes.append(tuple(picture.shape))
        return picture.square().flatten(1).sum(dim=1)

    vae, x = SmallVae(), latents(height=8, width=10)
    whole = guided(MPGD(loss=Answers(look, "picture"), vae=vae), x)
    assert vae.batches == [1] * 6, "each picture once forwards and once more for its gradient"
    alone = torch.cat(
        [guided(MPGD(loss=Answers(look, "picture"), vae=vae), x[i : i + 1], SIGMAS[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(whole, alone)
    assert sizes[0] == (3, 3, 16, 20)
    guided(MPGD(loss=Answers(look, "picture"), vae=vae, decode_at=0.5), x)
    assert sizes[-1] == (3, 3, 8, 10)


READY: dict[Any, Any] = {
    ReferenceLatent: lambda: ReferenceLatent(reference=drawn(1, 4, 6, 5, seed=5)),
    ColourPalette: ColourPalette,
    SketchEdges: lambda: SketchEdges(sketch=drawn(1, 3, 12, 10, seed=6).clamp(-1, 1)),
    Symmetry: Symmetry,
    ClassLabel: lambda: ClassLabel(classifier=SmallClassifier(), label="dog"),
    CLIPText: lambda: CLIPText(clip=SmallPictureCLIP(), texts="a red apple | blurry:-0.5", crops=3),
}
"""The simple ones; a mask and a sum hold others."""


def ready(loss_class: Any) -> Any:
    return READY[loss_class]()


def estimate_for(loss: Any, batch: int = 3) -> Tensor:
    return drawn(batch, 3 if loss.space == "picture" else 4, 6, 5) / 2


@pytest.mark.parametrize("loss_class", READY)
class TestEveryReadyLoss:
    def test_its_gradient_is_the_slope_of_its_value(self, loss_class: Any) -> None:
        loss = ready(loss_class)
        leaf = estimate_for(loss).requires_grad_()
        assert torch.autograd.gradcheck(loss, (leaf,))

    def test_each_sample_is_by_itself(self, loss_class: Any) -> None:
        loss = ready(loss_class)
        estimate = estimate_for(loss)
        together = loss(estimate)
        assert together.shape == (3,)
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], loss(estimate[i : i + 1]))

    def test_following_it_lowers_it(self, loss_class: Any) -> None:
        loss, x = ready(loss_class), latents()
        vae = SmallVae()
        out = guided(MPGD(loss=loss, vae=vae, guidance_scale=0.05), x)
        space = {"latent": lambda d: d, "vae": lambda d: d / 0.5, "picture": lambda d: vae.network(d / 0.5)}[loss.space]
        assert (loss(space(out)) < loss(space(torch.tanh(x)))).all()

    def test_its_module_names_its_source_and_it_is_frozen(self, loss_class: Any) -> None:
        import sys

        words = sys.modules[loss_class.__module__].__doc__ or ""
        assert "Reference:" in words and "Space:" in words
        with pytest.raises(AttributeError):
            ready(loss_class).space = "latent"


def test_every_loss_there_is_is_tested_here() -> None:
    assert {*READY, MaskedLoss, WeightedSum} == {*LOSSES}


def test_symmetry_at_scale_one_is_the_mean_with_the_mirror_image() -> None:
    for kind, dims in (("left and right", (-1,)), ("top and bottom", (-2,)), ("half turn", (-2, -1))):
        leaf = drawn(2, 3, 6, 5).requires_grad_()
        (gradient,) = torch.autograd.grad(Symmetry(kind=kind)(leaf).sum(), leaf)
        mean = ((leaf + leaf.flip(dims)) / 2).detach()
        torch.testing.assert_close(leaf - gradient, mean)
        assert float(Symmetry(kind=kind)(mean).abs().max()) < 1e-20


def test_a_sketch_is_met_by_a_picture_with_its_edges_and_by_no_other() -> None:
    sketch = torch.full((1, 3, 12, 12), -1.0, dtype=torch.float64)
    sketch[..., 3:9, 3:9] = 1
    loss = SketchEdges(sketch=sketch)
    inverted = loss(-sketch)  # the same outlines
    assert float(loss(sketch)) < 1e-20 and float(inverted) < 1e-20
    assert float(loss(torch.zeros_like(sketch))) > 1 and float(loss(sketch.roll(3, dims=-1))) > 1
    strokes = SketchEdges(sketch=1 - 2 * edges(sketch).expand(-1, 3, -1, -1), read_as="strokes")
    assert float(strokes(sketch)) < 1e-10 < float(strokes(torch.zeros_like(sketch)))
    with pytest.raises(UserError, match="2 sketches for 3"):
        SketchEdges(sketch=sketch.expand(2, -1, -1, -1))(drawn(3, 3, 12, 12))


def test_a_mask_confines_the_gradient_and_leaves_the_value() -> None:
    mask = torch.zeros(1, 6, 5)
    mask[:, :3] = 1
    inner = Answers(lambda d: d.square().flatten(1).sum(dim=1))
    for extra in ((), (3,)):  # latents of pictures, and of videos
        leaf = drawn(2, 4, *extra, 6, 5).requires_grad_()
        [(weight, masked)] = MaskedLoss(loss=inner, mask=mask).parts()
        value = masked(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(value, inner(leaf))
        torch.testing.assert_close(gradient[..., :3, :], 2 * leaf[..., :3, :])
        assert weight == 1 and not gradient[..., 3:, :].any()


def test_a_sum_is_guided_as_its_parts_in_their_own_spaces() -> None:
    x, vae = latents(), SmallVae()
    one, two = Answers(lambda d: d.square().flatten(1).sum(dim=1)), Warm()
    settings = {"vae": vae, "scaling": "estimate", "guidance_scale": 0.3}
    alone = [guided(MPGD(loss=loss, **settings), x) - torch.tanh(x) for loss in (one, two)]
    both = WeightedSum(loss_1=one, loss_2=two, weight_1=2.0, weight_2=-0.5)
    together = guided(MPGD(loss=both, **settings), x) - torch.tanh(x)
    torch.testing.assert_close(together, 2 * alone[0] - 0.5 * alone[1])
    nested = WeightedSum(loss_1=both, weight_1=2.0, loss_2=MaskedLoss(loss=both, mask=torch.zeros(1, 6, 5)))
    torch.testing.assert_close(guided(MPGD(loss=nested, **settings), x) - torch.tanh(x), 2 * together)
    with pytest.raises(UserError, match="weights are all 0"):
        WeightedSum(loss_1=one, weight_1=0.0)
    with pytest.raises(UserError, match="Warm"):
        MPGD(loss=both)


def test_a_class_label_is_the_classifier_asked_about_the_estimate_as_clean() -> None:
    classifier, estimate = SmallClassifier(), drawn(2, 4, 6, 5)
    value = ClassLabel(classifier=classifier, label="dog")(estimate)
    expected = -classifier.logits(estimate, torch.full((2,), 12.0, dtype=torch.float64)).log_softmax(dim=1)[:, 1]
    torch.testing.assert_close(value, expected)
    with pytest.raises(UserError, match="horse"):
        ClassLabel(classifier=classifier, label="horse")
    MPGD(loss=ClassLabel(classifier=classifier, label="dog")).check_latents(Latents("test", 4, 0.5))
    with pytest.raises(UserError, match="16 channels"):
        MPGD(loss=ClassLabel(classifier=classifier, label="dog")).check_latents(Latents("other", 16, 0.5))
    with pytest.raises(UserError, match="VAE of 4 latent channels"):
        MPGD(loss=Warm(), vae=SmallVae()).check_latents(Latents("other", 16, 0.5))
    assert MPGD(loss=ClassLabel(classifier=classifier, label="dog")).networks() == (classifier,)


class TestReference:
    def test_it_is_half_the_squared_distance_in_units_of_the_reference(self) -> None:
        reference, estimate = drawn(1, 4, 6, 5, seed=1) * 3, drawn(2, 4, 6, 5)
        expected = (estimate - reference).square().sum(dim=(1, 2, 3)) / 2 / reference.square().mean()
        torch.testing.assert_close(ReferenceLatent(reference=reference)(estimate), expected)

    def test_a_low_pass_sees_averages_of_blocks_only(self) -> None:
        reference = drawn(1, 4, 8, 8, seed=1)
        checked = torch.ones(8, 8, dtype=torch.float64)
        checked[::2, 1::2] = checked[1::2, ::2] = -1
        coarse = ReferenceLatent(reference=reference, low_pass=2)
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(coarse(reference + checked), zero, rtol=0, atol=1e-12)
        assert ReferenceLatent(reference=reference)(reference + checked) > 100
        shifted = reference + 0.5  # a block's average stands for all of the block, so both see a shift alike
        torch.testing.assert_close(coarse(shifted), ReferenceLatent(reference=reference)(shifted))

    def test_references_for_a_batch_of_other_sizes_and_of_videos(self) -> None:
        assert ReferenceLatent(reference=drawn(3, 4, 6, 5))(drawn(3, 4, 12, 10)).shape == (3,)
        assert ReferenceLatent(reference=drawn(1, 4, 3, 6, 5), low_pass=2)(drawn(2, 4, 3, 6, 5)).shape == (2,)
        for wrong in (drawn(2, 4, 6, 5), drawn(1, 16, 6, 5), drawn(1, 4, 3, 6, 5)):
            with pytest.raises(UserError, match="a reference of shape"):
                ReferenceLatent(reference=wrong)(drawn(3, 4, 6, 5))
        with pytest.raises(UserError, match="empty latent"):
            ReferenceLatent(reference=torch.zeros(1, 4, 6, 5))


class TestPalette:
    def test_colours_are_read_in_every_way_they_are_written(self) -> None:
        assert parse_colours("#ff0000, 0f0 WHITE") == ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))
        for wrong in ("", "#12", "mauve-ish", ",".join(["red"] * 65)):
            with pytest.raises(UserError, match="palette"):
                ColourPalette(colours=wrong)

    def test_one_colour_is_half_the_squared_distance(self) -> None:
        picture = drawn(2, 3, 6, 5)
        colour = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[:, None, None]
        expected = (picture - colour).square().sum(dim=(1, 2, 3)) / 2
        for softness in (0.0, 0.5):
            torch.testing.assert_close(ColourPalette(colours="red", softness=softness)(picture), expected)

    def test_the_soft_minimum_becomes_the_minimum(self) -> None:
        picture = drawn(2, 3, 6, 5)
        hard = ColourPalette(colours="red, blue, white", softness=0.0)(picture)
        distances = torch.stack(
            [
                2 * ColourPalette(colours=c, softness=0.0)(p[None])
                for p in picture[0].flatten(1).T[:, :, None, None]
                for c in ("red", "blue", "white")
            ]
        )
        torch.testing.assert_close(hard[:1], distances.reshape(-1, 3).amin(dim=1).sum()[None] / 2)
        errors = [
            float((ColourPalette(colours="red, blue, white", softness=t)(picture) - hard).abs().max())
            for t in (1.0, 0.1, 0.01)
        ]
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.5

    def test_balance_asks_for_every_colour(self) -> None:
        red = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[None, :, None, None].expand(1, 3, 4, 4)
        half = red.clone()
        half[..., :2] = -red[..., :2]  # cyan
        balanced = ColourPalette(colours="red, cyan", balance=1.0)
        assert balanced(red) > balanced(half) + 1
        torch.testing.assert_close(ColourPalette(colours="red, cyan")(red), ColourPalette(colours="red, cyan")(half))
