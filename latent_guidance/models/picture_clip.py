"""A CLIP on clean pictures, from a folder as open_clip writes it to a hub: open_clip_config.json and open_clip_model.safetensors.

Any CLIP of open_clip's own towers is read (vision transformers and ResNets, CLIP's vocabulary). Towers that come from timm or
transformers, and other vocabularies, are refused: open_clip would fetch files for them.

Reference: arXiv 2103.00020 (CLIP), 2212.07143 (open_clip).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError, shown
from .building import loaded
from .configs import is_number, is_whole
from .files import read_json, refuse_pickle
from .text_encoder import VOCABULARY
from .tokenizer import MAX_CHARACTERS

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What OpenAI's CLIP takes off pictures in [0, 1] and divides them by, where the config does not say."""
_BOUNDS: dict[str, dict[str, tuple[int, int]]] = {
    "vision_cfg": {"image_size": (8, 4096), "width": (1, 16384), "patch_size": (1, 1024), "head_width": (1, 4096)},
    "text_cfg": {
        "context_length": (3, 4096),
        "vocab_size": (VOCABULARY, VOCABULARY),
        "width": (1, 16384),
        "heads": (1, 1024),
        "layers": (1, 1024),
    },
}
_REQUIRED = {"vision_cfg": ("image_size", "width", "layers"), "text_cfg": ("width", "heads", "layers")}
_FOREIGN = ("timm_", "hf_", "tokenizer_")


@dataclass(frozen=True)
class PictureCLIPConfig:
    """What a CLIP is and how it wants its pictures.

    Attributes:
        model: open_clip's ``model_cfg``, checked.
        mean: What is taken off pictures in [0, 1], per channel.
        std: What they are divided by after that.
    """

    model: Mapping[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def image_size(self) -> int:
        """Side of the pictures that it looks at, in pixels."""
        return int(self.model["vision_cfg"]["image_size"])

    @property
    def context_length(self) -> int:
        """Tokens of a text, begin and end included."""
        return int(self.model["text_cfg"].get("context_length", 77))


def parse_config(values: Mapping[str, Any], where: str) -> PictureCLIPConfig:
    """The config in the contents of an open_clip_config.json.

    Raises:
        UserError: it describes no CLIP that can be built from open_clip's own towers.
    """
    model, preprocess = values.get("model_cfg"), values.get("preprocess_cfg", {})
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise _bad(where, f"model_cfg is {shown(model)} and preprocess_cfg {shown(preprocess)}", "two JSON objects")
    if not is_whole(model.get("embed_dim"), 1, 16384):
        raise _bad(where, f"embed_dim is {shown(model.get('embed_dim'))}", "a whole number from 1 to 16384")
    if model.get("custom_text") or "multimodal_cfg" in model:
        raise _bad(where, "a custom text tower (custom_text, multimodal_cfg)", "a CLIP of open_clip's own two towers")
    for part, bounds in _BOUNDS.items():
        _check_tower(model.get(part), part, bounds, where)
    triples = [preprocess.get(name, default) for name, default in (("mean", MEAN), ("std", STD))]
    for name, triple in zip(("mean", "std"), triples, strict=True):
        numbers = isinstance(triple, list | tuple) and len(triple) == 3 and all(map(is_number, triple))
        if not numbers or (name == "std" and min(triple) <= 0):
            raise _bad(where, f"preprocess_cfg.{name} is {shown(triple)}", "three numbers, above 0 for std")
    (m0, m1, m2), (s0, s1, s2) = triples
    return PictureCLIPConfig(model, (float(m0), float(m1), float(m2)), (float(s0), float(s1), float(s2)))


def _check_tower(tower: Any, part: str, bounds: Mapping[str, tuple[int, int]], where: str) -> None:
    if not isinstance(tower, dict):
        raise _bad(where, f"{part} is {shown(tower)}", "a JSON object")
    foreign = [name for name, value in tower.items() if name.startswith(_FOREIGN) and value]
    if foreign:
        raise _bad(
            where, f"{part} has {foreign[0]} = {shown(tower[foreign[0]])}", "a tower and a tokenizer of open_clip's own"
        )
    for name, (low, high) in bounds.items():
        if name in tower and not is_whole(tower[name], low, high):
            wanted = f"{low}, CLIP's vocabulary" if low == high else f"a whole number from {low} to {high}"
            raise _bad(where, f"{part}.{name} is {shown(tower[name])}", wanted)
    if lacking := [name for name in _REQUIRED[part] if name not in tower]:
        raise _bad(where, f"{part} has no {lacking[0]}", "the config that came with the weights")
    layers = tower["layers"]
    if not all(is_whole(count, 1, 1024) for count in (layers if isinstance(layers, list) else [layers])):
        raise _bad(where, f"{part}.layers is {shown(layers)}", "a whole number from 1 to 1024, or four for a ResNet")


def _bad(where: str, found: str, expected: str) -> UserError:
    return UserError(
        f"{where}, in which {found}",
        expected=expected,
        mend="use a CLIP such as ViT-B-32 or ViT-L-14 from open_clip, with the config that came with it",
    )


class PictureCLIP:
    """A CLIP as losses see it.

    Args:
        network: open_clip's CLIP; used in eval mode, in its own precision.
        config: its config.
    """

    def __init__(self, network: Any, config: PictureCLIPConfig) -> None:
        self.network: nn.Module = network.eval().requires_grad_(False)
        self._clip: Any = network
        self.config = config
        self.image_size, self.mean, self.std = config.image_size, config.mean, config.std

    def image_features(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, image_size, image_size), less mean and divided by std -> unit vectors (B, E), differentiable."""
        weight = self._clip.positional_embedding
        return functional.normalize(self._clip.encode_image(pictures.to(weight.device, weight.dtype)), dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (N, E). What is longer than the context (77 tokens, mostly) is cut off.

        Raises:
            UserError: a text of more than 2**18 characters.
        """
        if long := [text for text in texts if len(text) > MAX_CHARACTERS]:
            raise UserError(
                f"a text of {len(long[0]):,} characters", expected=f"at most {MAX_CHARACTERS:,}", mend="shorten it"
            )
        from open_clip.tokenizer import SimpleTokenizer

        ids: Tensor = SimpleTokenizer(context_length=self.config.context_length)(list(texts))
        return functional.normalize(self._clip.encode_text(ids.to(self._clip.positional_embedding.device)), dim=1)


def new_picture_clip(config: PictureCLIPConfig) -> Any:
    """open_clip's CLIP with fresh random weights (from torch's global generator)."""
    from open_clip.model import CLIP

    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "nonscalar_logit_scale")
    return CLIP(**{name: config.model[name] for name in known if name in config.model})


