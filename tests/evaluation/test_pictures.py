"""Charts and grids: what is drawn is what was given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.evaluation.pictures import ACCENT, SHOWN, bar_chart, picture_grid
from latent_guidance.evaluation.probe import class_probabilities

BLUE = torch.tensor([int(ACCENT[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def accent_length(chart: torch.Tensor) -> int:
    """Pixels of the marked bar along its middle."""
    near = (chart - BLUE).abs().amax(dim=2) < 0.05
    return int(near.sum(dim=1).max())


def test_the_longest_bar_is_marked_and_as_long_as_its_value() -> None:
    half = bar_chart(["a", "b"], [0.5, 0.25], width=400)
    full = bar_chart(["a", "b"], [1.0, 0.0], width=400)
    assert half.shape[1:] == (400, 3) and float(half.min()) >= 0 and float(half.max()) <= 1
    assert accent_length(half) == pytest.approx(accent_length(full) / 2, abs=4)
    assert accent_length(full) > 200


def test_many_labels_are_cut_to_the_most_probable() -> None:
    values = torch.arange(60.0).softmax(0).tolist()
    assert (
        bar_chart([str(i) for i in range(60)], values).shape[0]
        == bar_chart([str(i) for i in range(90)], [0.0] * 90).shape[0]
    )
    assert bar_chart(["x"] * SHOWN, [0.0] * SHOWN).shape[0] < bar_chart(["x"] * 60, values).shape[0]


@pytest.mark.parametrize(("labels", "values"), [([], []), (["a"], [0.1, 0.2]), (["a"], [1.5]), (["a"], [float("nan")])])
def test_a_chart_of_nonsense_is_refused(labels: list[str], values: list[float]) -> None:
    with pytest.raises(UserError):
        bar_chart(labels, values)


def test_pictures_stand_where_they_belong() -> None:
    cells = [torch.full((2, 10, 12, 3), shade) for shade in (0.0, 0.4, 0.8)]
    sheet = picture_grid(cells, columns=2, gap=3)[0]
    assert sheet.shape == (3 + 2 * (2 * 13), 3 + 2 * 15, 3)
    assert torch.allclose(sheet[3:13, 3:15], cells[0][0])
    assert torch.allclose(sheet[16:26, 18:30], cells[1][1], atol=1 / 255)
    assert torch.allclose(sheet[29:39, 3:15], cells[2][0], atol=1 / 255)
    assert float(sheet[29:, 18:].min()) == 1  # the empty cell is paper


def test_captions_take_room_above_and_are_not_cut_off_silently() -> None:
    cells = [torch.zeros(1, 32, 64, 3)] * 2
    bare, named = (
        picture_grid(cells, columns=2),
        picture_grid(cells, ["one", "a caption that is far too long"], columns=2),
    )
    assert named.shape[1] > bare.shape[1] and named.shape[2] == bare.shape[2]
    assert float(named[0, 8 : named.shape[1] - 48].min()) < 0.5  # ink


def test_pictures_of_different_sizes_and_one_channel_fit() -> None:
    sheet = picture_grid([torch.zeros(1, 8, 8, 1), torch.ones(1, 16, 4, 4)], columns=1, gap=0)[0]
    assert sheet.shape == (32, 8, 3)


def test_more_captions_than_cells_are_refused() -> None:
    with pytest.raises(UserError, match="3 labels for 1 cells: a, b, c"):
        picture_grid([torch.zeros(1, 8, 8, 3)], ["a", "b", "c"])


def test_probabilities_are_asked_at_the_cleanest_level_of_scaled_latents() -> None:
    seen = {}

    def logits(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, log_snr=log_snr)
        return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    config = SimpleNamespace(head="classes", scaling_factor=0.5, log_snr_range=(-5.0, 6.0))
    found = class_probabilities(SimpleNamespace(config=config, logits=logits), torch.full((3, 4, 2, 2), 2.0))
    assert torch.allclose(found.sum(dim=1), torch.ones(3)) and found.shape == (3, 2)
    assert torch.equal(seen["log_snr"], torch.full((3,), 6.0))
    assert torch.allclose(seen["x"], torch.full((3, 4, 2, 2), float(torch.tensor(6.0).sigmoid().sqrt())))
    for wrong in (torch.nan, torch.inf):
        latents = torch.full((3, 4, 2, 2), 2.0)
        latents[1, 0, 0, 0] = wrong
        with pytest.raises(UserError, match=r"NaN or infinity.*guidance_scale much too large"):
            class_probabilities(SimpleNamespace(config=config, logits=logits), latents)


def test_a_grid_too_large_is_refused_before_it_is_drawn() -> None:
    wide, high = torch.zeros(1, 1, 1, 3).expand(1, 1, 20_000, 3), torch.zeros(1, 1, 1, 3).expand(1, 20_000, 1, 3)
    with pytest.raises(UserError, match=r"a grid of 20016x40024 pixels, for 2 pictures of up to 20000x20000"):
        picture_grid([wide, high], columns=1)


def test_very_long_text_is_cut_off_without_a_wait() -> None:
    from latent_guidance.evaluation import pictures

    measured = []
    width = pictures._width

    def counting(text: str, size: int) -> int:
        measured.append(len(text))
        return width(text, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_width", counting)
        shortened = pictures._shortened("m" * 100_000, 12, 100)
        lines = pictures._wrapped("m " * 50_000, 12, 100)
    assert shortened.endswith("m…") and width(shortened, 12) <= 100 < width("m" + shortened, 12)
    assert len(lines) == 2 and all(width(line, 12) <= 100 for line in lines)
    assert len(measured) < 200 and max(measured) <= 1000
