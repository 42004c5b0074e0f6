"""Prompts, pictures and latents: what goes into sampling and what comes out."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..latent_guidance.errors import UserError
from ..latent_guidance.noise import MAX_SEED
from .ranges import check_ranges
from .runtime import current

CATEGORY = "latent guidance/conditioning"

MAX_SIDE = 16384


class LGVAEEncode:
    """VAE Encode (Posterior)."""

    DISPLAY_NAME = "VAE Encode (Posterior)"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Encodes pictures to latents, as the most likely latent (mode) or as a draw from what the VAE thinks possible (sample). "
        "Refuses sizes that the VAE cannot hold instead of cropping them."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["vae encode", "image to latent", "posterior", "encode image"]
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("Latents of the pictures, one per picture.",)
    FUNCTION = "encode"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "VAE 编码（后验）",
        "description": (
            "把图片编码为潜变量：取最可能的潜变量（mode），或从 VAE 的后验分布中抽样（sample）。"
            "尺寸不合适时给出错误，而不是裁剪。"
        ),
        "inputs": {
            "image": ("图片", "要编码的图片，边长须为 VAE 空间倍率（通常为 8）的整数倍。"),
            "vae": ("VAE", "用于编码的 VAE；请与模型来自同一检查点。"),
            "posterior": ("后验", "mode：最可能的潜变量，总是相同；sample：用种子从后验分布抽样。中性值：mode。"),
            "seed": ("种子", "抽样用的种子，第 i 张图片使用 seed + i；mode 时不起作用。范围：0 到 2^64 - 1。"),
        },
        "outputs": (("潜变量", "图片的潜变量，每张图片一个。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The pictures to encode; sides must be multiples of the VAE's spatial ratio, mostly 8."
                    },
                ),
                "vae": ("VAE", {"tooltip": "The VAE to encode with; take it from the checkpoint of the model."}),
                "posterior": (
                    ["mode", "sample"],
                    {
                        "default": "mode",
                        "tooltip": "mode: the most likely latent, always the same. sample: a draw from the posterior, by the seed. "
                        "Neutral: mode.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_SEED,
                        "step": 1,
                        "control_after_generate": True,
                        "tooltip": "Seed of the draw; picture i of the batch has seed + i. Not used by mode. Range: 0 to 2^64 - 1.",
                    },
                ),
            }
        }

    def encode(self, image: Tensor, vae: Any, posterior: str, seed: int) -> tuple[dict[str, Tensor]]:
        check_ranges(self, seed=seed)
        return ({"samples": current().encode_image(vae, image, sample=posterior == "sample", seed=seed)},)


class LGVAEDecode:
    """VAE Decode (Latent Guidance)."""

    DISPLAY_NAME = "VAE Decode (Latent Guidance)"
    CATEGORY = CATEGORY
    DESCRIPTION = "Decodes latents to pictures; refuses latents whose number of channels is not the VAE's."
    SEARCH_ALIASES: ClassVar[list[str]] = ["vae decode", "latent to image"]
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded pictures.",)
    FUNCTION = "decode"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "VAE 解码（Latent Guidance）",
        "description": "把潜变量解码为图片；潜变量通道数与 VAE 不符时报错并说明。",
        "inputs": {
            "samples": ("潜变量", "要解码的潜变量。"),
            "vae": ("VAE", "用于解码的 VAE；请与模型来自同一检查点。"),
        },
        "outputs": (("图片", "解码后的图片。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latents to decode."}),
                "vae": ("VAE", {"tooltip": "The VAE to decode with; take it from the checkpoint of the model."}),
            }
        }

    def decode(self, samples: dict[str, Tensor], vae: Any) -> tuple[Tensor]:
        return (current().decode_latent(vae, samples["samples"]),)


class LGTextEncode:
    """Text Encode."""

    DISPLAY_NAME = "Text Encode"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Encodes a prompt, as CLIP Text Encode does: (words:1.2) weights words, long prompts are split into chunks."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["prompt", "clip text encode", "text"]
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for the positive or negative input of a guider.",)
    FUNCTION = "encode"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "文本编码",
        "description": ("编码提示词，与 CLIP 文本编码相同：(词:1.2) 表示权重，过长的提示词会被分段。"),
        "inputs": {
            "clip": ("CLIP", "用于编码的文本编码器；请与模型来自同一检查点。"),
            "text": ("文本", "提示词；空文本即空条件（中性值）。"),
        },
        "outputs": (("条件", "编码后的提示词，用于引导器的正向或反向条件。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder; take it from the checkpoint of the model."}),
                "text": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "dynamicPrompts": True,
                        "tooltip": "What to draw; (words:1.2) weights words. An empty text is the null condition. Neutral: empty.",
                    },
                ),
            }
        }

    def encode(self, clip: Any, text: str) -> tuple[Any]:
        return (current().encode_text(clip, text),)


class LGNullConditioning:
    """Null Conditioning."""

    DISPLAY_NAME = "Null Conditioning"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The condition that says nothing: the encoding of the empty prompt, which is what the model saw in the place of dropped "
        "captions in training. Use it as negative for classifier-free guidance, or as positive for an unprompted picture."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["null", "unconditional", "empty prompt", "negative"]
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The encoding of the empty prompt; identical to CLIP Text Encode without text.",)
    FUNCTION = "encode"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "空条件",
        "description": (
            "不含任何信息的条件：空提示词的编码，也就是训练中条件被丢弃时模型所见。"
            "可作为无分类器引导的反向条件，或用于无提示词生成。"
        ),
        "inputs": {"clip": ("CLIP", "用于编码的文本编码器；请与模型来自同一检查点。")},
        "outputs": (("条件", "空提示词的编码；与不填文字的“CLIP 文本编码”相同。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"clip": ("CLIP", {"tooltip": "The text encoder; take it from the checkpoint of the model."})}
        }

    def encode(self, clip: Any) -> tuple[Any]:
        return (current().encode_text(clip, ""),)


def _whole(default: int, low: int, high: int, step: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


class LGEmptyLatent:
    """Empty Latent (Any Ratio)."""

    DISPLAY_NAME = "Empty Latent (Any Ratio)"
    CATEGORY = CATEGORY
    DESCRIPTION = "An empty latent for a VAE of any spatial ratio and number of channels."
    SEARCH_ALIASES: ClassVar[list[str]] = ["empty latent", "latent size", "width height"]
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("Zeros of the right shape, to be filled by sampling.",)
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "空潜变量（任意倍率）",
        "description": "适用于任意空间倍率和通道数的空潜变量。",
        "inputs": {
            "width": ("宽度", f"图片宽度（像素），须为空间倍率的整数倍。emoji：128。范围：1 到 {MAX_SIDE}。"),
            "height": ("高度", f"图片高度（像素），须为空间倍率的整数倍。emoji：128。范围：1 到 {MAX_SIDE}。"),
            "channels": ("通道数", "VAE 潜变量的通道数。emoji、SD 1.5 和 SDXL：4；SD3 和 Flux：16。范围：1 到 256。"),
            "spatial_ratio": ("空间倍率", "每个潜变量像素对应的图片像素数。emoji、SD 和 Flux：8。范围：1 到 64。"),
            "batch_size": ("批量", "一次生成多少张图片。范围：1 到 4096。"),
        },
        "outputs": (("潜变量", "形状合适的全零潜变量，由采样填充。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = f"in pixels, a multiple of spatial_ratio. 128 for emoji. Range: 1 to {MAX_SIDE}."
        return {
            "required": {
                "width": _whole(128, 1, MAX_SIDE, 1, f"Width of the picture {side}"),
                "height": _whole(128, 1, MAX_SIDE, 1, f"Height of the picture {side}"),
                "channels": _whole(
                    4,
                    1,
                    256,
                    1,
                    "Channels of the VAE's latents: 4 for emoji, SD 1.5, SDXL; 16 for SD3, Flux. Range: 1 to 256.",
                ),
                "spatial_ratio": _whole(
                    8, 1, 64, 1, "Pixels of the picture per latent pixel: 8 for emoji, SD, SDXL, Flux. Range: 1 to 64."
                ),
                "batch_size": _whole(1, 1, 4096, 1, "How many pictures to make at once. Range: 1 to 4096."),
            }
        }

    def make(
        self, width: int, height: int, channels: int, spatial_ratio: int, batch_size: int
    ) -> tuple[dict[str, Tensor]]:
        import torch

        sizes = dict(width=width, height=height, channels=channels, spatial_ratio=spatial_ratio, batch_size=batch_size)
        check_ranges(self, **sizes)
        if width % spatial_ratio or height % spatial_ratio:
            below = max(1, width // spatial_ratio) * spatial_ratio, max(1, height // spatial_ratio) * spatial_ratio
            raise UserError(
                f"a latent of {width} x {height} pixels at a spatial ratio of {spatial_ratio}",
                expected=f"sides that are multiples of {spatial_ratio}",
                mend=f"set width and height in Empty Latent (Any Ratio), for instance to {below[0]} x {below[1]}",
            )
        return ({"samples": torch.zeros(batch_size, channels, height // spatial_ratio, width // spatial_ratio)},)


NODES: dict[str, type] = {
    "LGVAEEncode": LGVAEEncode,
    "LGVAEDecode": LGVAEDecode,
    "LGTextEncode": LGTextEncode,
    "LGNullConditioning": LGNullConditioning,
    "LGEmptyLatent": LGEmptyLatent,
}
