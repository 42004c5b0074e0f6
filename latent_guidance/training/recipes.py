"""The recipes of the bundled model, one function per command.

Each takes folders and a few numbers, resumes its own run, and writes its part of a checkpoint folder::

    python -m latent_guidance.training emoji                           # the pictures
    python -m latent_guidance.training vae CHECKPOINT RUNS
    python -m latent_guidance.training decoder CHECKPOINT RUNS         # the VAE's second stage
    python -m latent_guidance.training classifier CHECKPOINT RUNS
    python -m latent_guidance.training classifier CHECKPOINT RUNS --by subgroup
    python -m latent_guidance.training unet CHECKPOINT RUNS
    python -m latent_guidance.training clip CHECKPOINT RUNS            # after the UNet: it reads its text encoder's tokens

RUNS keeps what is needed to go on: the states of the runs and the encoded pictures. With a limit of ``minutes`` the
learning rate falls to nothing at that time; such a run depends on the machine's speed and is not repeatable bit for bit.
``device`` is "cpu" or "cuda".
The settings of the loop and of the recipe are checked before the pictures are read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from .classifier import ClassifierRecipe, accuracy_by_noise, held_out
from .classifier import train_classifier as train_classifier_network
from .clip import CLIPRecipe, retrieval_by_noise
from .clip import train_clip as train_clip_network
from .data import load_image_folder
from .emoji import make_emoji_folder
from .latents import LatentSet, encode_folder
from .loop import LoopSettings
from .unet import UNetRecipe, averaged_unet
from .unet import train_unet as train_unet_network
from .vae import VAERecipe, reconstruction_psnr
from .vae import settle_decoder as settle_decoder_network
from .vae import train_vae as train_vae_network

if TYPE_CHECKING:
    from ..models.vae import VAE

REPORT_LEVELS = (-5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 7.0)
"""log-SNRs at which the accuracy of networks on noisy latents is reported."""

ON_NOISY_LATENTS = {"weight_decay": 0.1, "ema_decay": 0.998}
"""Settings of the loop for networks that could learn the pictures by heart: classifier and CLIP."""


def make_emoji(folder: Path | None = None) -> Path:
    """Draw the emoji pictures into ``folder`` (default: the user's cache) at 128 and 160 pixels; returns the folder."""
    return make_emoji_folder(folder)


def train_vae(
    checkpoint: Path,
    runs: Path,
    *,
    pictures: Path | None = None,
    steps: int = 6000,
    minutes: float | None = None,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    batch: int = VAERecipe.batch,
    crop: int = VAERecipe.crop,
    latent_space: str = "emoji",
    device: str = "cpu",
) -> float:
    """Train the VAE on ``pictures``/128 and /160 and write ``checkpoint``/vae.

    Returns:
        The mean PSNR in dB of reconstructions of the pictures at 128 pixels.

    Raises:
        UserError: ``checkpoint``/vae is this run's VAE with a decoder that ``decoder`` has trained further.
    """
    from ..models.checkpoint import load_vae, save_vae

    settings = LoopSettings(steps=steps, learning_rate=learning_rate, minutes=minutes, seed=seed, device=device)
    recipe = VAERecipe(batch=batch, crop=crop)
    folders = [_pictures(pictures, checkpoint, runs) / size for size in ("128", "160")]
    vae = train_vae_network(folders, runs / "vae", settings=settings, recipe=recipe)
    _keep_settled(vae, checkpoint)
    save_vae(vae, checkpoint, latent_space=latent_space)
    return float(reconstruction_psnr(load_vae(checkpoint, device=device), load_image_folder(folders[0])).mean())


def settle_decoder(
    checkpoint: Path,
    runs: Path,
    *,
    pictures: Path | None = None,
    steps: int = 3000,
    minutes: float | None = None,
    learning_rate: float = 5e-4,
    seed: int = 0,
    batch: int = 4,
    jitter: float = 0.3,
    muon: bool = True,
    compile: bool = False,
    device: str = "cpu",
) -> float:
    """Train the decoder of ``checkpoint``/vae on whole pictures and write it back; returns the mean PSNR in dB.

    The encoder and the latents stay as they are, so UNet and classifier may be trained before, after or meanwhile. ``jitter`` is
    that of :func:`.vae.settle_decoder`, ``muon`` and ``compile`` are those of :class:`.loop.LoopSettings`.
    """
    from ..models.checkpoint import latent_space_of, load_vae, save_vae

    settings = LoopSettings(
        steps=steps, learning_rate=learning_rate, minutes=minutes, seed=seed, muon=muon, compile=compile, device=device
    )
    folder = _pictures(pictures, runs) / "128"
    vae = load_vae(checkpoint, device=device)
    cache = runs / "latents-128.safetensors"
    latents = encode_folder(vae, folder, cache)
    settle_decoder_network(vae, latents, folder, runs / "decoder", settings=settings, batch=batch, jitter=jitter)
    save_vae(vae, checkpoint, latent_space=latent_space_of(checkpoint))
    return float(reconstruction_psnr(load_vae(checkpoint, device=device), load_image_folder(folder)).mean())


def train_classifier(
    checkpoint: Path,
    runs: Path,
    *,
    pictures: Path | None = None,
    steps: int = 3000,
    minutes: float | None = None,
    learning_rate: float = 2e-3,
    seed: int = 0,
    batch: int = ClassifierRecipe.batch,
    by: str = "group",
    width: int = 128,
    first: float | None = None,
    settling: float = ClassifierRecipe.settling,
    muon: bool = False,
    weight_decay: float = ON_NOISY_LATENTS["weight_decay"],
    compile: bool = False,
    device: str = "cpu",
) -> dict[float, float]:
    """Train a noisy-latent classifier and write ``checkpoint``/classifier, or /classifier_subgroups.

    Args:
        by: "group": the folders are the classes; "subgroup": the metadata's subgroups are.
        width: Channels of the network's second level.
        first: Share of the batch that is whole renders of 128 pixels; None for a third.
        settling: That of :class:`.classifier.ClassifierRecipe`.
        muon: That of :class:`.loop.LoopSettings`, as are ``weight_decay`` and ``compile``.

    Returns:
        Accuracy on held-out pictures at each log-SNR of ``REPORT_LEVELS``.

    Raises:
        UserError: ``by`` is something else, a number out of its range, or the pictures lack subgroups.
    """
    from ..models.checkpoint import latent_space_of, load_vae, save_classifier
    from ..models.classifier import ClassifierConfig
    from ..models.tiny import LOG_SNR_RANGE

    if by not in ("group", "subgroup"):
        raise UserError(f"by = {by!r}", expected='"group" or "subgroup"', mend="choose one of them")
    channels = (ClassifierConfig.channels[0], width)
    fits, expected = ClassifierConfig.checks["channels"]
    if not fits(channels):
        raise UserError(
            f"width = {width}", expected=f"channels of the second level; both levels: {expected}", mend="correct width"
        )
    settings = LoopSettings(steps=steps, learning_rate=learning_rate, minutes=minutes, seed=seed, device=device)
    settings = replace(settings, **{**ON_NOISY_LATENTS, "weight_decay": weight_decay}, muon=muon, compile=compile)
    recipe = ClassifierRecipe(batch=batch, first=first, settling=settling)
    vae = load_vae(checkpoint, device=device, shifted=True)
    sets = _latent_sets(vae, _pictures(pictures, runs), runs)
    if by == "subgroup":
        sets = [latents.by_subgroup() for latents in sets]
    name = "classifier" if by == "group" else "classifier_subgroups"
    config = ClassifierConfig(
        labels=sets[0].labels,
        latent_space=latent_space_of(checkpoint),
        latent_channels=vae.latent_channels,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        log_snr_range=LOG_SNR_RANGE,
        channels=channels,
    )
    classifier = train_classifier_network(sets, runs / name, config=config, settings=settings, recipe=recipe)
    save_classifier(classifier, checkpoint, name=name)
    return accuracy_by_noise(classifier, sets[0], log_snrs=REPORT_LEVELS, chosen=held_out(len(sets[0])))


def train_clip(
    checkpoint: Path,
    runs: Path,
    *,
    pictures: Path | None = None,
    steps: int = 3000,
    minutes: float | None = None,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    batch: int = CLIPRecipe.batch,
    start_from: Path | None = None,
    device: str = "cpu",
) -> dict[float, dict[str, float]]:
    """Train a noisy-latent CLIP on the tokens of ``checkpoint``'s text encoder and write ``checkpoint``/clip.

    A new run starts from random weights, or from those of the CLIP in the checkpoint folder ``start_from``, from which a text
    encoder that was trained further is learned in a few hundred steps.

    Returns:
        How often held-out pictures find their caption and their group at each log-SNR of ``REPORT_LEVELS``; see
        ``clip.retrieval_by_noise``.
    """
    from ..models.checkpoint import latent_space_of, load_noisy_clip, load_text_encoder, load_vae, save_noisy_clip
    from ..models.noisy_clip import NoisyCLIPConfig
    from ..models.tiny import LOG_SNR_RANGE

    settings = LoopSettings(steps=steps, learning_rate=learning_rate, minutes=minutes, seed=seed, device=device)
    settings = replace(settings, **ON_NOISY_LATENTS)
    recipe = CLIPRecipe(batch=batch)
    start = None if start_from is None else load_noisy_clip(start_from)
    vae = load_vae(checkpoint, device=device)
    sets = _latent_sets(vae, _pictures(pictures, runs), runs)
    encoder = load_text_encoder(checkpoint, device=device)
    config = NoisyCLIPConfig(
        latent_space=latent_space_of(checkpoint),
        latent_channels=vae.latent_channels,
        scaling_factor=vae.scaling_factor,
        log_snr_range=LOG_SNR_RANGE,
        text_width=encoder.width,
        text_encoder=f"that of {latent_space_of(checkpoint)}",
    )
    clip = train_clip_network(
        sets,
        encoder,
        runs / "clip",
        config=config,
        settings=settings,
        recipe=recipe,
        start_from=start,
    )
    save_noisy_clip(clip, checkpoint)
    return retrieval_by_noise(clip, encoder, sets[0], log_snrs=REPORT_LEVELS, chosen=held_out(len(sets[0])))


def train_unet(
    checkpoint: Path,
    runs: Path,
    *,
    pictures: Path | None = None,
    steps: int = 12_600,
    minutes: float | None = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
    batch: int = UNetRecipe.batch,
    start_from: Path | None = None,
    away_from: Path | None = None,
    sharpness: float = UNetRecipe.sharpness,
    sharp_below: float = UNetRecipe.sharp_below,
    decay: float = 0.25,
    compile: bool = False,
    muon: bool = True,
    time_power: float = UNetRecipe.time_power,
    drop: float = UNetRecipe.drop,
    export_only: bool = False,
    device: str = "cpu",
) -> None:
    """Train UNet and text tower and write the rest of ``checkpoint``.

    A new run starts from random weights, or from those of the checkpoint ``start_from``; with a weaker checkpoint ``away_from`` it
    learns to draw more decidedly from the empty prompt, see :func:`.unet.train_unet` and ``sharpness`` and
    ``sharp_below`` of :class:`.unet.UNetRecipe`.
    With ``export_only`` the run's state as it is now is written, without training. ``decay``, ``compile`` and ``muon`` are those of
    :class:`.loop.LoopSettings`, ``time_power`` is that of :class:`.unet.UNetRecipe`, ``drop`` that of its ``dropping``.
    """
    from ..models.checkpoint import load_vae, save_index, save_scheduler, save_text_encoder, save_unet
    from ..models.tiny import SCHEDULER_CONFIG

    settings = LoopSettings(
        steps=steps,
        learning_rate=learning_rate,
        minutes=minutes,
        seed=seed,
        warmup=200,
        decay=decay,
        compile=compile,
        muon=muon,
        device=device,
    )
    recipe = UNetRecipe(batch=batch, time_power=time_power, sharpness=sharpness, sharp_below=sharp_below).dropping(drop)
    vae = load_vae(checkpoint, device=device)
    latents = encode_folder(vae, _pictures(pictures, runs) / "128", runs / "latents-128.safetensors")
    if export_only:
        unet, encoder = averaged_unet(latents, runs / "unet", settings=settings, recipe=recipe)
    else:
        unet, encoder = train_unet_network(
            latents,
            runs / "unet",
            settings=settings,
            recipe=recipe,
            start_from=start_from,
            away_from=away_from,
        )
    save_unet(unet, checkpoint)
    save_text_encoder(encoder, checkpoint)
    save_scheduler(SCHEDULER_CONFIG, checkpoint)
    save_index(checkpoint)


def _keep_settled(vae: VAE, checkpoint: Path) -> None:
    """Refuse to write a VAE over itself with a decoder that was trained further."""
    from ..models.checkpoint import load_vae

    if not (checkpoint / "vae" / "config.json").is_file():
        return
    there = load_vae(checkpoint, shifted=True).network

    def same(mine: torch.nn.Module, theirs: torch.nn.Module) -> bool:
        written = theirs.state_dict()
        return all(
            name in written and torch.equal(value.cpu().half(), written[name].half())
            for name, value in mine.state_dict().items()
        )

    if same(vae.network.encoder, there.encoder) and not same(vae.network.decoder, there.decoder):
        raise UserError(
            f"{checkpoint / 'vae'} holds this run's VAE with a decoder that was trained further",
            expected="a checkpoint folder without it: this command writes the VAE as its own run left it",
            mend="go on with the next command; or delete the folder, and `decoder` comes again after this command",
        )


def _latent_sets(vae: VAE, root: Path, runs: Path) -> list[LatentSet]:
    """Latents of the pictures at 128 pixels, and at 160 plain and mirrored; kept in ``runs``."""
    sources = (("128", False, "latents-128"), ("160", False, "latents-160"), ("160", True, "latents-160-mirrored"))
    sets = [encode_folder(vae, root / size, runs / f"{name}.safetensors", flip=flip) for size, flip, name in sources]
    if any((one.texts, one.labels) != (sets[0].texts, sets[0].labels) for one in sets):
        raise UserError(
            f"{root / '128'} and {root / '160'} hold other pictures, or the same in another order ({len(sets[0])} and {len(sets[1])})",
            expected="the same pictures at two sizes",
            mend="make the folder again; `python -m latent_guidance.training emoji` makes the emoji one",
        )
    return sets


def _pictures(folder: Path | None, *written: Path) -> Path:
    """The folder of pictures, the emoji by default; before they are drawn, folders that will be ``written`` to are made.

    Raises:
        UserError: One of ``written`` is a file, or lies in one.
    """
    for path in written:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"{path} is no folder", expected="a folder, there or not yet", mend="name another"
            ) from None
    return make_emoji_folder(progress=False) if folder is None else folder
