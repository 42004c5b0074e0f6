"""How much of a network autograd keeps for the way back, in ComfyUI's own estimate of what the way there needs.

    PYTHON benchmarks/comfyui_graphs.py COMFYUI

PYTHON is that ComfyUI's own. Networks of full size without weights (on the device "meta", so in little memory) are called once with a
graph, and the bytes that autograd keeps are counted: each storage once, the network's own parameters not, and the copies of what a network
writes to after autograd has saved it (Flux). Attention is counted as a fused
kernel's: what goes in and what comes out. nodes/runtime/comfy/memory.py has the largest ratios as GRAPH and DECODED; for a CLIP, which
ComfyUI estimates nothing for, it is the numbers kept for each token, layer and number of width: KEPT of picture_clips.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("comfyui", type=Path, help="the folder of a ComfyUI")

_UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
    use_temporal_resblock=False, use_temporal_attention=False,
)  # fmt: skip
NETWORKS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "SD15": (
        _UNET | dict(
            num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], transformer_depth=[1] * 6 + [0] * 2, transformer_depth_middle=1,
            transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768, use_linear_in_transformer=False, adm_in_channels=None,
        ), 768, 0, 64,
    ),
    "SDXL": (
        _UNET | dict(
            num_res_blocks=[2] * 3, channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], num_classes="sequential", adm_in_channels=2816, context_dim=2048,
            use_linear_in_transformer=True,
        ), 2048, 2816, 128,
    ),
    "SD3": (
        dict(
            in_channels=16, out_channels=16, patch_size=2, depth=24, input_size=None, adm_in_channels=2048, num_patches=36864,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            pos_embed_max_size=192, pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
        ), 4096, 2048, 128,
    ),
    "Flux": (
        dict(
            image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
            mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
            guidance_embed=True,
        ), 4096, 768, 128,
    ),
}  # fmt: skip
"""Name of ComfyUI's class of supported_models -> its network's arguments, widths of tokens and pooled text, side of the latent."""
_VAE = dict(
    double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2,
    attn_resolutions=[], dropout=0.0,
)  # fmt: skip


def fuse_attention() -> None:
    """Have every part of ComfyUI call PyTorch's attention, and that keep what a fused kernel keeps."""
    import comfy.ldm.modules.attention as attention  # type: ignore[import-not-found]
    import comfy.ldm.modules.diffusionmodules.model as autoencoders  # type: ignore[import-not-found]
    import comfy.ops  # type: ignore[import-not-found]
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            ctx.save_for_backward(q, k, v, out)
            return out

    def fused(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return Fused.apply(q, k, v)

    torch.nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    comfy.ops.scaled_dot_product_attention = fused
    autoencoders.vae_attention = lambda: autoencoders.pytorch_attention
    for name, module in list(sys.modules.items()):
        for function in ("optimized_attention", "optimized_attention_masked"):
            if name.startswith("comfy.") and hasattr(module, function):
                setattr(module, function, attention.attention_pytorch)


def kept(call: Callable[[], object], network: Any, *, copying: bool = False) -> int:
    """Bytes that autograd keeps of ``call``, without the parameters and buffers of ``network``; ``copying``: with the copies of what is
    changed in place."""
    import torch

    sys.path.append(str(ROOT))
    from latent_guidance.guidance.recorded import CopyBeforeWriting

    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    mode, handles = CopyBeforeWriting(), []

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage()._cdata not in own:
            handles.append(mode.pack(tensor))  # which holds it, so that no two storages have one address
        return tensor

    with (
        torch.enable_grad(),
        mode if copying else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        call()
    storages = [handle.tensor.untyped_storage() for handle in handles if handle.tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def report(name: str, graph: int, estimate: float) -> None:
    print(f"{name}: {graph / 2**20:.0f} MiB kept, {estimate / 2**20:.0f} MiB estimated, ratio {graph / estimate:.2f}")


def main() -> None:
    comfyui = parser.parse_args().comfyui
    sys.path[0], sys.argv = str(comfyui), ["main.py", "--cpu"]
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing()
    import comfy.model_management  # type: ignore[import-not-found]
    import comfy.supported_models  # type: ignore[import-not-found]
    import torch
    from comfy.clip_model import CLIPVisionModelProjection  # type: ignore[import-not-found]
    from comfy.ldm.flux.model import FluxParams  # type: ignore[import-not-found]
    from comfy.ldm.models.autoencoder import AutoencoderKL  # type: ignore[import-not-found]

    fuse_attention()
    meta, half = torch.device("meta"), {"dtype": torch.float16, "device": "meta"}
    for name, (unet, context, pooled, side) in NETWORKS.items():
        newer = {"txt_ids_dims": []} if name == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
        config = getattr(comfy.supported_models, name)(unet | newer)
        config.set_inference_dtype(torch.float16, None)
        model = config.get_model({}, "", device=meta)
        network = model.diffusion_model.requires_grad_(False)
        x = torch.empty(1, unet["in_channels"], side, side, **half).requires_grad_()
        more = {"y": torch.empty(1, pooled, **half)} if pooled else {}
        more |= {"guidance": torch.empty(1, **half)} if unet.get("guidance_embed") else {}
        tokens, time = torch.empty(1, 77, context, **half), torch.zeros(1, device=meta)
        graph = kept(lambda: network(x, time, context=tokens, transformer_options={}, **more), network, copying=True)  # noqa: B023
        # ComfyUI's estimate where attention is fused (BaseModel.memory_required), which on a CPU it is not
        report(
            f"{name} at {8 * side} pixels",
            graph,
            side * side * x.element_size() * 0.01 * model.memory_usage_factor * 2**20,
        )
    with meta:
        vae = AutoencoderKL(ddconfig=_VAE, embed_dim=4).requires_grad_(False)
        latent = torch.empty(1, 4, 64, 64).requires_grad_()
    # ComfyUI's estimate of this VAE (VAE.memory_used_decode)
    report("the VAE at 512 pixels", kept(lambda: vae.decode(latent), vae), 2178 * 64 * 64 * 64 * 4)

    for name, file in (("CLIP-L", "clip_vision_config_vitl.json"), ("CLIP-H", "clip_vision_config_h.json")):
        config = json.loads((comfyui / "comfy" / file).read_text("utf-8"))
        with meta:
            clip = CLIPVisionModelProjection(config, torch.float32, meta, comfy.ops.disable_weight_init)
            picture = torch.empty(1, 3, config["image_size"], config["image_size"]).requires_grad_()
        clip.requires_grad_(False)
        graph = kept(lambda: clip(pixel_values=picture, intermediate_output=-2), clip)  # noqa: B023
        tokens, width = clip.vision_model.embeddings.position_embedding.weight.shape
        report(f"{name}, a picture", graph, tokens * width * config["num_hidden_layers"] * 4)


main()
