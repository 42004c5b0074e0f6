"""CLIPs on clean pictures inside ComfyUI: of an open_clip folder, or made of a CLIP_VISION and the CLIP that belongs to it.

Either is loaded, moved and freed with the model that it guides. Texts are encoded when a loss is made, as CLIP Text Encode does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.nn import functional

from ....latent_guidance.errors import UserError
from ....latent_guidance.models.picture_clip import PictureCLIP
from .gradients import plain_patcher
from .model import WholeModelPatcher

NEAR_IDENTITY = 1e-3
"""A projection that differs from the identity by less than this in every entry was never trained."""
KEPT = 16
"""Numbers that a CLIP's image side keeps for the way back, for each token, layer and number of width: 15.1 in CLIP-L, 10.3 in CLIP-H,
counted by benchmarks/comfyui_graphs.py, and some of 1 for the pass itself."""
_MEND = (
    "load the CLIP from a file that holds its projection (clip_l.safetensors, or CLIP-G of SDXL) and belongs to the CLIP "
    "Vision; or use Load Picture CLIP with an open_clip folder"
)


class OpenCLIPHandle:
    """A CLIP of an open_clip folder whose module ComfyUI's memory management knows of."""

    def __init__(self, loaded: PictureCLIP) -> None:
        self._loaded = loaded
        self.network = loaded.network
        self.image_size, self.mean, self.std = loaded.image_size, loaded.mean, loaded.std
        self.patcher = WholeModelPatcher(
            self.network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def image_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors (B, E) of normalised pictures (B, 3, image_size, image_size)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._loaded.image_features(pictures)

    def graph_used(self, pictures: int) -> float:
        """Bytes that looking at so many ``pictures`` at once takes with a graph; 0, for not known, of a ResNet."""
        visual: Any = getattr(self.network, "visual", None)
        layers = getattr(getattr(visual, "transformer", None), "resblocks", ())
        return _graph_used(getattr(visual, "positional_embedding", None), len(layers), pictures)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, E) of texts."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self._loaded.text_features(texts)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenCLIPHandle:
        return self  # ComfyUI deep-copies options; a network is never copied by accident


class CLIPVisionHandle:
    """A CLIP_VISION's image side with the projected texts of the CLIP that belongs to it.

    Args:
        clip_vision: a ComfyUI CLIP_VISION with a projection.
        clip: a ComfyUI CLIP whose pooled output is projected to the same space.

    Raises:
        UserError: no projection on either side, one of another width, or one that was never trained.
    """

    def __init__(self, clip_vision: Any, clip: Any) -> None:
        image_width = _image_width(clip_vision)
        self._projection = _text_projection(clip, image_width)
        self._clip = clip
        self.patcher = plain_patcher(clip_vision.patcher, "guidance by a CLIP Vision")
        self.network: torch.nn.Module = self.patcher.model
        self.image_size = int(clip_vision.image_size)
        self.mean, self.std = tuple(clip_vision.image_mean), tuple(clip_vision.image_std)

    def image_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors (B, E) of normalised pictures (B, 3, image_size, image_size)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = pictures.to(self.patcher.load_device, torch.float32)
        with norms_of_copies(self.network):
            projected = self.network(pixel_values=pixels, intermediate_output=-2)[2]
        return functional.normalize(projected.float(), dim=1)

    def graph_used(self, pictures: int) -> float:
        """Bytes that looking at so many ``pictures`` at once takes with a graph."""
        tower: Any = getattr(self.network, "vision_model", None)
        embedding = getattr(getattr(tower, "embeddings", None), "position_embedding", None)
        layers = getattr(getattr(tower, "encoder", None), "layers", ())
        return _graph_used(getattr(embedding, "weight", None), len(layers), pictures)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, E) of texts, read as CLIP Text Encode reads them; of long ones the first 75 tokens count."""
        features: list[Tensor] = []
        for text in texts:
            _, pooled = self._clip.encode_from_tokens(self._clip.tokenize(text), return_pooled="unprojected")
            if pooled is None or pooled.shape[-1] != self._projection.shape[1]:
                width = "no pooled output" if pooled is None else f"a pooled output of {pooled.shape[-1]} numbers"
                raise UserError(
                    f"a CLIP of several text encoders, with {width}",
                    expected=f"the pooled output of one CLIP, {self._projection.shape[1]} numbers",
                    mend=_MEND,
                )
            features.append(pooled[:1].float().cpu() @ self._projection.T)
        return functional.normalize(torch.cat(features), dim=1)

    def __deepcopy__(self, memo: dict[int, Any]) -> CLIPVisionHandle:
        return self  # ComfyUI deep-copies options; a network is never copied by accident


def _graph_used(positions: Any, layers: int, pictures: int) -> float:
    """Bytes of the graph of a transformer in fp32 with an embedding (tokens, width) of positions; 0 without one."""
    return KEPT * 4.0 * positions.numel() * layers * pictures if isinstance(positions, Tensor) else 0.0


@contextmanager
def norms_of_copies(network: torch.nn.Module) -> Iterator[None]:
    """In this context the layer norms of ``network`` read a copy: ComfyUI's CLIP adds to what they read in place, and autograd needs it."""

    def copied(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)

    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(copied) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _image_width(clip_vision: Any) -> int:
    weight = getattr(getattr(getattr(clip_vision, "model", None), "visual_projection", None), "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(
            "a CLIP Vision without a projection to the space of texts (SigLIP, DINO)",
            expected="the image side of a CLIP, such as CLIP-ViT-L or CLIP-ViT-H",
            mend="load another file in Load CLIP Vision, or use Load Picture CLIP",
        )
    return int(weight.shape[0])


def _text_projection(clip: Any, width: int) -> Tensor:
    """The trained projection (E, D) of the pooled text of a CLIP, in fp32 on the CPU; refused if it is none or another's."""
    model = getattr(clip, "cond_stage_model", None)
    names = [name for name in (getattr(model, "clip", None), "clip_g", "clip_l") if isinstance(name, str)]
    towers = [tower for name in names if (tower := getattr(model, name, None)) is not None]
    weight = (
        getattr(getattr(getattr(towers[0], "transformer", None), "text_projection", None), "weight", None)
        if towers
        else None
    )
    if not isinstance(weight, Tensor):
        raise UserError("a text encoder that is no CLIP", expected="the CLIP of the CLIP Vision", mend=_MEND)
    projection = weight.detach().float().cpu().clone()
    if projection.shape[0] != width:
        raise UserError(
            f"a CLIP whose texts are vectors of {projection.shape[0]} numbers, with a CLIP Vision whose pictures are vectors of {width}",
            expected="the text and the image side of one CLIP",
            mend=_MEND,
        )
    flat = not bool(torch.isfinite(projection).all()) or not bool(projection.any())
    square = projection.shape[0] == projection.shape[1]
    if flat or (square and float((projection - torch.eye(width)).abs().max()) < NEAR_IDENTITY):
        raise UserError(
            "a CLIP without its text projection (what stands in its place is the identity, zeros or no numbers)",
            expected="a CLIP whose texts are projected to the space of pictures; that of a Stable Diffusion 1.5 checkpoint is not",
            mend=_MEND,
        )
    return projection
