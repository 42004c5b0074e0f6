"""What the example workflows need to know of core nodes that only a ComfyUI runs: their inputs and outputs, nothing else.

``tests/comfyui`` holds it against a running ComfyUI.
"""

from __future__ import annotations

from typing import Any

from latent_guidance.host.schema import NodeLibrary

MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/",
    "sd_xl_base_1.0.safetensors": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/",
    "DreamShaper_8_pruned.safetensors": "https://huggingface.co/Lykon/DreamShaper/resolve/main/",
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": "https://huggingface.co/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/",
}
"""Checkpoint -> the folder that it can be downloaded from, as ComfyUI's own templates and examples give it."""
CLIP = "clip-vit-large-patch14.safetensors"
"""OpenAI's CLIP ViT-L/14, whole, with both of its sides: a name that users give the file."""


class CheckpointLoaderSimple:
    """Load Checkpoint."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "only_in_comfyui"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": (list(MODELS), {})}}


class CLIPVisionLoader:
    """Load CLIP Vision."""

    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "only_in_comfyui"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip_name": ([CLIP], {})}}


class CLIPLoader:
    """Load CLIP."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "only_in_comfyui"
    CATEGORY = "advanced/loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"clip_name": ([CLIP], {}), "type": (["stable_diffusion", "sd3"], {})}
        return {"required": required, "optional": {"device": (["default", "cpu"], {"advanced": True})}}


class SolidMask:
    """A mask of one value."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "only_in_comfyui"
    CATEGORY = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 512, "min": 1, "max": 16384, "step": 1}
        value = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {"required": {"value": ("FLOAT", value), "width": ("INT", side), "height": ("INT", side)}}


class MaskComposite:
    """One mask put onto another."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "only_in_comfyui"
    CATEGORY = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        place = {"default": 0, "min": 0, "max": 16384, "step": 1}
        required = {"destination": ("MASK", {}), "source": ("MASK", {}), "x": ("INT", place), "y": ("INT", place)}
        return {"required": {**required, "operation": (["multiply", "add", "subtract", "and", "or", "xor"], {})}}


CORE = {cls.__name__: cls for cls in (CheckpointLoaderSimple, CLIPVisionLoader, CLIPLoader, SolidMask, MaskComposite)}
"""Node id -> what is said of it here."""
TITLES = {
    "CheckpointLoaderSimple": "Load Checkpoint",
    "CLIPVisionLoader": "Load CLIP Vision",
    "CLIPLoader": "Load CLIP",
}


def with_core_nodes(library: NodeLibrary) -> NodeLibrary:
    """``library`` and the nodes above."""
    return NodeLibrary({**library.classes, **CORE}, {**library.titles, **TITLES})
