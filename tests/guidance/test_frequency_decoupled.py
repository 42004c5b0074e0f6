"""Frequency-decoupled guidance: the pyramid against an independent one, its closed forms, and the faults of public versions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, FrequencyDecoupledGuidance, GuidanceRun, Guider, LimitedInterval
from latent_guidance.guidance.cfg import cfg
from latent_guidance.guidance.frequency_decoupled import frequency_decoupled
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED

from .conftest import latents
from .test_oracles import NONE, draws, labels_of, mixture
from .test_run import Recorder, cond_of

SIGMAS = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
SHAPES = [(16, 16), (24, 40), (7, 13), (5, 2), (3, 1), (1, 1)]


def scales(*values: float, batch: int = 3) -> list[Tensor]:
    return [torch.full((batch,), value, dtype=torch.float64) for value in values]


def branches(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x), torch.sin(2 * x) / 2


def smoothed(plane: np.ndarray) -> np.ndarray:
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    padded = np.pad(plane, 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    return np.einsum("hwij,ij->hw", windows, kernel)


def resampled(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Linear interpolation between cell centres, one matrix for each axis."""
    matrices = []
    for old, new in zip(plane.shape, (height, width), strict=True):
        matrix = np.zeros((new, old))
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0.0)
            left = int(at)
            right = min(left + 1, old - 1)
            matrix[i, left] += 1 - (at - left)
            matrix[i, right] += at - left
        matrices.append(matrix)
    return matrices[0] @ plane @ matrices[1].T


