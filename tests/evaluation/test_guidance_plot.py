"""A guidance report as a picture: every panel and every name is there, a batch's spread is seen, and odd reports are drawn too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.evaluation.guidance_plot import (
    COLORS,
    Panel,
    _heading,
    _light,
    _panels,
    colors_of,
    draw_report,
    level_ticks,
    report_image,
    ticks,
)
from latent_guidance.guidance.report import Chain, Report


def row(i: int, sigma: float, **changes: object) -> dict:
    values = {
        "call": i, "step": i, "sigma": [sigma, sigma], "guidance_scale": [4.0, 4.0], "branches": ["positive", "negative"], "passes": 2,
        "delta": [0.5, 0.7], "contributions": {"CFG": [1.5, 2.1], "Limited Interval": [None, None], "Clip": [1e-9, 1e-9]},
        "notes": {"Classifier": {"probability": [0.2, 0.9]}}, "denoised": [1.0, 1.0],
    }  # fmt: skip
    return values | changes


def report(*rows: dict, on: str = "guider") -> Report:
    return Report((Chain(on, ("CFG",), rows),))


def has(image: torch.Tensor, color: str) -> bool:
    """Whether a picture (1, H, W, 3) in [0, 1] has pixels of that very colour."""
    wanted = torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool(((image[0] * 255).round() == wanted).all(dim=-1).any())


def test_every_panel_and_every_curve_is_there_and_drawn() -> None:
    shown = report(row(0, 8.0), row(1, 1.0), row(2, 0.1))
    panels = _panels(shown)
    assert {title: [name for name, _, _ in curves] for title, curves in panels} == {
        "guidance scale": ["w"],
        "size in D (root mean square)": ["prompt - negative", "CFG", "Clip"],
        "probability": ["Classifier"],
    }, "what is unknown throughout has no curve"
    image = report_image(shown)
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.mean() > 0.85, "light"
    assert len(set(colors_of(panels).values())) == 5
    assert all(has(image, color) for color in colors_of(panels).values())
    assert not has(report_image(report(row(0, 8.0, notes={}), row(1, 1.0, notes={}))), colors_of(panels)["Classifier"])


def test_noise_falls_from_left_to_right_and_values_rise() -> None:
    panel = Panel(top=10.0, bottom=110.0, sigmas=(10.0, 0.1), values=(0.0, 4.0))
    assert panel.across(10.0) < panel.across(1.0) < panel.across(0.1)
    assert panel.across(1.0) - panel.across(10.0) == pytest.approx(panel.across(0.1) - panel.across(1.0))
    assert panel.down(4.0) < panel.down(0.0)


def test_two_chains_are_told_apart_and_only_a_batch_has_a_band() -> None:
    one = row(0, 8.0) | dict(sigma=[8.0], guidance_scale=[2.0], delta=None, contributions={"CFG": [1.0]}, notes={})
    rows = (one, one | dict(sigma=[1.0]))
    both = Report((Chain("model", ("CFG",), rows), Chain("guider", ("CFG",), rows)))
    assert [name for name, _, _ in _panels(both)[1][1]] == ["CFG (on the model)", "CFG (on the guider)"]
    band = _light(COLORS[0])
    assert not has(report_image(both), band) and has(report_image(report(row(0, 8.0), row(1, 1.0))), band)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.03), (0.0, 4.2), (-3.0, 21.5), (0.0, 1e-7), (0.0, 123456.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    assert level_ticks(15.0, 0.3) == pytest.approx([0.5, 1, 2, 5, 10])


def test_a_png_is_written_whole_and_no_calls_are_refused(tmp_path: Path) -> None:
    draw_report(report(row(0, 8.0), row(1, 0.0)), tmp_path / "sub" / "report.png")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["report.png"]
    Image.open(tmp_path / "sub" / "report.png").verify()
    with pytest.raises(UserError, match="without a call"):
        report_image(report())


def test_the_heading_counts_the_guiders_calls_and_not_the_samplers() -> None:
    guider = Chain("guider", ("CFG",), (row(0, 8.0), row(1, 1.0)))
    sampler = Chain("sampler", ("Clip",), tuple(row(i, 8.0 - i, passes=None) for i in range(3)))
    assert _heading(Report((guider, sampler))) == "2 calls of the guider, 4 network passes a picture"
    assert _heading(Report((Chain("sampler", ("Clip",), ()),))) == "0 calls of the guider"
