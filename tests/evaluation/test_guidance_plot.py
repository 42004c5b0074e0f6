"""A guidance report as a picture: every panel and every name is there, a batch's spread is seen, and odd reports are drawn too."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.evaluation.guidance_plot import draw_report, report_image
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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    return figures


def test_every_panel_is_there_and_noise_falls_from_left_to_right(drawn: list[matplotlib.figure.Figure]) -> None:
    image = report_image(report(row(0, 8.0), row(1, 1.0), row(2, 0.1)))
    [figure] = drawn
    titles = [axis.get_ylabel().replace("\n", " ") for axis in figure.axes]
    assert titles == ["guidance scale", "size in D (root mean square)", "probability"]
    names = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    assert names == ["w", "Δ = prompt - negative", "CFG", "Clip", "Classifier"], (
        "what is unknown throughout has no curve"
    )
    assert all(axis.get_xscale() == "log" and axis.xaxis_inverted() for axis in figure.axes)
    cfg, clip = figure.axes[1].get_lines()[1:3]
    assert cfg.get_ydata() == pytest.approx([1.8] * 3) and clip.get_ydata() == pytest.approx([0.0] * 3, abs=1e-30)
    assert len(figure.axes[2].collections) == 1, "two pictures have a band"
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.mean() > 0.85, "light"


def test_two_chains_are_told_apart_and_a_single_picture_has_no_band(drawn: list[matplotlib.figure.Figure]) -> None:
    one = row(0, 8.0) | dict(sigma=[8.0], guidance_scale=[2.0], delta=None, contributions={"CFG": [1.0]}, notes={})
    report_image(Report((Chain("model", ("CFG",), (one,)), Chain("guider", ("CFG",), (one,)))))
    names = [text.get_text().replace("\n", " ") for text in drawn[0].axes[1].get_legend().get_texts()]
    assert names == ["CFG (on the model)", "CFG (on the guider)"]
    assert all(not axis.collections for axis in drawn[0].axes) and len(drawn[0].axes) == 2


def test_a_png_is_written_whole_and_no_calls_are_refused(tmp_path: Path) -> None:
    draw_report(report(row(0, 8.0), row(1, 0.0)), tmp_path / "sub" / "report.png")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["report.png"]
    Image.open(tmp_path / "sub" / "report.png").verify()
    with pytest.raises(UserError, match="without a call"):
        report_image(report())
