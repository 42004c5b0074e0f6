"""Checkpoint folders in the diffusers layout: find, load, save.

::

    NAME/model_index.json
         vae/            config.json, diffusion_pytorch_model.safetensors
         text_encoder/   config.json, model.safetensors (CLIPTextModel's names)
         tokenizer/      vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json
         unet/           config.json, diffusion_pytorch_model.safetensors
         scheduler/      scheduler_config.json
         classifier/     config.json, model.safetensors            (optional)
         clip/           config.json, model.safetensors            (optional: the noisy-latent CLIP)

diffusers' ``DiffusionPipeline.from_pretrained`` loads the same folder and does not look at ``classifier/`` and ``clip/``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import UserError
from .building import loaded
from .classifier import Classifier, ClassifierConfig, new_classifier
from .configs import read_text_config, read_unet_config, read_vae_config
from .files import (
    component_folder,
    read_header,
    read_json,
    weights_file,
    write_json,
    write_safetensors,
)
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig, new_noisy_clip
from .noisy_tower import NoisyLatentTower, TowerConfig
from .text_encoder import TextEncoder, from_clip_keys, new_text_encoder, to_clip_keys
from .tokenizer import CHUNK_LENGTH, Tokenizer, load_tokenizer, write_tokenizer
from .unet import ConditionedUNet, empty_cond, new_unet
from .vae import VAE, new_vae, with_middle_attention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """All networks of a folder.

    Attributes:
        classifier: None if the folder has none.
        noisy_clip: The noisy-latent CLIP; None if the folder has none.
        latent_space: Name of the VAE's latents, the folder's name if the VAE does not say; for people and for new
            classifiers. Whether a classifier fits is told from channels and scaling factor, since VAEs are often renamed.
    """

    vae: VAE
    text_encoder: TextEncoder
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]
    classifier: Classifier | None
    path: Path
    name: str
    latent_space: str
    noisy_clip: NoisyCLIP | None = None


def load_checkpoint(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Load a checkpoint folder.

    Args:
        folder: See the module's docstring.
        device: Where the networks go.
        dtype: What VAE, text encoder and UNet compute in; classifier and noisy-latent CLIP are always fp32.

    Raises:
        UserError: A file is missing, pickled, damaged, or does not belong to its config.
    """
    folder = Path(folder)
    scheduler = component_folder(folder, "unet").parent / "scheduler" / "scheduler_config.json"
    vae = load_vae(folder, device=device, dtype=dtype)
    return Checkpoint(
        vae=vae,
        text_encoder=load_text_encoder(folder, device=device, dtype=dtype),
        unet=load_unet(folder, device=device, dtype=dtype),
        scheduler_config=read_json(scheduler),
        classifier=load_classifier(folder, device=device) if (folder / "classifier").is_dir() else None,
        noisy_clip=load_noisy_clip(folder, device=device) if (folder / "clip").is_dir() else None,
        path=folder,
        name=folder.name,
        latent_space=latent_space_of(folder),
    )


def load_vae(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, shifted: bool = False
) -> VAE:
    """Load the VAE of a checkpoint folder or of its ``vae/`` folder.

    Args:
        path: The folder.
        device: Where the network goes.
        dtype: What it computes in.
        shifted: Whether the caller takes :attr:`VAE.shift_factor` off latents before it scales them; if not, a VAE that has one is
            refused.

    Raises:
        UserError: The folder is not whole, or its config is of no VAE that can be used.
    """
    folder = component_folder(path, "vae")
    config = read_vae_config(folder, shifted=shifted)

    def trial(vae: VAE) -> None:
        side = 4 * vae.spatial_ratio
        vae.decode(vae.encode(torch.zeros(1, 3, side, side), sample=False))

    vae = loaded("VAE", weights_file(folder), lambda: new_vae(config), module=lambda vae: vae.network, trial=trial)
    _settle(vae.network, device, dtype)
    return vae


