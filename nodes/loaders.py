"""Loading checkpoint folders, their parts, and networks on noisy latents."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from .runtime import current
from .runtime.base import Kind

CATEGORY = "latent guidance/loaders"

_FOLDER_HELP = "Folders in models/latent_guidance, and the emoji model that comes with the pack."
_FOLDER_HELP_ZH = "models/latent_guidance 中的文件夹，以及节点包自带的 emoji 模型。"


def _combo(kind: Kind, tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return current().names(kind), {"tooltip": tooltip}


class LGLoadCheckpoint:
    """Load Checkpoint Folder."""

    DISPLAY_NAME = "Load Checkpoint Folder"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads MODEL, CLIP and VAE of a checkpoint folder (diffusers layout). They are ordinary ComfyUI objects: every sampler, "
        "guider and patch works on them. (Where ComfyUI has no network of the UNet's architecture, nodes that reach into it do nothing, "
        "which a warning says.) The emoji model that comes with the pack is there from the start."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["checkpoint", "load model", "diffusers", "emoji"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The UNet with its noise schedule, for a guider or KSampler.",
        "The text encoder, for Text Encode or CLIP Text Encode.",
        "The autoencoder, for encoding and decoding pictures.",
    )
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载检查点文件夹",
        "description": (
            "从检查点文件夹（diffusers 结构）加载 MODEL、CLIP 和 VAE。"
            "它们是普通的 ComfyUI 对象，可用于所有采样器、引导器和补丁"
            "（若 ComfyUI 没有该 UNet 架构的网络类，则深入网络内部的补丁与 ControlNet 不起作用，日志会有警告）。"
            "节点包自带的 emoji 模型开箱即用。"
        ),
        "inputs": {"checkpoint": ("检查点", "要加载的检查点文件夹。" + _FOLDER_HELP_ZH)},
        "outputs": (
            ("模型", "UNet 及其噪声调度，用于引导器或 KSampler。"),
            ("CLIP", "文本编码器，用于“文本编码”或“CLIP 文本编码”。"),
            ("VAE", "自编码器，用于图片的编码与解码。"),
        ),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"checkpoint": _combo("checkpoint", "The checkpoint folder to load. " + _FOLDER_HELP)}}

    def load(self, checkpoint: str) -> tuple[Any, Any, Any]:
        return current().load_checkpoint(checkpoint)


class LGLoadVAE:
    """Load VAE (Folder)."""

    DISPLAY_NAME = "Load VAE (Folder)"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads only the VAE of a checkpoint folder."
    SEARCH_ALIASES: ClassVar[list[str]] = ["vae", "autoencoder"]
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The autoencoder, for encoding and decoding pictures.",)
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载 VAE（文件夹）",
        "description": "只加载检查点文件夹中的 VAE。",
        "inputs": {"checkpoint": ("检查点", "从哪个检查点文件夹加载 VAE。" + _FOLDER_HELP_ZH)},
        "outputs": (("VAE", "自编码器，用于图片的编码与解码。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"checkpoint": _combo("vae", "The folder whose VAE to load. " + _FOLDER_HELP)}}

    def load(self, checkpoint: str) -> tuple[Any]:
        return (current().load_vae(checkpoint),)


class LGLoadTextEncoder:
    """Load Text Encoder."""

    DISPLAY_NAME = "Load Text Encoder"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads only the text encoder of a checkpoint folder."
    SEARCH_ALIASES: ClassVar[list[str]] = ["clip", "text encoder", "load clip"]
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoder, for Text Encode or CLIP Text Encode.",)
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载文本编码器",
        "description": "只加载检查点文件夹中的文本编码器。",
        "inputs": {"checkpoint": ("检查点", "从哪个检查点文件夹加载文本编码器。" + _FOLDER_HELP_ZH)},
        "outputs": (("CLIP", "文本编码器，用于“文本编码”或“CLIP 文本编码”。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "The folder whose text encoder to load. " + _FOLDER_HELP
        return {"required": {"checkpoint": _combo("text_encoder", tooltip)}}

    def load(self, checkpoint: str) -> tuple[Any]:
        return (current().load_text_encoder(checkpoint),)


class LGLoadUNet:
    """Load UNet (Folder)."""

    DISPLAY_NAME = "Load UNet (Folder)"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads only the UNet of a checkpoint folder, with its noise schedule."
    SEARCH_ALIASES: ClassVar[list[str]] = ["unet", "diffusion model", "load diffusion model"]
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The UNet with its noise schedule, for a guider or KSampler.",)
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载 UNet（文件夹）",
        "description": "只加载检查点文件夹中的 UNet 及其噪声调度。",
        "inputs": {"checkpoint": ("检查点", "从哪个检查点文件夹加载 UNet。" + _FOLDER_HELP_ZH)},
        "outputs": (("模型", "UNet 及其噪声调度，用于引导器或 KSampler。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"checkpoint": _combo("unet", "The folder whose UNet to load. " + _FOLDER_HELP)}}

    def load(self, checkpoint: str) -> tuple[Any]:
        return (current().load_unet(checkpoint),)


class LGLoadClassifier:
    """Load Noisy-Latent Classifier."""

    DISPLAY_NAME = "Load Noisy-Latent Classifier"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a classifier that reads noisy latents, for Classifier Guidance. It fits every model on the VAE that it was trained "
        "on, whatever that model predicts; latents of other channels or of another scaling factor are refused. After a run the node "
        "shows the classifier's labels. emoji knows nine groups and steers well; emoji/classifier_subgroups knows 99 finer ones "
        "from few pictures each, and many pictures miss."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["classifier", "classifier guidance", "labels"]
    RETURN_TYPES = ("LG_CLASSIFIER", "STRING")
    RETURN_NAMES = ("classifier", "labels")
    OUTPUT_TOOLTIPS = (
        "The classifier, for Classifier Guidance and Class Probabilities.",
        "Its labels, one per line: what the label input of Classifier Guidance takes. Preview as Text shows them too.",
    )
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载带噪潜变量分类器",
        "description": (
            "加载一个读取带噪潜变量的分类器，用于分类器引导。它适用于同一 VAE 上的任何模型；"
            "通道数或缩放系数不同的潜变量会被拒绝。运行后，节点上会显示分类器的标签。"
            "emoji 认得九个大类，引导效果好；emoji/classifier_subgroups 认得 99 个小类，每类图片很少，引导常常落空。"
        ),
        "inputs": {
            "classifier": (
                "分类器",
                "models/latent_classifiers 中的分类器，以及检查点文件夹自带的分类器（emoji 为节点包自带）。",
            )
        },
        "outputs": (
            ("分类器", "分类器，用于“分类器引导”与“类别概率”。"),
            ("标签", "它的标签，每行一个：即“分类器引导”的标签输入所接受的内容；也可用“预览文本”查看。"),
        ),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A classifier in models/latent_classifiers, or one inside a checkpoint folder; emoji is the one that comes with the pack."
        return {"required": {"classifier": _combo("classifier", tooltip)}}

    def load(self, classifier: str) -> tuple[Any, str]:
        loaded = current().load_classifier(classifier)
        labels = "\n".join(cast(tuple[str, ...], loaded.config.labels))
        current().show_text(labels)
        return loaded, labels


class LGLoadNoisyCLIP:
    """Load Noisy-Latent CLIP."""

    DISPLAY_NAME = "Load Noisy-Latent CLIP"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a CLIP that reads noisy latents, for Noisy-Latent CLIP Guidance. It fits every model on the VAE that it was trained on, and "
        "takes prompts that were encoded by the text encoder that it was trained with; other latents and other encodings are refused."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["noisy clip", "clip guidance", "glide", "noised clip"]
    RETURN_TYPES = ("LG_NOISY_CLIP",)
    RETURN_NAMES = ("noisy_clip",)
    OUTPUT_TOOLTIPS = ("The noisy-latent CLIP, for Noisy-Latent CLIP Guidance.",)
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载带噪潜变量 CLIP",
        "description": (
            "加载一个读取带噪潜变量的 CLIP，用于带噪潜变量 CLIP 引导。它适用于同一 VAE 上的任何模型，"
            "提示词须由其训练所用的文本编码器编码；其他潜变量或其他编码会被拒绝。"
        ),
        "inputs": {
            "noisy_clip": (
                "带噪 CLIP",
                "models/latent_clips 中的带噪潜变量 CLIP，以及检查点文件夹自带的（emoji 为节点包自带）。",
            )
        },
        "outputs": (("带噪 CLIP", "带噪潜变量 CLIP，用于“带噪潜变量 CLIP 引导”。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A CLIP in models/latent_clips, or one inside a checkpoint folder; emoji is the one that comes with the pack."
        return {"required": {"noisy_clip": _combo("noisy_clip", tooltip)}}

    def load(self, noisy_clip: str) -> tuple[Any]:
        return (current().load_noisy_clip(noisy_clip),)


class LGLoadPictureCLIP:
    """Load Picture CLIP."""

    DISPLAY_NAME = "Load Picture CLIP"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a CLIP that looks at clean pictures and reads texts, for Loss: Text (CLIP): a folder with open_clip_config.json and "
        "open_clip_model.safetensors, as open_clip publishes them (ViT-B-32, ViT-L-14)."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["clip", "open_clip", "clip guidance", "clip vision"]
    RETURN_TYPES = ("LG_PICTURE_CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The CLIP, for Loss: Text (CLIP).",)
    FUNCTION = "load"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "加载图像 CLIP",
        "description": (
            "加载一个读取清晰图像与文字的 CLIP，用于“损失：文字（CLIP）”：含有 open_clip_config.json 和 "
            "open_clip_model.safetensors 的文件夹，即 open_clip 的发布形式（ViT-B-32、ViT-L-14）。"
        ),
        "inputs": {
            "picture_clip": (
                "图像 CLIP",
                "models/clip_vision 中的 open_clip 文件夹。需要 `pip install open_clip_torch`；“由 CLIP 视觉组成图像 CLIP”则不需要。",
            )
        },
        "outputs": (("图像 CLIP", "图像 CLIP，用于“损失：文字（CLIP）”。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "An open_clip folder in models/clip_vision. Needs `pip install open_clip_torch`; Picture CLIP from CLIP Vision does not."
        return {"required": {"picture_clip": _combo("picture_clip", tooltip)}}

    def load(self, picture_clip: str) -> tuple[Any]:
        return (current().load_picture_clip(picture_clip),)


class LGPictureCLIP:
    """Picture CLIP from CLIP Vision."""

    DISPLAY_NAME = "Picture CLIP from CLIP Vision"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Joins a CLIP Vision and the CLIP that it was trained with, for Loss: Text (CLIP). The CLIP must hold its text projection, as "
        "clip_l.safetensors does; that of a Stable Diffusion 1.5 checkpoint does not. Vectors of equal length from two different CLIPs "
        "(OpenAI's and LAION's ViT-L) cannot be told apart: take both from the same one."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["clip vision", "clip guidance", "clip_l", "image encoder"]
    RETURN_TYPES = ("LG_PICTURE_CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The CLIP, for Loss: Text (CLIP).",)
    FUNCTION = "join"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "由 CLIP 视觉组成图像 CLIP",
        "description": (
            "把 CLIP 视觉模型与同一个 CLIP 的文本编码器合在一起，用于“损失：文字（CLIP）”。文本编码器必须含有文本投影，"
            "例如 clip_l.safetensors；Stable Diffusion 1.5 检查点中的没有。向量长度相同但来自不同 CLIP 的两部分"
            "（如 OpenAI 与 LAION 的 ViT-L）无法识别：请取自同一个 CLIP。"
        ),
        "inputs": {
            "clip_vision": ("CLIP 视觉", "CLIP 的图像部分，来自“加载 CLIP 视觉”。"),
            "clip": ("CLIP", "同一个 CLIP 的文本部分，且含有文本投影。"),
        },
        "outputs": (("图像 CLIP", "图像 CLIP，用于“损失：文字（CLIP）”。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip_vision": ("CLIP_VISION", {"tooltip": "The image side of a CLIP, from Load CLIP Vision."}),
                "clip": ("CLIP", {"tooltip": "The text side of the same CLIP, with its text projection."}),
            }
        }

    def join(self, clip_vision: Any, clip: Any) -> tuple[Any]:
        return (current().picture_clip(clip_vision, clip),)


NODES: dict[str, type] = {
    "LGLoadCheckpoint": LGLoadCheckpoint,
    "LGLoadVAE": LGLoadVAE,
    "LGLoadTextEncoder": LGLoadTextEncoder,
    "LGLoadUNet": LGLoadUNet,
    "LGLoadClassifier": LGLoadClassifier,
    "LGLoadNoisyCLIP": LGLoadNoisyCLIP,
    "LGLoadPictureCLIP": LGLoadPictureCLIP,
    "LGPictureCLIP": LGPictureCLIP,
}
