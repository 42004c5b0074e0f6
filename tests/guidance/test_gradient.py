"""Gradients where a node graph runs: inside inference mode, with inference tensors everywhere."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from latent_guidance.guidance.gradient import (
    clip_norm,
    finite_or_unguided,
    input_gradient,
    normal_parameters_,
    sample_norm,
)
from latent_guidance.guidance.knobs import UNLIMITED


def cubic(u: Tensor) -> tuple[Tensor, Tensor]:
    return (u**3).flatten(1).sum(dim=1), u


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_gradient_is_right_in_every_autograd_mode(mode: type) -> None:
    with mode():
        x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
        gradient, extra = input_gradient(cubic, x)
        assert torch.equal(gradient, 3 * x**2)
        assert not gradient.requires_grad and not extra.requires_grad
        assert torch.equal(gradient * 2 + x, 6 * x**2 + x)  # usable back in the caller's mode
    assert torch.equal(x, torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


def test_a_network_moved_in_inference_mode_fails_until_its_parameters_are_made_normal() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval().requires_grad_(False)
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

        def log_prob(u: Tensor) -> tuple[Tensor, Tensor]:
            out = network(u)
            return out.flatten(1).sum(dim=1), out

        assert all(parameter.is_inference() for parameter in network.parameters())
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
            input_gradient(log_prob, x)
        before = network(x)
        normal_parameters_(network)
        assert not any(parameter.is_inference() for parameter in (*network.parameters(), *network.buffers()))
        gradient, _ = input_gradient(log_prob, x)
        assert torch.equal(network(x), before) and gradient.abs().sum() > 0
        first = next(network.parameters())
        normal_parameters_(network)
        assert next(network.parameters()) is first, "nothing to do the second time"


def test_clipping_is_per_sample_and_the_unlimited_value_clips_nothing() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped = clip_norm(gradient, 1.0)
    torch.testing.assert_close(sample_norm(clipped), torch.tensor([1.0, 0.5, 0.0]))
    assert clip_norm(gradient * 1e9, UNLIMITED) is not None
    assert torch.equal(clip_norm(gradient * 1e9, UNLIMITED), gradient * 1e9)


def test_a_broken_sample_goes_unguided_alone_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    gradient = torch.ones(3, 2)
    gradient[1, 0] = float("nan")
    with caplog.at_level(logging.WARNING, logger="latent_guidance"):
        mended = finite_or_unguided(gradient, rule="Some Rule", index=4, sigma=torch.tensor([2.0, 3.5, 2.0]))
    assert mended.tolist() == [[1, 1], [0, 0], [1, 1]]
    [record] = caplog.records
    assert "Some Rule" in record.getMessage() and "sample 1" in record.getMessage()
    assert "step 5" in record.getMessage() and "3.5" in record.getMessage()


def test_the_warning_names_the_loss_where_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    gradient = torch.tensor([[1.0], [float("inf")]])
    finite_or_unguided(gradient, rule="Some Rule", index=None, sigma=torch.ones(2), loss="Mine")
    finite_or_unguided(gradient, rule="Some Rule", index=None, sigma=torch.ones(2))
    named, unnamed = (record.getMessage() for record in caplog.records)
    assert "Some Rule: the gradient of the loss Mine at sample 1 is not finite (sigma 1)" in named
    assert "Some Rule: the gradient of sample 1 is not finite (sigma 1)" in unnamed