def load_text_encoder(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load the text encoder of a checkpoint folder (with its tokenizer), or of a ``text_encoder/`` folder.

    The tokenizer's padding token is read from ``tokenizer/`` in or beside the folder; without one it is the end token.
    """
    folder = component_folder(path, "text_encoder")
    config = read_text_config(folder)
    near = [place / "tokenizer" for place in (folder, folder.parent) if (place / "tokenizer").is_dir()]
    tokenizer = load_tokenizer(near[0]) if near else Tokenizer()
    encoder = loaded(
        "text encoder",
        weights_file(folder),
        lambda: new_text_encoder(config, tokenizer=tokenizer),
        module=lambda encoder: encoder.network,
        trial=lambda encoder: encoder.encode_ids(torch.zeros(1, CHUNK_LENGTH, dtype=torch.int64)),
        rename=from_clip_keys,
    )
    _settle(encoder.network, device, dtype)
    return encoder


def load_unet(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Load the UNet of a checkpoint folder or of its ``unet/`` folder."""
    folder = component_folder(path, "unet")
    config = read_unet_config(folder)

    def trial(unet: UNet2DConditionModel) -> None:
        side = 2 ** (len(config["block_out_channels"]) + 1)
        x = torch.zeros(1, config["in_channels"], side, side)
        ConditionedUNet(unet)(x, torch.zeros(1), empty_cond(unet))

    unet = loaded("UNet", weights_file(folder), lambda: new_unet(config), module=lambda unet: unet, trial=trial)
    _settle(unet, device, dtype)
    return unet


def load_classifier(path: Path | str, *, device: torch.device | str = "cpu") -> Classifier:
    """Load the classifier of a checkpoint folder, of a ``classifier/`` folder, or of one ``.safetensors`` file.

    The single file carries its config in its metadata.
    """
    network, fingerprint = _load_on_noisy_latents(path, "classifier", ClassifierConfig, new_classifier, device)
    return Classifier(network, fingerprint=fingerprint)


def load_noisy_clip(path: Path | str, *, device: torch.device | str = "cpu") -> NoisyCLIP:
    """Load the noisy-latent CLIP of a checkpoint folder, of a ``clip/`` folder, or of one ``.safetensors`` file.

    The single file carries its config in its metadata.
    """
    network, fingerprint = _load_on_noisy_latents(path, "clip", NoisyCLIPConfig, new_noisy_clip, device)
    return NoisyCLIP(network, fingerprint=fingerprint)


_Config = TypeVar("_Config", bound=TowerConfig)
_Tower = TypeVar("_Tower", bound=NoisyLatentTower)


def _load_on_noisy_latents(
    path: Path | str,
    component: str,
    config_class: type[_Config],
    build: Callable[[_Config], _Tower],
    device: torch.device | str,
) -> tuple[_Tower, str]:
    """A network on noisy latents and its fingerprint."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        file, folder = path, None
    else:
        folder = component_folder(path, component)
        file = weights_file(folder)
    metadata = read_header(file)[1]
    what = config_class.what
    if folder is not None:
        config = config_class.from_json(read_json(folder / "config.json"))
    elif "config" in metadata:
        config = config_class.from_json(_metadata_json(file, metadata["config"], what))
    else:
        raise UserError(
            f"{file} says nothing about its latents in its metadata",
            expected=f"a {what}'s safetensors file",
            mend=f"choose a {what} that this library wrote",
        )

    def trial(network: _Tower) -> None:
        network.trial(torch.zeros(1, config.latent_channels, 8, 8), torch.zeros(1))

    network = loaded(what, file, lambda: build(config), module=lambda network: network, trial=trial)
    network.to(device).requires_grad_(False)
    return network, _fingerprint(config, file)


def _fingerprint(config: TowerConfig, weights: Path) -> str:
    """What tells one network from another: a hash of its description and of the bytes of its weights."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(config.to_json(), sort_keys=True).encode())
    return digest.hexdigest()


def latent_space_of(path: Path | str) -> str:
    """The name of a VAE's latents: what its file says, else the checkpoint folder's name."""
    folder = component_folder(path, "vae")
    named = read_header(weights_file(folder))[1].get("latent_space")
    return named or (folder.parent.name if folder.name == "vae" else folder.name)


def save_vae(vae: VAE, folder: Path, *, latent_space: str, dtype: torch.dtype = torch.float16) -> None:
    """Write ``folder/vae``; a VAE without attention in the middle gets one that adds nothing (see ``vae``)."""
    vae = with_middle_attention(vae)
    target = Path(folder) / "vae"
    tensors = vae.network.state_dict()
    write_safetensors(target / VAE_WEIGHTS, tensors, dtype=dtype, metadata={"latent_space": latent_space})
    write_json(target / "config.json", _plain(vae.network.config, "AutoencoderKL"))


def save_text_encoder(encoder: TextEncoder, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write ``folder/text_encoder`` and ``folder/tokenizer``."""
    target = Path(folder) / "text_encoder"
    write_safetensors(target / TEXT_WEIGHTS, to_clip_keys(encoder.network.state_dict()), dtype=dtype)
    write_json(target / "config.json", encoder.config)
    write_tokenizer(Path(folder) / "tokenizer", pad=encoder.tokenizer.pad)


def save_unet(unet: UNet2DConditionModel, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write ``folder/unet``."""
    target = Path(folder) / "unet"
    write_safetensors(target / VAE_WEIGHTS, unet.state_dict(), dtype=dtype)
    write_json(target / "config.json", _plain(unet.config, "UNet2DConditionModel"))


def save_classifier(
    classifier: Classifier, folder: Path, *, name: str = "classifier", dtype: torch.dtype = torch.float16
) -> None:
    """Write ``folder/name``; the safetensors file alone is a whole classifier too."""
    _save_on_noisy_latents(classifier.network, classifier.config, Path(folder) / name, dtype)


def save_noisy_clip(clip: NoisyCLIP, folder: Path, *, name: str = "clip", dtype: torch.dtype = torch.float16) -> None:
    """Write ``folder/name``; the safetensors file alone is a whole noisy-latent CLIP too."""
    _save_on_noisy_latents(clip.network, clip.config, Path(folder) / name, dtype)


def _save_on_noisy_latents(network: NoisyLatentTower, config: TowerConfig, target: Path, dtype: torch.dtype) -> None:
    fields = config.to_json()
    metadata = {"config": json.dumps(fields)}
    write_safetensors(target / TEXT_WEIGHTS, network.state_dict(), dtype=dtype, metadata=metadata)
    write_json(target / "config.json", {"_class_name": type(network).__name__, **fields})


def save_scheduler(config: Mapping[str, Any], folder: Path) -> None:
    """Write ``folder/scheduler``."""
    write_json(Path(folder) / "scheduler" / "scheduler_config.json", config)


def save_index(folder: Path) -> None:
    """Write ``model_index.json``, which makes the folder a StableDiffusionPipeline for diffusers."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(Path(folder) / "model_index.json", index)


def save_checkpoint(checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a whole checkpoint folder, each file under a temporary name first, the index last."""
    save_vae(checkpoint.vae, folder, latent_space=checkpoint.latent_space, dtype=dtype)
    save_text_encoder(checkpoint.text_encoder, folder, dtype=dtype)
    save_unet(checkpoint.unet, folder, dtype=dtype)
    save_scheduler(checkpoint.scheduler_config, folder)
    if checkpoint.classifier is not None:
        save_classifier(checkpoint.classifier, folder, dtype=dtype)
    if checkpoint.noisy_clip is not None:
        save_noisy_clip(checkpoint.noisy_clip, folder, dtype=dtype)
    save_index(folder)


def checkpoint_folders(roots: Iterable[Path | str]) -> dict[str, Path]:
    """Checkpoint folders by name: the roots that are one, and their sub-folders; the first of a name wins.

    What cannot be read is left out.
    """
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        try:
            inside = sorted(root.iterdir())
        except OSError:
            inside = []
        for path in [root, *inside]:
            if _is_file(path / "model_index.json"):
                found.setdefault(path.name, path)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that cannot be searched
        return False


def emoji_folder() -> Path | None:
    """The bundled ``models/emoji`` beside the library in a clone; None where the library was installed without it."""
    folder = Path(__file__).resolve().parents[2] / "models" / "emoji"
    return folder if (folder / "model_index.json").is_file() else None


def _metadata_json(file: Path, text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The config in the metadata of {file} is not JSON ({error})",
            expected=f"a {what}'s safetensors file",
            mend="download or copy it again",
        ) from error


def _settle(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """To its place, in eval mode, without gradients for its weights (diffusers' own ``to`` warns at every cast)."""
    nn.Module.to(network, device=torch.device(device), dtype=dtype).eval().requires_grad_(False)


def _plain(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    return {"_class_name": class_name, "_diffusers_version": "0.30.0", **json.loads(json.dumps(plain))}
