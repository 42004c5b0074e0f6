"""The runtime inside ComfyUI. This folder holds the only code of the project that imports ``comfy``.

Importing it costs nothing beyond ComfyUI itself: what loads models or samples is imported where it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ..base import Kind
from ..names import BUNDLED, CLIP_VISION, OWN_FOLDERS, find, locate

CHECKPOINTS = "latent_guidance"


def register_folders() -> None:
    """Tell ComfyUI of models/latent_guidance (checkpoint folders), latent_classifiers and latent_clips, once."""
    for name in (CHECKPOINTS, *OWN_FOLDERS.values()):
        if folder_paths.folder_names_and_paths.get(name, ((), None))[1] == {".safetensors"}:
            continue
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name), is_default=False)
        paths, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, {".safetensors"})


def _found(kind: Kind) -> dict[str, Path]:
    if kind == "picture_clip":
        return find(kind, [], [Path(path) for path in folder_paths.get_folder_paths(CLIP_VISION)])
    register_folders()
    names = [CHECKPOINTS, *([OWN_FOLDERS[kind]] if kind in OWN_FOLDERS else [])]
    checkpoints, *own = ([Path(path) for path in folder_paths.get_folder_paths(name)] for name in names)
    return find(kind, [BUNDLED, *checkpoints], own[0] if own else [])


def names(kind: Kind) -> list[str]:
    return list(_found(kind))


def load_checkpoint(name: str) -> tuple[Any, Any, Any]:
    from . import checkpoint

    folder = locate("checkpoint", name, _found("checkpoint"))
    return checkpoint.load_model(folder), checkpoint.load_clip(folder), checkpoint.load_vae(folder)


def load_vae(name: str) -> Any:
    from . import checkpoint

    return checkpoint.load_vae(locate("vae", name, _found("vae")))


def load_text_encoder(name: str) -> Any:
    from . import checkpoint

    return checkpoint.load_clip(locate("text_encoder", name, _found("text_encoder")))


def load_unet(name: str) -> Any:
    from . import checkpoint

    return checkpoint.load_model(locate("unet", name, _found("unet")).parent)


def load_classifier(name: str) -> Any:
    from . import checkpoint

    return checkpoint.load_classifier(locate("classifier", name, _found("classifier")))


def load_noisy_clip(name: str) -> Any:
    from . import checkpoint

    return checkpoint.load_noisy_clip(locate("noisy_clip", name, _found("noisy_clip")))


def load_picture_clip(name: str) -> Any:
    from ....latent_guidance.models.picture_clip import load_picture_clip
    from .picture_clips import OpenCLIPHandle

    return OpenCLIPHandle(load_picture_clip(locate("picture_clip", name, _found("picture_clip"))))


def picture_clip(clip_vision: Any, clip: Any) -> Any:
    from .picture_clips import CLIPVisionHandle

    return CLIPVisionHandle(clip_vision, clip)


def encode_text(clip: Any, text: str) -> Any:
    from .text import encode

    return encode(clip, text)


def encode_image(vae: Any, image: Tensor, *, sample: bool, seed: int) -> Tensor:
    from .vae import encode

    return encode(vae, image, sample=sample, seed=seed)


def decode_latent(vae: Any, samples: Tensor) -> Tensor:
    from .vae import decode

    return decode(vae, samples)


def decoder(vae: Any) -> Any:
    from .decoding import Decoder

    return Decoder(vae)


def make_guider(model: Any, positive: Any, negative: Any | None, rules: Sequence[Any], *, report: bool = False) -> Any:
    from .guider import make_guider

    return make_guider(model, positive, negative, rules, report=report)


def guider_passes(guider: Any, sigmas: Tensor | None = None) -> Any:
    from .guider import guider_passes

    return guider_passes(guider, sigmas)


def patch_model(model: Any, rules: Sequence[Any], *, report: bool = False) -> Any:
    from .patch import patch_model

    return patch_model(model, rules, report=report)


def make_sampler(function: Callable[..., Tensor], options: Mapping[str, Any], step_rules: Sequence[Any] = ()) -> Any:
    from .sampling import make_sampler

    return make_sampler(function, options, step_rules)


def seeded_noise(seeds: Sequence[int]) -> Any:
    from .sampling import Noise

    return Noise(seeds)


def show_text(text: str) -> None:
    from .canvas import show_text

    show_text(text)
