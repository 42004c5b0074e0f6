"""Recipe: an AutoencoderKL on pictures or crops of them.

Squared error plus a small KL term, nothing else: that converges, on two cores too. Crops of half the picture's side
make a step four times cheaper. What crops cannot teach is the statistics that the group norms see on whole pictures, so the
decoder can then be settled on those, with the encoder frozen: latents, and all that was trained on them, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .data import ImageFolder, load_image_folder, random_crops, to_signed
from .latents import LatentSet
from .loop import LoopSettings, TrainingRun, batch_indices, check_settings

if TYPE_CHECKING:
    from ..models.vae import VAE

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 128, 128],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 128,
    "mid_block_add_attention": False,
}
"""3.75 M parameters, and 0.13 M of attention that the pipeline's format asks for and nothing trains; spatial ratio 8."""


@dataclass(frozen=True)
class VAERecipe:
    """Settings of :func:`train_vae`.

    Attributes:
        crop: Side of the training crops in pixels, a multiple of 8, at most the pictures' side.
        batch: Crops per step, >= 1.
        kl_weight: Weight of the KL divergence (mean per latent number) against the mean squared error, >= 0.

    Raises:
        UserError: A value out of its range.
    """

    crop: int = 64
    batch: int = 16
    kl_weight: float = 2e-5

    def __post_init__(self) -> None:
        check_settings(
            self,
            crop=(self.crop >= 8 and self.crop % 8 == 0, "a multiple of 8"),
            batch=(self.batch >= 1, "at least 1"),
            kl_weight=(0 <= self.kl_weight < math.inf, "at least 0 and finite"),
        )


def train_vae(
    folders: Sequence[Path],
    run_folder: Path,
    *,
    settings: LoopSettings,
    recipe: VAERecipe | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> VAE:
    """Train a VAE on image folders, resuming ``run_folder`` if it holds a state.

    Args:
        folders: Image folders, taken in turn, one per step; latents of the first have unit variance.
        run_folder: Where the state is kept.
        settings: See :class:`.loop.LoopSettings`.
        recipe: See :class:`VAERecipe`.
        config: AutoencoderKL's arguments where they differ from ``VAE_CONFIG``.
        progress: Show a bar.

    Returns:
        The VAE with averaged weights and ``scaling_factor`` = 1 / standard deviation of the latents of the first of ``folders``.

    Raises:
        UserError: The pictures are missing, incomplete or smaller than the crops, training turned NaN, or the state belongs to other
            pictures.
    """
    from ..models.vae import new_vae

    recipe = VAERecipe() if recipe is None else recipe
    sets = [load_image_folder(folder) for folder in folders]
    smallest = min(min(data.images.shape[-2:]) for data in sets)
    check_settings(recipe, crop=(recipe.crop <= smallest, f"at most {smallest}, the pictures' side"))
    torch.manual_seed(settings.seed)
    vae = new_vae({**VAE_CONFIG, **(config or {})})
    network = vae.network.train()
    mark = "; ".join(data.mark for data in sets)
    run = TrainingRun(network, run_folder, settings, data=mark, recipe=asdict(recipe))

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        data = sets[step % len(sets)]
        chosen = batch_indices(step // len(sets), batch=recipe.batch, total=len(data), seed=settings.seed)
        x = to_signed(random_crops(data.images[chosen], size=recipe.crop, generator=generator).to(settings.device))
        with run.arithmetic():
            moments = network.encode(x).latent_dist
            noise = torch.randn(moments.mean.shape, generator=generator).to(settings.device)
            decoded = network.decode(moments.mean + moments.std * noise).sample
        error = (decoded.float() - x).square().mean()
        mean, logvar = moments.mean.float(), moments.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = float(-10 * torch.log10(error.detach() / 4))
        return error + recipe.kl_weight * divergence, {"psnr": psnr, "kl": float(divergence.detach())}

    run.train(loss_of, progress=progress)
    run.finished()
    factor = 1 / float(encode_all(vae, sets[0], batch=32).std())
    network.register_to_config(scaling_factor=factor)
    return vae


def settle_decoder(
    vae: VAE,
    latents: LatentSet,
    pictures: Path,
    run_folder: Path,
    *,
    settings: LoopSettings,
    batch: int = 4,
    jitter: float = 0.3,
    progress: bool = True,
) -> VAE:
    """Train the decoder alone on whole pictures, in place, resuming ``run_folder`` if it holds a state.

    Args:
        vae: Its encoder stays as it is.
        latents: Of ``pictures`` under this VAE.
        pictures: Image folder.
        run_folder: Where the state is kept.
        settings: See :class:`.loop.LoopSettings`.
        batch: Pictures per step, >= 1.
        jitter: Noise is added to the unit-variance latents, its standard deviation drawn evenly from 0 to this, >= 0, for each
            picture, so that the decoder bears with latents that a sampler made (noise-augmented decoding, arXiv 2510.11690).
        progress: Show a bar.

    Raises:
        UserError: The pictures are missing or incomplete, ``batch`` or ``jitter`` is out of range, training turned NaN, or the state
            belongs to another VAE or other pictures.
    """
    if batch < 1 or not 0 <= jitter < math.inf:
        raise UserError(
            f"batch = {batch}, jitter = {jitter:g}",
            expected="a batch of at least 1, jitter of at least 0 and finite",
            mend="correct it",
        )
    data = load_image_folder(pictures)
    network = vae.network.requires_grad_(False).to(settings.device)
    parts = {"decoder": network.decoder, "post_quant_conv": network.post_quant_conv}
    decoder = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(".attentions." not in name)
    run = TrainingRun(decoder, run_folder, settings, data=latents.mark, recipe={"batch": batch, "jitter": jitter})
    factor = vae.scaling_factor
    decode = run.compiled(lambda latent: network.decode(latent).sample)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = batch_indices(step, batch=batch, total=len(data), seed=settings.seed)
        latent = latents.draw(chosen, generator=generator)
        deviation = jitter * torch.rand((batch, 1, 1, 1), generator=generator)
        latent = latent + deviation * torch.randn(latent.shape, generator=generator)
        with run.arithmetic():
            decoded = decode(latent.to(settings.device) / factor + vae.shift_factor)
        error = (decoded.float() - to_signed(data.images[chosen].to(settings.device))).square().mean()
        return error, {"psnr": float(-10 * torch.log10(error.detach() / 4))}

    run.train(loss_of, progress=progress)
    run.finished()
    return vae


@torch.no_grad()
def encode_all(vae: VAE, data: ImageFolder, *, batch: int = 32) -> Tensor:
    """Posterior means of all pictures, unscaled: (N, C, H / 8, W / 8) float32."""
    parts = data.images.split(batch)
    return torch.cat([vae.encode(to_signed(part), sample=False).cpu() for part in parts])


@torch.no_grad()
def reconstruction_psnr(vae: VAE, data: ImageFolder, *, batch: int = 32) -> Tensor:
    """PSNR of encode -> decode per picture in dB over the [0, 1] range: (N,)."""
    errors = []
    for part in data.images.split(batch):
        x = to_signed(part.to(vae.device))
        errors.append(((vae.decode(vae.encode(x, sample=False)) - x).square().mean((1, 2, 3)) / 4).cpu())
    return -10 * torch.log10(torch.cat(errors))
