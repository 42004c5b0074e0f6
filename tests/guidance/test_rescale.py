"""Rescaled guidance: the paper's equations, its space, and where it agrees with other programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import CFG, GuidanceRun, RescaleGuidance
from latent_guidance.guidance.rescale import rescale_denoised
from latent_guidance.process import RECTIFIED_FLOW, VE_SCALED, Process, expand

from .conftest import SHAPES, drawn

SIGMA = torch.tensor([0.9, 0.5, 0.05], dtype=torch.float64)
W, PHI = 5.0, 0.7


def branches(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, D_c, D_u (3, *shape)."""
    return 3 * drawn(3, *shape, seed=1), drawn(3, *shape, seed=2), drawn(3, *shape, seed=3)


def guided(x: Tensor, cond: Tensor, uncond: Tensor, process: Process, phi: float, sigma: Tensor = SIGMA) -> Tensor:
    run = GuidanceRun([CFG(guidance_scale=W), RescaleGuidance(phi=phi)], process)
    return run(x, sigma, lambda names: {"cond": cond, "uncond": uncond})


def papers(velocity_cond: Tensor, velocity_uncond: Tensor, phi: float) -> Tensor:
    """Eq. 13 to 16 of arXiv 2305.08891 on a network's outputs, sample by sample."""
    out = []
    for pos, neg in zip(velocity_cond, velocity_uncond, strict=True):
        cfg = neg + W * (pos - neg)
        rescaled = cfg * (pos.std() / cfg.std())
        out.append(phi * rescaled + (1 - phi) * cfg)
    return torch.stack(out)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_equations_15_and_16_on_a_v_network(phi: float) -> None:
    """A v-network sees x / sqrt(1 + sigma^2) and predicts v; D = x / (1 + sigma^2) - v sigma / sqrt(1 + sigma^2)."""
    x, v_cond, v_uncond = branches(4, 6, 5)
    sigma = torch.tensor([14.6, 1.0, 0.03], dtype=torch.float64)
    s = sigma.reshape(-1, 1, 1, 1)

    def denoised(v: Tensor) -> Tensor:
        return x / (1 + s**2) - v * s / (1 + s**2).sqrt()

    ours = guided(x, denoised(v_cond), denoised(v_uncond), VE_SCALED, phi, sigma)
    torch.testing.assert_close(ours, denoised(papers(v_cond, v_uncond, phi)), rtol=0, atol=1e-10)


def test_equations_15_and_16_on_a_flow_network() -> None:
    x, d_cond, d_uncond = branches(4, 6, 5)
    s = SIGMA.reshape(-1, 1, 1, 1)
    ours = guided(x, x - s * d_cond, x - s * d_uncond, RECTIFIED_FLOW, PHI)
    torch.testing.assert_close(ours, x - s * papers(d_cond, d_uncond, PHI), rtol=0, atol=1e-10)


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_full_rescale_gives_the_conditional_spread_to_every_shape(shape: tuple[int, ...], process: Process) -> None:
    x, cond, uncond = branches(*shape)
    out = guided(x, cond, uncond, process, 1.0)
    plain = guided(x, cond, uncond, process, 0.0)
    assert out.shape == x.shape and torch.isfinite(out).all()
    if x[0].numel() == 1:
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
        return
    to = process.velocity if process is RECTIFIED_FLOW else process.vp_velocity
    spread = to(x, out, SIGMA).flatten(1).std(dim=1)
    torch.testing.assert_close(spread, to(x, cond, SIGMA).flatten(1).std(dim=1), rtol=1e-10, atol=0)
    assert ((to(x, plain, SIGMA).flatten(1).std(dim=1) - spread).abs() > 1e-4 * spread).all(), "plain guidance differs"


