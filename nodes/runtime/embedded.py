"""The runtime without ComfyUI: the library's own objects stand for MODEL, CLIP, VAE, GUIDER, SAMPLER and NOISE.

See ``base`` for what each function promises. Names are looked up in the pack's ``models/``, then in the run's models
folder: there, and in its ``latent_guidance/``, lie checkpoint folders, in its ``latent_classifiers/`` classifiers, in its
``latent_clips/`` noisy-latent CLIPs, in its ``clip_vision/`` CLIPs on pictures.
Everything runs in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...latent_guidance.errors import UserError
from ...latent_guidance.host.context import current
from .base import Kind
from .names import BUNDLED, CLIP_VISION, OWN_FOLDERS, find, locate

if TYPE_CHECKING:
    from torch import Tensor

    from ...latent_guidance.guidance.passes import Passes
    from ...latent_guidance.host.objects import Clip, GuiderNode, LatentSpace, Model, Noise, Sampler, Vae


def _found(kind: Kind) -> dict[str, Path]:
    models = current().models
    own = [models / folder] if (folder := {**OWN_FOLDERS, "picture_clip": CLIP_VISION}.get(kind)) else []
    return find(kind, [BUNDLED, models / "latent_guidance", models], own)


def _path(kind: Kind, name: str) -> Path:
    return locate(kind, name, _found(kind))


def names(kind: Kind) -> list[str]:
    return list(_found(kind))


def load_checkpoint(name: str) -> tuple[Model, Clip, Vae]:
    folder = _path("checkpoint", name)
    return _model(folder / "unet"), _clip(folder / "text_encoder"), _vae(folder / "vae")


def load_vae(name: str) -> Vae:
    return _vae(_path("vae", name))


def load_text_encoder(name: str) -> Clip:
    return _clip(_path("text_encoder", name))


def load_unet(name: str) -> Model:
    return _model(_path("unet", name))


def load_classifier(name: str) -> Any:
    from ...latent_guidance.models import checkpoint

    return checkpoint.load_classifier(_path("classifier", name), device=current().device)


def load_noisy_clip(name: str) -> Any:
    from ...latent_guidance.models import checkpoint

    return checkpoint.load_noisy_clip(_path("noisy_clip", name), device=current().device)


def load_picture_clip(name: str) -> Any:
    from ...latent_guidance.models.picture_clip import load_picture_clip

    return load_picture_clip(_path("picture_clip", name), device=current().device)


def picture_clip(clip_vision: Any, clip: Any) -> Any:
    raise UserError(
        "a CLIP Vision outside ComfyUI",
        expected="an open_clip folder",
        mend="use Load Picture CLIP, or run the workflow in ComfyUI",
    )


def _space(folder: Path) -> LatentSpace:
    """What the VAE in ``folder`` says of its latents, without loading it."""
    from ...latent_guidance.host.objects import LatentSpace
    from ...latent_guidance.models import checkpoint, configs

    config = configs.read_vae_config(folder)
    return LatentSpace(
        channels=config["latent_channels"],
        scaling_factor=float(config.get("scaling_factor", configs.DEFAULT_SCALING_FACTOR)),
        spatial_ratio=2 ** (len(config["block_out_channels"]) - 1),
        name=checkpoint.latent_space_of(folder),
    )


def _vae(folder: Path) -> Vae:
    from ...latent_guidance.host.objects import Vae
    from ...latent_guidance.models import checkpoint

    device = current().device
    vae = checkpoint.load_vae(folder, device=device)
    return Vae(vae, _space(folder), device, widest=int(vae.network.config["block_out_channels"][0]))


def _clip(folder: Path) -> Clip:
    from ...latent_guidance.host.objects import Clip
    from ...latent_guidance.models import checkpoint

    return Clip(checkpoint.load_text_encoder(folder, device=current().device).encode)


def _model(folder: Path) -> Model:
    from ...latent_guidance.host.objects import Model
    from ...latent_guidance.models import checkpoint, files
    from ...latent_guidance.models.unet import ConditionedUNet, network_denoiser

    whole = folder.parent
    for part, name in (("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        if not (whole / part / name).is_file():
            raise UserError(
                f"{folder} has no {part}/{name} beside it",
                expected="a UNet inside a checkpoint folder, which says how its latents are scaled and noised",
                mend="copy the whole checkpoint folder",
            )
    device = current().device
    scheduler = files.read_json(whole / "scheduler" / "scheduler_config.json")
    space = _space(whole / "vae")
    unet = checkpoint.load_unet(folder, device=device)
    denoiser = network_denoiser(unet, scheduler)
    inputs = int(unet.config["in_channels"])
    if inputs != space.channels:
        raise UserError(
            f"a UNet of {inputs} channels beside a VAE of {space.channels} channels, in {whole}",
            expected="a UNet on the latents of the VAE in the same folder",
            mend="use the UNet and the VAE of one checkpoint",
        )
    return Model(
        denoiser,
        cast(Any, denoiser.schedule),  # the cached table of a schedule is not a property to type checkers
        space,
        device,
        widest=int(unet.config["block_out_channels"][0]),
        needs=ConditionedUNet(unet).needs,
    )


def encode_text(clip: Clip, text: str) -> Any:
    return clip.conditioning(text)


def encode_image(vae: Vae, image: Tensor, *, sample: bool, seed: int) -> Tensor:
    return vae.encode(image, sample=sample, seed=seed)


def decode_latent(vae: Vae, samples: Tensor) -> Tensor:
    return vae.decode(samples)


def decoder(vae: Vae) -> Any:
    return vae.autoencoder


def make_guider(
    model: Model, positive: Any, negative: Any | None, rules: Sequence[Any], *, report: bool = False
) -> GuiderNode:
    from ...latent_guidance.guidance import check_order
    from ...latent_guidance.host.branches import check_model
    from ...latent_guidance.host.objects import GuiderNode

    model.check(rules)
    check_order(rules, model.rules)
    for other in [branch.model for rule in rules for branch in rule.branches() if branch.model is not None]:
        check_model(other, model)
    _check_attention(model, rules)
    return GuiderNode(model, positive, negative, tuple(rules), report=report)


def guider_passes(guider: GuiderNode, sigmas: Tensor | None = None) -> Passes:
    from ...latent_guidance.host.branches import guider_passes

    return guider_passes(guider, sigmas)


def patch_model(model: Model, rules: Sequence[Any], *, report: bool = False) -> Model:
    from ...latent_guidance.guidance import check_on_model

    check_on_model(rules)
    _check_attention(model, rules)
    return model.with_rules(rules, report=report)


def _check_attention(model: Model, rules: Sequence[Any]) -> None:
    """Refuse rules that change attention in layers which the model has not got."""
    from ...latent_guidance.attention import check_patch

    for branch in [branch for rule in rules for branch in rule.branches() if branch.attention is not None]:
        check_patch((branch.model or model).denoiser, branch.attention)


def make_sampler(
    function: Callable[..., Tensor], options: Mapping[str, Any], step_rules: Sequence[Any] = ()
) -> Sampler:
    from ...latent_guidance.guidance.steps import check_step_rules, sampler_options
    from ...latent_guidance.host.objects import Sampler

    check_step_rules(step_rules)
    rules = tuple(step_rules)

    def step_options(process: Any, sigmas: Tensor, record: Any) -> dict[str, Any]:
        return sampler_options(rules, process, sigmas, record)

    return Sampler(function, dict(options), rules, noise=_seeded_steps, step_options=step_options)


def _seeded_steps(x: Tensor, sigmas: Tensor, noise: Noise) -> Any:
    """Noise of the steps with one stream per item, past what the initial noise used of it."""
    from ...latent_guidance.noise import SeededNoise

    steps = SeededNoise(noise.step_seeds(x.shape[0]), tuple(x.shape), device=x.device)
    steps.initial()
    return steps


def seeded_noise(seeds: Sequence[int]) -> Noise:
    from ...latent_guidance.host.objects import Noise

    if not seeds:
        raise UserError("no seed", expected="one seed per item of the batch", mend="give a batch size of at least 1")
    return Noise(int(seeds[0]), tuple(int(seed) for seed in seeds))


def show_text(text: str) -> None:
    """Nothing: there is no canvas to show it on."""
