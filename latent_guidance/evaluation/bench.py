"""The bench on which a model is measured: its networks, the real pictures, and how samples are drawn.

Pictures are (N, 3, H, W) uint8 on the CPU everywhere outside this file: what a PNG would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..denoiser import concat_conds
from ..devices import check_device
from ..errors import UserError
from ..guidance import CFG, ClassifierGuidance, Guider, Rule
from ..models.checkpoint import load_checkpoint
from ..models.files import read_safetensors, write_safetensors
from ..models.unet import network_denoiser
from ..noise import SeededNoise
from ..samplers import sample_dpmpp_2m, sample_dpmpp_2m_sde
from ..step_grids import step_grid
from ..training.data import ImageFolder, load_image_folder, to_signed
from .parts import Say, fingerprint

SMALL, LARGE = "128", "160"
"""Folders of the real pictures: as the model draws them, and larger for the judge's crops."""
FROM_NOTHING = sample_dpmpp_2m_sde
"""By which pictures are made from the empty prompt, steered or not: the noise of its steps lets later ones mend what earlier ones drew."""
AT_ONCE = 64
"""Pictures that go through the VAE together."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how much of it. ``grid`` names a step grid; the sampler is DPM-Solver++(2M), or :data:`FROM_NOTHING`."""

    steps: int = 30
    grid: str = "karras"
    seed: int = 1000
    classifier_scale: float = ClassifierGuidance.guidance_scale
    classifier_scaling: str = ClassifierGuidance.scaling
    cfg_scale: float = CFG.guidance_scale
    judge_steps: int = 2000
    judge_batch: int = 192
    judge_size: int = 96
    per_group: int = 32
    names: int = 200
    captions: int = 50
    caption_seeds: int = 2
    curve_per_group: int = 32
    curve_names: int = 40
    curve_seeds: int = 8
    raw_scales: tuple[float, ...] = (0, 1, 2, 5, 10, 15, 20, 30, 45, 60)
    relative_scales: tuple[float, ...] = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
    cfg_scales: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    page: int = 100
    page_seeds: int = 3

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "judge_steps": 1,
            "judge_batch": 1,
            "judge_size": 32,
            "curve_per_group": 2,
            "curve_names": 1,
            "curve_seeds": 2,
        }
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise UserError(f"{name} = {getattr(self, name)}", expected=f"at least {limit}", mend=f"correct {name}")


TINY = Plan(
    steps=3,
    judge_steps=4,
    judge_batch=8,
    judge_size=32,
    per_group=2,
    names=4,
    captions=3,
    caption_seeds=2,
    curve_per_group=2,
    curve_names=2,
    curve_seeds=2,
    raw_scales=(0, 5),
    relative_scales=(0, 0.3),
    cfg_scales=(1, 4),
    page=4,
    page_seeds=1,
)
"""Counts with which everything runs through on a CPU; what comes out means nothing."""


