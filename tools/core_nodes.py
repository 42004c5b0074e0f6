"""What the example workflows need to know of a core node that only a ComfyUI runs: its inputs and outputs, nothing else.

``tests/comfyui`` holds it against a running ComfyUI.
"""

from __future__ import annotations

from typing import Any

from latent_guidance.host.schema import NodeLibrary

MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/",
    "sd_xl_base_1.0.safetensors": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/",
    "DreamShaper_8_pruned.safetensors": "https://huggingface.co/Lykon/DreamShaper/resolve/main/",
}
"""Checkpoint -> the folder that it can be downloaded from, as ComfyUI's own templates give it."""


class CheckpointLoaderSimple:
    """Load Checkpoint."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "only_in_comfyui"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": (list(MODELS), {})}}


def with_core_nodes(library: NodeLibrary) -> NodeLibrary:
    """``library`` and the node above."""
    name = "CheckpointLoaderSimple"
    return NodeLibrary({**library.classes, name: CheckpointLoaderSimple}, {**library.titles, name: "Load Checkpoint"})