def by_the_paper(cond: Tensor, uncond: Tensor, weights: list[float], *, mean: bool = False) -> Tensor:
    """Eq. 5 and 6 on both branches' own pyramids, plane by plane. ``mean``: a wrong variant that halves by taking every second cell."""
    out = torch.empty_like(cond)
    for where in np.ndindex(*cond.shape[:-2]):
        pyramids = []
        for plane in (cond[where].numpy(), uncond[where].numpy()):
            gaussian = [plane]
            for _ in weights[1:]:
                height, width = gaussian[-1].shape
                low = smoothed(gaussian[-1])
                gaussian.append(low[::2, ::2] if mean else resampled(low, -(-height // 2), -(-width // 2)))
            expanded = [smoothed(resampled(g, *fine.shape)) for fine, g in pairwise(gaussian)]
            pyramids.append([g - e for g, e in zip(gaussian, expanded, strict=False)] + [gaussian[-1]])
        guided = [u + w * (c - u) for c, u, w in zip(*pyramids, weights, strict=True)]
        image = guided[-1]
        for band in reversed(guided[:-1]):
            image = smoothed(resampled(image, *band.shape)) + band
        out[where] = torch.from_numpy(image)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [[7.0, 3.0], [9.0, 1.0, 2.5]], ids=str)
def test_it_is_the_papers_algorithm_at_every_size(shape: tuple[int, int], weights: list[float]) -> None:
    cond, uncond = branches(latents(height=shape[0], width=shape[1]))
    ours = frequency_decoupled(cond, uncond, scales(*weights))
    assert ours.shape == cond.shape
    torch.testing.assert_close(ours, by_the_paper(cond, uncond, weights), rtol=0, atol=1e-12)
    if min(shape) > 4:
        for name, other in {
            "scales the other way round": by_the_paper(cond, uncond, weights[::-1]),
            "every second cell": by_the_paper(cond, uncond, weights, mean=True),
            "plain": cfg(cond, uncond, scales(weights[-1])[0]),
        }.items():
            assert (other - ours).abs().max() > 1e-2, name


def test_a_flat_difference_is_low_and_a_chequered_one_is_high() -> None:
    uncond = latents()
    flat = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    i, j = torch.arange(6).reshape(-1, 1), torch.arange(5)
    chequered = flat * (1 - 2 * ((i + j) % 2))
    for difference, w in ((flat, 3.0), (chequered, 7.0), (flat + chequered, None)):
        expected = uncond + (w * difference if w else 3.0 * flat + 7.0 * chequered)
        ours = frequency_decoupled(uncond + difference, uncond, scales(7.0, 3.0))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bands", [2, 4])
def test_equal_scales_are_exactly_plain_cfg_and_ones_exactly_the_conditional(bands: int) -> None:
    x = latents()
    cond, uncond = branches(x)

    def run(rule: CFG | FrequencyDecoupledGuidance) -> Tensor:
        return GuidanceRun([rule], VE_SCALED)(x, SIGMAS, lambda names: {"cond": cond, "uncond": uncond})

    for w in (3.3, 0.0, -1.7):
        equal = FrequencyDecoupledGuidance(scale_low=w, scale_high=w, bands=bands)
        assert torch.equal(run(equal), run(CFG(guidance_scale=w)))
    ones = FrequencyDecoupledGuidance(scale_low=1.0, scale_high=1.0, bands=bands)
    assert torch.equal(run(ones), cond)
    assert torch.equal(frequency_decoupled(cond, uncond, scales(*[1.0] * bands)), cond)
    assert not torch.allclose(run(FrequencyDecoupledGuidance()), run(CFG(guidance_scale=3.0)), atol=1e-2)


def test_a_scale_of_one_in_one_band_does_not_fail_and_leaves_that_band_conditional() -> None:
    x = latents(height=16, width=16)
    cond, uncond = branches(x)
    high_only = frequency_decoupled(cond, uncond, scales(5.0, 1.0))
    torch.testing.assert_close(high_only, by_the_paper(cond, uncond, [5.0, 1.0]), rtol=0, atol=1e-12)
    low_only = frequency_decoupled(cond, uncond, scales(1.0, 5.0))
    torch.testing.assert_close(low_only, by_the_paper(cond, uncond, [1.0, 5.0]), rtol=0, atol=1e-12)
    both = frequency_decoupled(cond, uncond, scales(5.0, 5.0))
    torch.testing.assert_close((high_only - cond) + (low_only - cond), both - cond, rtol=0, atol=1e-12)


def test_video_latents_are_guided_frame_by_frame_and_sounds_along_their_length() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 4, 3, 7, 6, generator=generator, dtype=torch.float64)
    together = frequency_decoupled(cond, uncond, scales(7.0, 3.0, batch=2))
    for t in range(3):
        frame = frequency_decoupled(cond[:, :, t], uncond[:, :, t], scales(7.0, 3.0, batch=2))
        torch.testing.assert_close(together[:, :, t], frame, rtol=0, atol=1e-13)
    line = frequency_decoupled(cond[:, :, 0, 0], uncond[:, :, 0, 0], scales(7.0, 3.0, batch=2))
    as_picture = frequency_decoupled(cond[:, :, :1, 0], uncond[:, :, :1, 0], scales(7.0, 3.0, batch=2))
    torch.testing.assert_close(line, as_picture[:, :, 0], rtol=0, atol=1e-13)


def test_parity_with_diffusers_where_it_keeps_the_size() -> None:
    pytest.importorskip("kornia")
    guiders = pytest.importorskip("diffusers.guiders")
    for weights in ([7.0, 3.0], [9.0, 2.0, 2.5]):
        guider = guiders.FrequencyDecoupledGuidance(guidance_scales=weights)
        cond, uncond = branches(latents(height=16, width=32).float())
        ours = frequency_decoupled(cond, uncond, [scale.float() for scale in scales(*weights)])
        torch.testing.assert_close(ours, guider.forward(cond, uncond).pred, rtol=0, atol=2e-5)


def test_it_keeps_the_size_of_latents_that_are_not_powers_of_two_unlike_diffusers() -> None:
    pytest.importorskip("kornia")
    guiders = pytest.importorskip("diffusers.guiders")
    cond, uncond = branches(latents(height=6, width=5).float())
    theirs = guiders.FrequencyDecoupledGuidance(guidance_scales=[7.0, 3.0]).forward(cond, uncond).pred
    if theirs.shape == cond.shape:
        pytest.skip("diffusers keeps the size now")
    assert theirs.shape[2:] == (8, 8)
    assert frequency_decoupled(cond, uncond, [scale.float() for scale in scales(7.0, 3.0)]).shape == cond.shape


def test_no_second_pass_is_paid_at_ones_or_outside_an_interval() -> None:
    model, sigma = Recorder(), torch.full((3,), 2.0, dtype=torch.float64)
    ones = FrequencyDecoupledGuidance(scale_low=1.0, scale_high=1.0)
    window = LimitedInterval(sigma_lo=0.1, sigma_hi=1.0)
    for rules in ([ones], [FrequencyDecoupledGuidance(), window]):
        out = Guider(model, rules, uncond=cond_of(0.5))(latents(), sigma, cond_of(2.0))
        assert torch.equal(out, 2 * latents())
    assert model.batches == [3, 3]


def test_rules_for_the_scale_act_on_all_bands_alike() -> None:
    """w brought half of its way to 1 by another rule brings every band half of its way to 1, each sample by itself."""
    rule = FrequencyDecoupledGuidance(scale_low=3.0, scale_high=7.0, bands=3)
    assert rule.guidance_scale == 7.0 and FrequencyDecoupledGuidance(scale_low=-9.0).guidance_scale == -9.0
    per_sample = rule.scales(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    expected = torch.tensor([[7.0, 5.0, 3.0], [4.0, 3.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(per_sample, dim=1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_on_a_mixture_it_guides_the_mean_and_the_difference_of_two_cells(process: object) -> None:
    """A latent of two cells has two bands in closed form: its mean, and what is left."""
    model, x = mixture(process), draws()  # type: ignore[arg-type]
    levels = torch.full((64,), 0.6, dtype=torch.float64)
    uncond, cond = model(x, levels, labels_of(NONE)), model(x, levels, labels_of(1))
    delta = cond - uncond
    # with mirrored borders the kernel over (a, b) is (8 a + 8 b) / 16 at both
    low = delta.mean(dim=-1, keepdim=True)
    expected = uncond + 2.0 * low + 6.0 * (delta - low)
    rule = FrequencyDecoupledGuidance(scale_low=2.0, scale_high=6.0)
    out = Guider(model, [rule], uncond=labels_of(NONE))(x, levels, labels_of(1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_bad_values_and_a_second_combination_are_refused() -> None:
    for values in ({"bands": 1}, {"bands": 7}, {"bands": 2.0}, {"scale_low": 101.0}, {"scale_high": "7"}):
        with pytest.raises(UserError, match="of Frequency-Decoupled Guidance"):
            FrequencyDecoupledGuidance(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at most one"):
        GuidanceRun([CFG(), FrequencyDecoupledGuidance()], VE_SCALED)
