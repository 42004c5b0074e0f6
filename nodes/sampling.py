"""Noise, guiders and patches."""

from __future__ import annotations

from typing import Any, ClassVar

from ..latent_guidance.noise import MAX_SEED
from .from_rule import chain_of
from .ranges import check_ranges
from .runtime import current

CATEGORY = "latent guidance/sampling"

_RULES_HELP = "The chain of guidance rules; without one the model is left as it is. Neutral: not connected."
_RULES_HELP_ZH = "引导规则链；不连接则不改变模型（中性值）。"

_REPORT = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Keep what every step does, for the node Guidance Report; the pictures stay the same. Neutral: off.",
    },
)
_REPORT_ZH = ("报告", "保存每一步的情况，供“引导报告”节点使用；画面不变。中性值：关闭。")


class LGSeededNoise:
    """Seeded Noise."""

    DISPLAY_NAME = "Seeded Noise"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Noise with a seed for every picture: picture i of a batch has seed + i, and is the same alone and in any batch. The "
        "samplers of this pack draw the noise of their steps from the same seeds."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["noise", "seed", "random noise", "batch seed"]
    RETURN_TYPES = ("NOISE",)
    OUTPUT_TOOLTIPS = ("The noise, for SamplerCustomAdvanced.",)
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "逐图种子噪声",
        "description": (
            "每张图片各有一个种子的噪声：批次中第 i 张使用 seed + i，单独生成或在任何批次中都相同。"
            "本节点包的采样器也用这些种子产生每一步的噪声。"
        ),
        "inputs": {
            "seed": ("种子", "第一张图片的种子，之后依次加一。范围：0 到 2^64 - 1。"),
            "batch_size": ("批量", "多少张图片有种子，须等于潜变量的批量。范围：1 到 4096。"),
        },
        "outputs": (("噪声", "噪声，用于 SamplerCustomAdvanced。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_SEED,
                        "step": 1,
                        "control_after_generate": True,
                        "tooltip": "Seed of the first picture; the others count on from it. Range: 0 to 2^64 - 1.",
                    },
                ),
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 4096,
                        "step": 1,
                        "tooltip": "How many pictures have a seed: the batch size of the latent. Range: 1 to 4096.",
                    },
                ),
            }
        }

    def make(self, seed: int, batch_size: int) -> tuple[Any]:
        check_ranges(self, seed=seed, batch_size=batch_size)
        return (current().seeded_noise([(seed + item) % (MAX_SEED + 1) for item in range(batch_size)]),)


class LGGuider:
    """Guider."""

    DISPLAY_NAME = "Guider"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Guides a model by a chain of rules, for SamplerCustomAdvanced. Everything that the rules need of the model is evaluated in "
        "one batched call a step; a negative that no rule needs costs nothing. Rules that change how CFG acts (Limited Interval, Schedule, "
        "Curve, Adaptive, APG …) need Classifier-Free Guidance, or a rule that takes its place, in the same chain; without one they do "
        "nothing."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["guider", "cfg guider", "classifier guidance", "rules"]
    RETURN_TYPES = ("GUIDER", "STRING")
    RETURN_NAMES = ("GUIDER", "passes")
    OUTPUT_TOOLTIPS = (
        "The guided model, for SamplerCustomAdvanced.",
        "What a picture costs: how many network passes a step makes, by what, and at which noise levels.",
    )
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "引导器",
        "description": (
            "按规则链引导模型，用于 SamplerCustomAdvanced。"
            "规则所需的全部结果在每一步的一次批量调用中得到；没有规则需要反向条件时不产生额外开销。"
            "改变 CFG 作用方式的规则（限定区间、调度、曲线、自适应、APG 等）"
            "须与“无分类器引导 (CFG)”或取代它的规则放在同一条链中，否则不起作用。"
        ),
        "inputs": {
            "model": ("模型", "要引导的模型。"),
            "positive": ("正向条件", "画面应符合的条件。"),
            "negative": ("反向条件", "CFG 等规则与之比较的条件，通常为空条件；没有规则需要时可不连接（中性值）。"),
            "rules": ("规则链", _RULES_HELP_ZH),
            "report": _REPORT_ZH,
        },
        "outputs": (
            ("引导器", "引导后的模型，用于 SamplerCustomAdvanced。"),
            ("网络调用次数", "一张图片的开销：每一步调用多少次网络、由谁引起、在哪些噪声水平。"),
        ),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to guide."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture should be."}),
            },
            "optional": {
                "negative": (
                    "CONDITIONING",
                    {
                        "tooltip": "What rules such as CFG compare with, mostly Null Conditioning. "
                        "Neutral: not connected, if no rule needs it."
                    },
                ),
                "rules": ("LG_GUIDANCE", {"tooltip": _RULES_HELP}),
                "report": _REPORT,
            },
        }

    def make(
        self, model: Any, positive: Any, negative: Any = None, rules: Any = None, report: bool = False
    ) -> tuple[Any, str]:
        runtime, chain = current(), chain_of(rules, self.DISPLAY_NAME)
        guider = runtime.make_guider(model, positive, negative, chain, report=report)
        return guider, runtime.guider_passes(guider).text


