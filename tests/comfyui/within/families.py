"""Files of the model families that people have, with random weights: for scripts that run inside a ComfyUI.

Every family is what its published files are (their keys, shapes, layout), so that ComfyUI's stock loaders detect it, give it its own
network class, latent format and noise levels. Stable Diffusion 1.5 is whole, with VAE and text encoder; the others have as few blocks
as ComfyUI's detection allows. Weights are fp16, drawn anew from a fixed seed: of a size that keeps activations near one.
"""

# ruff: noqa: ANN001, ANN201, ANN202
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.models.autoencoder import AutoencoderKL
from safetensors.torch import save_file

_UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
    use_temporal_resblock=False, use_temporal_attention=False,
)  # fmt: skip
_SDXL = dict(num_classes="sequential", adm_in_channels=2816, context_dim=2048, use_linear_in_transformer=True)
_FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
    mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a family's file holds and what ComfyUI must make of it.

    Attributes:
        detected: ComfyUI's class of supported_models.
        model: its class of model_base.
        latents: its latent format.
        unet: arguments of its network.
        context: width of the tokens of its text encoders.
        pooled: width of their pooled text; 0 if it takes none.
        checkpoint: whether the file is a checkpoint ("model.diffusion_model." and more) or a diffusion model alone.
        whole: with VAE and text encoder.
        flow: whether it is a rectified flow.
    """

    detected: str
    model: str
    latents: str
    unet: dict[str, Any] = field(hash=False)
    context: int
    pooled: int
    checkpoint: bool = True
    whole: bool = False
    flow: bool = False


FAMILIES = {
    "sd15": Family(
        detected="SD15", model="BaseModel", latents="SD15", context=768, pooled=0, whole=True,
        unet=_UNET | dict(
            num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768,
            use_linear_in_transformer=False, adm_in_channels=None,
        ),
    ),
    "sdxl": Family(  # the depths of Segmind Vega, the shallowest that is detected as SDXL
        detected="Segmind_Vega", model="SDXL", latents="SDXL", context=2048, pooled=1280,
        unet=_UNET | _SDXL | dict(
            num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 1, 1, 2, 2],
            transformer_depth_middle=1, transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1],
        ),
    ),
    "sd3": Family(  # width and depth are one number to ComfyUI's detection: 6 blocks of 384 channels, against 24 of 1536
        detected="SD3", model="SD3", latents="SD3", context=4096, pooled=2048, flow=True,
        unet=dict(
            in_channels=16, out_channels=16, patch_size=2, depth=6, input_size=None, adm_in_channels=2048,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 384}},
            num_patches=36864, pos_embed_max_size=192, pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
        ),
    ),
    "flux": Family(
        detected="Flux", model="Flux", latents="Flux", context=4096, pooled=768, flow=True, checkpoint=False,
        unet=_FLUX | dict(guidance_embed=True),
    ),
    "schnell": Family(
        detected="FluxSchnell", model="Flux", latents="Flux", context=4096, pooled=768, flow=True, checkpoint=False,
        unet=_FLUX | dict(guidance_embed=False),
    ),
}  # fmt: skip

_VAE = dict(
    double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2,
    attn_resolutions=[], dropout=0.0,
)  # fmt: skip


def _shapes(module, prefix, start=""):
    """Key in the file -> shape, of ``module``'s weights."""
    return {
        prefix + name.removeprefix(start): tuple(value.shape)
        for name, value in module.state_dict().items()
        if name.startswith(start)
    }


def _network(family):
    """A family's network as ComfyUI makes it, without memory for its weights."""
    newer = {"txt_ids_dims": []} if family.model == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    config = getattr(comfy.supported_models, family.detected)(family.unet | newer)
    config.set_inference_dtype(torch.float16, None)
    return config.get_model({}, "", device=torch.device("meta")).diffusion_model


def shapes(family):
    """Key -> shape, of a family's whole file."""
    found = _shapes(_network(family), "model.diffusion_model." if family.checkpoint else "")
    # newer ComfyUIs rename these of Flux when they load a file
    found = {
        key.replace("_norm.weight", "_norm.scale") if family.model == "Flux" else key: v for key, v in found.items()
    }
    if family.whole:
        with torch.device("meta"):
            vae = AutoencoderKL(ddconfig=_VAE, embed_dim=4)
        text = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text("utf-8"))
        operations = comfy.ops.disable_weight_init
        clip = comfy.clip_model.CLIPTextModel(text, torch.float16, "meta", operations)
        found |= _shapes(vae, "first_stage_model.")
        found |= _shapes(clip, "cond_stage_model.transformer.text_model.", "text_model.")
    return found


def _random(key, shape):
    """A weight: ones for norms, zeros for biases, else normal with the variance that keeps a layer's output at one."""
    if key.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    if len(shape) <= 1:
        return torch.ones(shape, dtype=torch.float16)
    scale = 0.02 if "embedding" in key or key.endswith("pos_embed") else math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.float16).normal_(std=scale)


def make(name, folder):
    """The file of a family in ``folder``, which ComfyUI then knows of; made where there is none yet. Its name."""
    family, file = FAMILIES[name], Path(folder) / f"{name}.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        part = file.with_suffix(".part")
        save_file({key: _random(key, shape) for key, shape in shapes(family).items()}, part)
        part.rename(file)
    for kind in ("checkpoints", "diffusion_models"):  # UNETLoader takes the network out of a checkpoint, too
        folder_paths.add_model_folder_path(kind, str(folder))
    return file.name


def condition(name, seed, tokens=16):
    """CONDITIONING such as a family's text encoders give, of random numbers."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    more = {"pooled_output": torch.randn(1, family.pooled, generator=generator)} if family.pooled else {}
    return [[torch.randn(1, tokens, family.context, generator=generator), more]]