def picture_clip_weights(path: Path | str) -> Path:
    """The weights of an open_clip folder, or ``path`` itself if it is a safetensors file.

    Raises:
        UserError: there are none, or only pickled ones, which are not opened.
    """
    path = Path(path)
    if path.is_file():
        refuse_pickle(path)
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        refuse_pickle(file)
    raise UserError(
        f"{path} holds no weights of a CLIP" if path.is_dir() else f"{path} was not found",
        expected=f"an open_clip folder: {CONFIG} and {WEIGHTS[0]}",
        mend="copy the whole folder from where the CLIP came from",
    )


def _need_open_clip(weights: Path) -> None:
    """Say what to install: ComfyUI does not bring open_clip along, and the node pack needs it for nothing else."""
    try:
        import open_clip  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(
            f"{weights}, a CLIP in open_clip's own layout, and no package open_clip ({error})",
            expected="open_clip_torch, in the Python that runs this program",
            mend="run `python -m pip install open_clip_torch` with that Python; in ComfyUI, Picture CLIP from CLIP Vision works without it",
        ) from error


def load_picture_clip(path: Path | str, *, device: torch.device | str = "cpu") -> PictureCLIP:
    """Load a CLIP from an open_clip folder, or from its safetensors file with the config beside it; in fp32.

    Raises:
        UserError: a file is missing, pickled, damaged, or does not belong to its config.
    """
    weights = picture_clip_weights(path)
    file = weights.parent / CONFIG
    if not file.is_file():
        raise UserError(
            f"{weights} without an {CONFIG} beside it",
            expected=f"an open_clip folder: {CONFIG} and {WEIGHTS[0]}",
            mend=f"copy {CONFIG} into the same folder; a CLIP Vision file alone reads no texts, use Picture CLIP from CLIP Vision",
        )
    config = parse_config(read_json(file), str(file))
    _need_open_clip(weights)

    def trial(network: Any) -> None:
        network.encode_image(torch.zeros(1, 3, config.image_size, config.image_size))
        network.encode_text(torch.zeros(1, config.context_length, dtype=torch.long))

    network = loaded("CLIP", weights, lambda: new_picture_clip(config), module=lambda clip: clip, trial=trial)
    return PictureCLIP(nn.Module.to(network, device=torch.device(device), dtype=torch.float32), config)
