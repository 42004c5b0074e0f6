"""Angle-domain guidance: the turn in the plane of the two estimates, its length, and the numbers of the authors' code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latent_guidance.denoiser import Cond
from latent_guidance.errors import UserError
from latent_guidance.guidance import AngleDomainGuidance, GuidanceCurve, GuidanceRun, Guider, LimitedInterval
from latent_guidance.guidance.angle_domain import turned
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process

from .conftest import SHAPES, drawn
from .test_oracles import NONE, draws, labels_of, mixture

W = torch.tensor([1.5, 3.0, 9.0], dtype=torch.float64)
SIXTY = math.pi / 3


def pair(shape: tuple[int, ...], apart: float = 0.7) -> tuple[Tensor, Tensor]:
    """D_c and D_u (3, ...)."""
    uncond = drawn(3, *shape, seed=1)
    return uncond + apart * drawn(3, *shape, seed=2), uncond


def in_the_plane(cond: Tensor, uncond: Tensor, w: float, largest: float) -> Tensor:
    """The guided estimate of one sample, by its coordinates on two axes: along D_u, and at right angles on the side of D_c."""
    axes, corners = torch.linalg.qr(torch.stack([uncond.flatten(), cond.flatten()], dim=1))
    axes = axes * corners.diagonal().sign()
    point = torch.complex(*(axes.T @ cond.flatten()))
    turn = min((w - 1) * float(point.angle()), largest)
    there = math.cos(turn) * point + 1j * math.sin(turn) * point.abs()
    return (axes @ torch.stack([there.real, there.imag])).reshape(cond.shape)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) > 1], ids=str)
@pytest.mark.parametrize("largest", [SIXTY, math.pi])
def test_the_turn_is_that_in_the_plane_of_the_two_estimates(shape: tuple[int, ...], largest: float) -> None:
    cond, uncond = pair(shape)
    expected = torch.stack([in_the_plane(*each, largest) for each in zip(cond, uncond, W.tolist(), strict=True)])
    torch.testing.assert_close(turned(cond, uncond, W, largest), expected, rtol=0, atol=1e-11)
    wrong = {
        "w turned by, not w - 1": turned(cond, uncond, W + 1, largest),
        "turned from the conditional": turned(uncond, cond, W, largest),
        "one angle for the batch": turned(cond[None], uncond[None], W[:1], largest)[0],
        "CFG": uncond + W.reshape(-1, *[1] * len(shape)) * (cond - uncond),
    }
    for name, estimate in wrong.items():
        assert not torch.allclose(estimate, expected, rtol=0, atol=1e-3), name


def test_parity_with_the_authors_code() -> None:
    """Numbers of ADG_SD3 (jinc7461/ADG, b5fad68), whose w - 1 is 0.001 more and whose pi is 3.14; it takes one picture only."""
    cond = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64).reshape(1, 1, 2, 2)
    uncond = torch.tensor([0.5, -1.0, 1.5, 1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    theirs = {
        1.5: [1.240119222830045, -0.2529971921144766, 2.235530145534746, -0.11820966545876793],
        4.0: [1.4246437229960685, 0.5280303809103039, 2.022385881471359, -1.0909166245098936],
    }
    for w, numbers in theirs.items():
        expected = torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, 2, 2)
        scale = torch.tensor([w], dtype=torch.float64)
        torch.testing.assert_close(turned(cond, uncond, scale + 1e-3, 3.14 / 3), expected, rtol=0, atol=2e-7)
        ours = turned(cond, uncond, scale, SIXTY)
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-3)
        assert not torch.allclose(ours, expected, rtol=0, atol=1e-4)


def test_it_is_as_long_as_the_paper_promises_where_cfg_grows_without_a_bound() -> None:
    """|D|**2 = |D_c|**2 (1 + sin(2 theta') sin(theta)), never over 2 |D_c|**2."""
    cond, uncond = pair((4, 6, 5), apart=1.5)
    squares = (cond**2).flatten(1).sum(1)
    theta = torch.acos((cond * uncond).flatten(1).sum(1) / (squares * (uncond**2).flatten(1).sum(1)).sqrt())
    for w in (2.0, 30.0):
        square = (turned(cond, uncond, torch.full_like(W, w), SIXTY) ** 2).flatten(1).sum(1)
        turn = ((w - 1) * theta).clamp(max=SIXTY)
        torch.testing.assert_close(square / squares, 1 + (2 * turn).sin() * theta.sin(), rtol=1e-12, atol=0)
        assert (square <= 2 * squares).all()
    by_cfg = uncond + 30 * (cond - uncond)
    assert ((by_cfg**2).flatten(1).sum(1) > 100 * squares).all()


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_on_a_mixture_the_exact_estimates_are_turned_in_d(process: Process) -> None:
    """In two dimensions a turn is a product of complex numbers; turned in the velocity the estimate is another."""
    model, x = mixture(process), draws()
    levels = torch.full((64,), 0.7, dtype=torch.float64)
    guider = Guider(model, [AngleDomainGuidance(guidance_scale=2.5)], uncond=labels_of(NONE))
    cond, uncond = (model(x, levels, labels_of(label)) for label in (1, NONE))
    c, u = (torch.view_as_complex(estimate.reshape(64, 2).contiguous()) for estimate in (cond, uncond))
    theta = (c / u).angle()
    turn = (1.5 * theta.abs()).clamp(max=SIXTY)
    there = turn.cos() * c + turn.sin() * c.abs() * (u / u.abs()) * 1j * theta.sign()
    expected = torch.view_as_real(there).reshape(x.shape)
    out = guider(x, levels, labels_of(1))
    clear = (theta.sin().abs() > 1e-3).reshape(-1, 1, 1, 1)
    assert int(clear.sum()) > 50
    torch.testing.assert_close(torch.where(clear, out, 0), torch.where(clear, expected, 0), rtol=0, atol=1e-11)
    in_velocity = x - 0.7 * turned((x - cond) / 0.7, (x - uncond) / 0.7, torch.full_like(levels, 2.5), SIXTY)
    assert not torch.allclose(in_velocity, expected, rtol=0, atol=1e-2)


def test_estimates_without_a_plane_between_them() -> None:
    """Equal, opposite, zero: finite, and nothing is turned where there is no side to turn to."""
    cond = drawn(3, 4, 6, 5)
    for uncond in (cond, 2 * cond, -cond, torch.zeros_like(cond)):
        out = turned(cond, uncond, W, SIXTY)
        assert torch.isfinite(out).all()
        if uncond is not cond and float((uncond * cond).sum()) < 0:  # opposite: the largest turn, without a side
            torch.testing.assert_close(out, cond * (W - 1).mul(math.pi).clamp(max=SIXTY).cos().reshape(-1, 1, 1, 1))
        else:
            torch.testing.assert_close(out, cond, rtol=1e-12, atol=1e-12)
    assert torch.equal(turned(cond, torch.zeros_like(cond), W, SIXTY), cond)
    assert torch.equal(turned(torch.zeros_like(cond), cond, W, SIXTY), torch.zeros_like(cond))


def test_nearly_equal_estimates_are_guided_as_by_cfg_at_right_angles() -> None:
    """Across the limit of small angles there is no jump: D_c + (w - 1) e to first order on both sides."""
    uncond = drawn(3, 4, 6, 5)
    side = drawn(3, 4, 6, 5, seed=5)
    side = (
        side
        - (side * uncond).flatten(1).sum(1).reshape(-1, 1, 1, 1)
        / (uncond**2).flatten(1).sum(1).reshape(-1, 1, 1, 1)
        * uncond
    )
    side = side * ((uncond**2).flatten(1).sum(1) / (side**2).flatten(1).sum(1)).sqrt().reshape(-1, 1, 1, 1)
    for theta in (1e-6, 0.99e-3, 1.01e-3):
        cond = uncond + theta * side
        shift = turned(cond, uncond, torch.full_like(W, 3.0), SIXTY) - cond
        torch.testing.assert_close(shift / theta, 2 * side, rtol=0, atol=1e-2)
        assert not torch.allclose(shift / theta, 3 * side, rtol=0, atol=1e-1)


class Counter:
    """tanh(cond * x), and how many samples were evaluated at each call."""

    process: Process = VE_SCALED

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond = None) -> Tensor:
        self.batches.append(x.shape[0])
        assert isinstance(cond, Tensor)
        return torch.tanh(cond.reshape(-1, 1, 1, 1) * x)


def test_without_guidance_there_is_no_second_pass() -> None:
    model, x = Counter(), drawn(3, 4, 6, 5)
    cond, uncond = torch.full((1, 1), 2.0).double(), torch.full((1, 1), 0.5).double()
    window = LimitedInterval(sigma_lo=0.1, sigma_hi=0.5)
    for rules in ([AngleDomainGuidance(guidance_scale=1.0)], [AngleDomainGuidance(), window]):
        assert torch.equal(Guider(model, rules, uncond=uncond)(x, torch.ones(3).double(), cond), torch.tanh(2 * x))
    assert model.batches == [3, 3]


def test_rules_for_the_scale_change_how_far_it_turns_and_below_one_it_does_not() -> None:
    cond, uncond = pair((4, 6, 5))
    estimates = {"cond": cond, "uncond": uncond}
    sigma = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    for w in (2.0, 0.5, 0.0):
        run = GuidanceRun([AngleDomainGuidance(), GuidanceCurve(curve=f"1:{w}, 0.1:{w}")], VE_SCALED)
        out = run(cond, sigma, lambda names: {name: estimates[name] for name in names})
        assert torch.equal(out, turned(cond, uncond, torch.full_like(W, w), SIXTY))
        assert torch.equal(out, cond) == (w < 1)


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"guidance_scale": 0.9}, {"guidance_scale": -3.0}, {"max_angle": -1.0}, {"max_angle": 181.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} of Angle-Domain Guidance"):
            AngleDomainGuidance(**wrong)
