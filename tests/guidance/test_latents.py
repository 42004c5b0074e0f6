"""Which latents are the same, and how they are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latent_guidance.guidance.latents import Latents

SD15, SDXL = Latents("SD15", 4, 0.18215), Latents("SDXL", 4, 0.13025)
SD3, FLUX = Latents("SD3", 16, 1.5305, 0.0609), Latents("Flux", 16, 0.3611, 0.1159)
BY_CHANNEL = Latents("SDXL_Playground_2_5", 4, None)


@pytest.mark.parametrize("latents", [SD15, SDXL, SD3, FLUX, BY_CHANNEL])
def test_only_itself_is_the_same(latents: Latents) -> None:
    everything = [SD15, SDXL, SD3, FLUX, BY_CHANNEL]
    assert [other for other in everything if latents.same_as(other)] == [latents]


def test_the_name_decides_only_where_the_factors_cannot() -> None:
    assert SD15.same_as(replace(SD15, name="Stable Diffusion 1", scaling_factor=0.1822))
    assert not SD15.same_as(replace(SD15, scaling_factor=0.184))
    assert SD3.same_as(replace(SD3, shift_factor=0.0613)) and not SD3.same_as(replace(SD3, shift_factor=0.0))
    assert BY_CHANNEL.same_as(Latents("sdxl_playground_2_5", 4, 0.5))
    assert not BY_CHANNEL.same_as(Latents("sdxl_playground_2_5", 16, 0.5))


def test_a_person_reads_name_channels_and_factors() -> None:
    assert str(SDXL) == "'SDXL' (4 channels, scaling factor 0.13025)"
    assert str(FLUX) == "'Flux' (16 channels, scaling factor 0.3611, shift 0.1159)"
    assert str(BY_CHANNEL) == "'SDXL_Playground_2_5' (4 channels, every channel scaled by itself)"