def rescale_cfg_of_comfyui(
    x: Tensor, cond: Tensor, uncond: Tensor, sigma: Tensor, w: float, multiplier: float
) -> Tensor:
    """What RescaleCFG of ComfyUI (comfy_extras/nodes_model_advanced.py) makes of x and two denoised estimates, all (B, C, H, W).

    It knows x = x0 + sigma * noise only, and works on what a v-network would have said: v = (x / (1 + s^2) - D) sqrt(1 + s^2) / s.
    """
    s = sigma.reshape(-1, 1, 1, 1)
    root = (1 + s**2).sqrt()
    v_cond, v_uncond = ((x / root**2 - denoised) * root / s for denoised in (cond, uncond))
    v = v_uncond + w * (v_cond - v_uncond)
    shrink = torch.stack([c.std() / g.std() for c, g in zip(v_cond, v, strict=True)]).reshape(-1, 1, 1, 1)
    return x / root**2 - (multiplier * shrink * v + (1 - multiplier) * v) * s / root


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_equal_numbers_to_comfyuis_rescalecfg(phi: float) -> None:
    x, cond, uncond = branches(4, 24, 40)
    sigma = torch.tensor([14.6, 1.0, 0.03], dtype=torch.float64)
    x = x * (1 + sigma.reshape(-1, 1, 1, 1))
    ours = guided(x, cond, uncond, VE_SCALED, phi, sigma)
    theirs = rescale_cfg_of_comfyui(x, cond, uncond, sigma, W, phi)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    if phi:
        other = rescale_cfg_of_comfyui(x, cond, uncond, sigma, W, phi - 0.01)
        assert ((other - ours).abs().flatten(1).amax(dim=1) > 1e-4).all(), "the tolerance has teeth"


def diffusers_rescale() -> object:
    return pytest.importorskip("diffusers.guiders.guider_utils").rescale_noise_cfg


@pytest.mark.parametrize("process", [VE_SCALED, RECTIFIED_FLOW], ids=str)
def test_diffusers_agrees_for_v_and_flow_networks(process: Process) -> None:
    theirs = diffusers_rescale()
    x, cond, uncond = branches(4, 6, 5)
    if process is RECTIFIED_FLOW:
        to, back = process.velocity, process.denoised_from_velocity
    else:
        to, back = process.vp_velocity, process.denoised_from_vp_velocity
    v_cond, v_uncond = to(x, cond, SIGMA), to(x, uncond, SIGMA)
    out = theirs(v_uncond + W * (v_cond - v_uncond), v_cond, PHI)  # type: ignore[operator]
    ours = guided(x, cond, uncond, process, PHI)
    torch.testing.assert_close(ours, back(x, out, SIGMA), rtol=0, atol=1e-10)


def test_diffusers_on_an_eps_network_is_another_method() -> None:
    """It rescales the predicted noise there, whose spread is near 1 whatever the picture: at high sigma nothing of D is held."""
    theirs = diffusers_rescale()
    x, cond, uncond = branches(4, 6, 5)
    sigma = torch.full((3,), 5.0, dtype=torch.float64)
    eps_cond, eps_uncond = (VE_SCALED.eps(x, denoised, sigma) for denoised in (cond, uncond))
    out = theirs(eps_uncond + W * (eps_cond - eps_uncond), eps_cond, 1.0)  # type: ignore[operator]
    theirs_denoised = VE_SCALED.denoised_from_eps(x, out, sigma)
    ours = guided(x, cond, uncond, VE_SCALED, 1.0, sigma)
    assert (ours - theirs_denoised).abs().max() > 0.5
    spreads = [VE_SCALED.vp_velocity(x, D, sigma).flatten(1).std(dim=1) for D in (cond, ours, theirs_denoised)]
    torch.testing.assert_close(spreads[1], spreads[0], rtol=1e-10, atol=0)
    assert ((spreads[2] / spreads[0] - 1).abs() > 0.1).all()


def test_rescaling_the_denoised_estimate_itself_is_another_method() -> None:
    x, cond, uncond = branches(4, 6, 5)
    plain = uncond + W * (cond - uncond)
    in_denoised = plain * expand(cond.flatten(1).std(dim=1) / plain.flatten(1).std(dim=1), plain)
    for process in (VE_SCALED, RECTIFIED_FLOW):
        assert (guided(x, cond, uncond, process, 1.0) - in_denoised).abs().max() > 0.1


def test_one_picture_does_not_change_when_another_joins_it() -> None:
    x, cond, uncond = branches(4, 6, 5)
    alone = rescale_denoised(VE_SCALED, x[:1], uncond[:1], cond[:1], SIGMA[:1], PHI)
    loud = torch.cat([uncond[:1], 100 * uncond[1:]])
    torch.testing.assert_close(
        rescale_denoised(VE_SCALED, x, loud, cond, SIGMA, PHI)[:1], alone, rtol=1e-12, atol=1e-12
    )


def test_zero_is_neutral_and_bad_values_are_refused() -> None:
    x, cond, uncond = branches(4, 6, 5)
    assert torch.equal(guided(x, cond, uncond, VE_SCALED, 0.0), uncond + W * (cond - uncond))
    for wrong in (-0.1, 1.1):
        with pytest.raises(UserError, match="phi of Rescale Guidance"):
            RescaleGuidance(phi=wrong)
