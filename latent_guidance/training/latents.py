"""Pictures encoded once: the posterior of every picture of a folder, kept in a safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from .data import ImageFolder, load_image_folder, to_signed

if TYPE_CHECKING:
    from ..models.vae import VAE


@dataclass(frozen=True)
class LatentSet:
    """The latents of an image folder, scaled to unit variance.

    Attributes:
        mean: (N, C, h, w) posterior means, less the shift factor, times the scaling factor.
        std: (N, C, h, w) posterior standard deviations times the scaling factor.
        texts: N captions.
        classes: (N,) int64 indices into ``labels``.
        labels: Class names.
        subgroups: N finer class names, or none at all.
        keywords: For each picture, words that describe it, or none at all.
        other_texts: For each picture, other captions, or none at all.
        mark: What tells these latents from others: of the encoder and of the pictures; empty for none.
    """

    mean: Tensor
    std: Tensor
    texts: tuple[str, ...]
    classes: Tensor
    labels: tuple[str, ...]
    subgroups: tuple[str, ...] = ()
    keywords: tuple[tuple[str, ...], ...] = ()
    other_texts: tuple[tuple[str, ...], ...] = ()
    mark: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, chosen: Tensor, *, generator: torch.Generator) -> Tensor:
        """Posterior samples (B, C, h, w) of the pictures ``chosen`` (B,)."""
        mean, std = self.mean[chosen], self.std[chosen]
        return mean + std * torch.randn(mean.shape, generator=generator)

    def by_subgroup(self) -> LatentSet:
        """The same latents with the subgroups as classes.

        Raises:
            UserError: A picture has no subgroup.
        """
        if not self.subgroups or not all(self.subgroups):
            raise UserError(
                "The pictures have no subgroups",
                expected="an entry 'subgroup' in every line of metadata.jsonl",
                mend="classify by folder, or write the subgroups into metadata.jsonl",
            )
        labels = tuple(dict.fromkeys(self.subgroups))
        classes = torch.tensor([labels.index(name) for name in self.subgroups])
        return replace(self, classes=classes, labels=labels, mark=f"{self.mark} by subgroup" if self.mark else "")


@torch.no_grad()
def encode_folder(
    vae: VAE, pictures: Path, cache: Path | None = None, *, flip: bool = False, batch: int = 16, progress: bool = True
) -> LatentSet:
    """Encode an image folder, or read ``cache`` if it was written with this VAE and these pictures.

    Args:
        vae: Its posterior is kept.
        pictures: Image folder.
        cache: Safetensors file to keep the latents in; None for none.
        flip: Mirror the pictures left to right before encoding.
        batch: Pictures at a time.
        progress: Show a bar.

    Raises:
        UserError: The pictures are missing, or ``cache`` is damaged or belongs to another VAE or other pictures.
    """
    from tqdm import tqdm

    from ..models.files import read_safetensors, write_safetensors

    data = load_image_folder(pictures)
    mark = _fingerprint(vae, data, flip=flip)
    if cache is not None and cache.is_file():
        tensors, metadata = read_safetensors(cache)
        if metadata.get("fingerprint") != mark:
            raise UserError(
                f"{cache} holds the latents of another VAE or of other pictures",
                expected=f"latents of {pictures} under this VAE",
                mend="delete the file; it is made again",
            )
    else:
        parts: list[tuple[Tensor, Tensor]] = []
        for images in tqdm(data.images.split(batch), desc="encoding", disable=not progress):
            signed = to_signed(images.flip(3) if flip else images)
            posterior = vae.network.encode(signed.to(vae.device, vae.dtype)).latent_dist
            parts.append((posterior.mean.float().cpu(), posterior.std.float().cpu()))
        tensors = {"mean": torch.cat([m for m, _ in parts]), "std": torch.cat([s for _, s in parts])}
        if cache is not None:
            write_safetensors(cache, tensors, dtype=torch.float32, metadata={"fingerprint": mark})
    for name in ("mean", "std"):
        if name not in tensors or len(tensors[name]) != len(data) or not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(
                f"{cache} does not hold whole latents: {name} of {len(data)} pictures is missing, of another number or not finite",
                expected=f"latents of {pictures} under this VAE",
                mend="delete the file; it is made again",
            )
    factor = vae.scaling_factor
    return LatentSet(
        mean=(tensors["mean"] - vae.shift_factor) * factor,
        std=tensors["std"] * factor,
        texts=data.texts,
        classes=data.classes,
        labels=data.labels,
        subgroups=data.subgroups,
        keywords=data.keywords,
        other_texts=data.other_texts,
        mark=f"{mark} {data.words_mark}",
    )


def _fingerprint(vae: VAE, data: ImageFolder, *, flip: bool) -> str:
    """A mark of the encoder (not the decoder, which does not change latents) and of the pictures."""
    parts = [part for part in (vae.network.encoder, vae.network.quant_conv) if part is not None]
    return f"{weights_mark(*parts)} {data.mark} {flip}"


def weights_mark(*networks: nn.Module) -> str:
    """What tells trained networks from others: the sum of their weights' magnitudes, to seven digits."""
    return f"{sum(float(p.detach().double().abs().sum()) for network in networks for p in network.parameters()):.6e}"