class LGApplyGuidance:
    """Apply Guidance to Model."""

    DISPLAY_NAME = "Apply Guidance to Model"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts a chain of rules onto a MODEL, so that they act under KSampler and other guiders. Gradient rules join what the sampler's "
        "own cfg gives. A rule that combines prompt and negative, such as CFG, replaces that cfg; those that change how CFG acts "
        "(interval, schedule, APG …) act on it, and then it must not be 1. Under guiders of three conditions (Dual CFG, Perp-Neg) gradient "
        "rules are added to what the guider shows, which Dual CFG's nested style multiplies by its second scale; other rules are refused "
        "there: use Guider with Two-Condition Guidance or Perp-Neg. Under another pack's guider with conditions of its own the rules act "
        "on the pair that it shows, which the log says."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["patch model", "classifier guidance", "ksampler guidance"]
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the rules on it; the one that went in is unchanged.",)
    FUNCTION = "patch"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "将引导应用于模型",
        "description": (
            "把规则链加到 MODEL 上，使其在 KSampler 和其他引导器下生效。"
            "梯度规则叠加在采样器自身的 cfg 结果上。合并正反向条件的规则（如 CFG）取代该 cfg；"
            "改变 CFG 作用方式的规则（区间、调度、APG 等）作用于该 cfg，此时 cfg 不能为 1。"
            "在有三个条件的引导器（Dual CFG、Perp-Neg）下，梯度规则叠加在该引导器给出的估计上"
            "（Dual CFG 的 nested 方式会再乘以它的第二个强度）；其他规则会被拒绝，请改用“引导器”节点与双条件引导或 Perp-Neg 规则。"
            "若其他节点包的引导器带有自己的条件，规则作用于它所给出的一对估计，并在日志中说明。"
        ),
        "inputs": {
            "model": ("模型", "要引导的模型；输入的模型不会被改变。"),
            "rules": ("规则链", "要加到模型上的引导规则链。"),
            "report": _REPORT_ZH,
        },
        "outputs": (("模型", "带有这些规则的模型；输入的模型不变。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to guide; it is left unchanged, the output is a copy."}),
                "rules": ("LG_GUIDANCE", {"tooltip": "The chain of guidance rules to put onto the model."}),
            },
            "optional": {"report": _REPORT},
        }

    def patch(self, model: Any, rules: Any, report: bool = False) -> tuple[Any]:
        return (current().patch_model(model, chain_of(rules, self.DISPLAY_NAME), report=report),)


NODES: dict[str, type] = {
    "LGSeededNoise": LGSeededNoise,
    "LGGuider": LGGuider,
    "LGApplyGuidance": LGApplyGuidance,
}