class Bench:
    """A model and the pictures it was trained on.

    Args:
        model: Checkpoint folder with a classifier.
        pictures: Folder with the image folders ``128`` and ``160`` of the same pictures in the same order.
        out: Where results go.
        plan: What to measure.
        device: Of the networks; noise is drawn on the CPU.
        batch: Samples at a time.
        say: Told what happens.

    Raises:
        UserError: The model has no classifier, its labels are not the pictures' folders, or the device is not there.
    """

    def __init__(
        self, model: Path, pictures: Path, out: Path, *, plan: Plan, device: str, batch: int, say: Say
    ) -> None:
        check_device(device)
        if batch < 1:
            raise UserError(f"a batch of {batch}", expected="at least 1", mend="give a larger batch")
        self.plan, self.out, self.pictures, self.batch, self.say = plan, out, pictures, batch, say
        self.device = torch.device(device)
        self.checkpoint = load_checkpoint(model, device=self.device)
        self.data: ImageFolder = load_image_folder(pictures / SMALL)
        if self.checkpoint.classifier is None:
            raise UserError(
                f"{model} has no classifier", expected="a checkpoint with a classifier/ folder", mend="train one"
            )
        self.classifier = self.checkpoint.classifier
        self.labels = self.data.labels
        if set(self.classifier.config.labels) != set(self.labels):
            raise UserError(
                f"a classifier of {', '.join(self.classifier.config.labels)} and pictures of {', '.join(self.labels)}",
                expected="the same groups",
                mend="give the pictures that the classifier was trained on",
            )
        self.model_mark = fingerprint(model)
        self.vae_mark = fingerprint(model / "vae")
        self.denoiser = network_denoiser(self.checkpoint.unet, self.checkpoint.scheduler_config)
        self._encoded: dict[str, Tensor] = {}

    @cached_property
    def pictures_mark(self) -> str:
        """What tells these pictures from others."""
        return f"{tuple(self.data.images.shape)} {int(self.data.images.long().sum())}"

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings that every sampled part depends on, and ``more``."""
        common = {"model": self.model_mark, "pictures": self.pictures_mark, "steps": self.plan.steps}
        return {
            **common,
            "grid": self.plan.grid,
            "sampler": f"dpmpp_2m, {FROM_NOTHING.__name__} from nothing",
            "seed": self.plan.seed,
            **more,
        }

    @cached_property
    def large(self) -> Tensor:
        """The larger renders (N, 3, H, W) uint8."""
        data = load_image_folder(self.pictures / LARGE)
        if data.texts != self.data.texts:
            raise UserError(
                f"{self.pictures / LARGE} does not hold the pictures of {self.pictures / SMALL} in their order",
                expected="the same pictures at two sizes",
                mend="make both with `python -m latent_guidance.training emoji`",
            )
        return data.images

    @cached_property
    def reconstructions(self) -> Tensor:
        """Every real picture through the VAE and back, (N, 3, H, W) uint8; kept in ``out``."""
        cache, mark = self.out / "reconstructions.safetensors", f"{self.vae_mark} {self.pictures_mark}"
        if cache.is_file():
            tensors, metadata = read_safetensors(cache)
            if metadata.get("mark") == mark:
                return tensors["pictures"]
        self.say("passing the real pictures through the VAE")
        vae = self.checkpoint.vae
        with torch.no_grad():
            pictures = torch.cat(
                [
                    to_bytes(vae.decode(vae.encode(to_signed(part), sample=False)))
                    for part in self.data.images.split(AT_ONCE)
                ]
            )
        write_safetensors(cache, {"pictures": pictures}, dtype=torch.float32, metadata={"mark": mark})
        return pictures

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Tokens (B, L, width) of prompts, each encoded once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self._encoded[prompt] = self.checkpoint.text_encoder.encode(prompt)[0]
        return cast(Tensor, concat_conds([self._encoded[prompt] for prompt in prompts]))

    @cached_property
    def sigmas(self) -> Tensor:
        """The noise levels of every run, (steps + 1,)."""
        return step_grid(self.denoiser.schedule, self.plan.grid, self.plan.steps)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        rules: Sequence[Rule] = (),
        *,
        sampler: Callable[..., Tensor] = sample_dpmpp_2m,
    ) -> Tensor:
        """One picture per prompt and seed, (N, 3, H, W) uint8; item i depends on its own prompt and seed alone.

        Args:
            prompts: N of them.
            seeds: one for each.
            rules: the chain.
            sampler: one of :mod:`latent_guidance.samplers`, with or without options of its own.
        """
        pictures: list[Tensor] = []
        for first in range(0, len(seeds), self.batch):
            part = slice(first, first + self.batch)
            pictures.append(self.decoded(self.latents(prompts[part], seeds[part], rules, sampler=sampler)))
        return torch.cat(pictures)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        rules: Sequence[Rule] = (),
        *,
        sampler: Callable[..., Tensor] = sample_dpmpp_2m,
    ) -> Tensor:
        """The same as the model has it before it is decoded, in one batch: (N, C, h, w), scaled."""
        vae = self.checkpoint.vae
        side = [size // vae.spatial_ratio for size in self.data.images.shape[-2:]]
        guider = Guider(self.denoiser, rules, uncond=self.encode([""]))
        noise = SeededNoise(list(seeds), device=self.device)
        start = (1 + float(self.sigmas[0]) ** 2) ** 0.5
        x = noise.initial((len(seeds), vae.latent_channels, *side)) * start
        return sampler(guider, x, self.sigmas, self.encode(prompts), noise_sampler=noise)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) uint8 of scaled latents (N, C, h, w)."""
        vae = self.checkpoint.vae
        return torch.cat([to_bytes(vae.decode(part / vae.scaling_factor)) for part in latents.split(AT_ONCE)])

    def from_nothing(self, seeds: Sequence[int], rules: Sequence[Rule] = ()) -> Tensor:
        """Pictures from the empty prompt, one per seed."""
        return self.sample([""] * len(seeds), seeds, rules, sampler=FROM_NOTHING)

    def by_classifier(
        self, label: str, seeds: Sequence[int], *, scale: float | None = None, scaling: str | None = None
    ) -> Tensor:
        """Pictures from the empty prompt, steered to ``label``, one per seed; by the plan's scale and scaling for None."""
        scale = self.plan.classifier_scale if scale is None else scale
        scaling = self.plan.classifier_scaling if scaling is None else scaling
        rule = ClassifierGuidance(classifier=self.classifier, label=f'"{label}"', guidance_scale=scale, scaling=scaling)
        return self.from_nothing(seeds, [rule])

    def by_prompt(self, prompts: Sequence[str], seeds: Sequence[int], *, scale: float | None = None) -> Tensor:
        """Pictures from prompts with classifier-free guidance, one per prompt and seed."""
        rule = CFG(guidance_scale=self.plan.cfg_scale if scale is None else scale)
        return self.sample(prompts, seeds, [rule])

    def seeds(self, count: int, *, block: int = 0) -> list[int]:
        """``count`` seeds, the same ones for the same ``block``, of which no two overlap."""
        first = self.plan.seed + 100_000 * block
        return list(range(first, first + count))

    def names(self, count: int) -> list[int]:
        """``count`` of the pictures, drawn by the plan's seed without repetition; a smaller draw begins a larger one."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.plan.seed))
        return order[:count].tolist()


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> uint8 on the CPU."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
