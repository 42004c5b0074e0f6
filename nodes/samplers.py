"""Samplers."""

from __future__ import annotations

from typing import Any, ClassVar

from ..latent_guidance.guidance.knobs import UNLIMITED
from .from_rule import chain_of
from .ranges import check_ranges
from .runtime import current
from .sampling import CATEGORY

OUTPUT_HELP = ("The sampler, for SamplerCustomAdvanced.",)
OUTPUTS_ZH = (("采样器", "采样器，用于 SamplerCustomAdvanced。"),)
ETA_ZH = "每步加入多少新噪声：0 为确定性（中性值），1 为 DDPM 的方差。范围：0 到 1。"
RECURRENCE_ZH = {
    "recurrence": (
        "重复次数",
        "每一步执行多少次：每次之后把结果重新加噪到该步的起点再走一遍，让引导更充分。网络调用次数随之成倍增加。"
        "中性值：1（只走一次）。范围：1 到 32。",
    ),
    "recurrence_sigma_lo": ("重复的 sigma 下限", "只重复起点 sigma 高于此值的步。中性值：0。范围：0 到 1000。"),
    "recurrence_sigma_hi": (
        "重复的 sigma 上限",
        "只重复起点 sigma 不高于此值的步；1000 表示没有上限（中性值）。范围：0 到 1000。",
    ),
}


def eta_input() -> tuple[str, dict[str, Any]]:
    tooltip = (
        "How much fresh noise a step adds: 0 is deterministic, 1 has the variance of DDPM. Neutral: 0. Range: 0 to 1."
    )
    return "FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip}


def recurrence_inputs() -> dict[str, Any]:
    """The optional inputs of a sampler that can take its steps several times."""

    def bound(default: float, tooltip: str) -> tuple[str, dict[str, Any]]:
        return "FLOAT", {"default": default, "min": 0.0, "max": UNLIMITED, "step": 0.01, "tooltip": tooltip}

    return {
        "recurrence": (
            "INT",
            {
                "default": 1,
                "min": 1,
                "max": 32,
                "step": 1,
                "tooltip": "How often every step is taken: its result is noised back to where the step began, and the step is taken again, "
                "which lets guidance work longer at each noise level. The network passes are multiplied by it. Neutral: 1. Range: 1 to 32.",
            },
        ),
        "recurrence_sigma_lo": bound(
            0.0, "Only steps that begin at a sigma above this one are repeated. Neutral: 0. Range: 0 to 1000."
        ),
        "recurrence_sigma_hi": bound(
            UNLIMITED,
            "Only steps that begin at a sigma up to and including this one are repeated; 1000 is no upper limit. Neutral: 1000. "
            "Range: 0 to 1000.",
        ),
    }


def recurrence_of(recurrence: int = 1, recurrence_sigma_lo: float = 0.0, recurrence_sigma_hi: float = UNLIMITED) -> Any:
    """The library's Recurrence of those inputs."""
    from ..latent_guidance.samplers import Recurrence

    high = float("inf") if recurrence_sigma_hi >= UNLIMITED else recurrence_sigma_hi
    return Recurrence(recurrence, recurrence_sigma_lo, high)


class LGSamplerDDPM:
    """DDPM Sampler."""

    DISPLAY_NAME = "DDPM Sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The ancestral sampler of the DDPM paper, with a choice of the step's variance, and the place for rules that act inside the "
        "step (Classifier Mean Shift, Classifier Post-Step)."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["ddpm", "ancestral", "sampler", "mean shift"]
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("The sampler, for SamplerCustomAdvanced.",)
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "DDPM 采样器",
        "description": (
            "DDPM 论文中的祖先采样器，可选择每步的方差；也是在步内生效的规则（分类器均值偏移、步后修正）的连接处。"
        ),
        "inputs": {
            "variance": (
                "方差",
                "每步噪声的方差：beta_tilde 为后验方差（默认），beta 更大，learned_range 需要会预测方差的网络。",
            ),
            "rules": ("规则链", "只接受在步内生效的规则（名称以 DDPM 结尾）；不连接则不引导（中性值）。"),
            **RECURRENCE_ZH,
        },
        "outputs": OUTPUTS_ZH,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "variance": (
                    ["beta_tilde", "beta", "learned_range"],
                    {
                        "default": "beta_tilde",
                        "tooltip": "Variance of a step's noise: beta_tilde is that of the posterior (the usual choice), beta is larger, "
                        "learned_range needs a network that predicts it.",
                    },
                )
            },
            "optional": {
                "rules": (
                    "LG_GUIDANCE",
                    {
                        "tooltip": "Rules that act inside a step, and no others: their names end in DDPM. Neutral: not connected."
                    },
                ),
                **recurrence_inputs(),
            },
        }

    def make(self, variance: str, rules: Any = None, **recurrence: Any) -> tuple[Any]:
        from ..latent_guidance.samplers import sample_ddpm

        check_ranges(self, **recurrence)
        chain = chain_of(rules, self.DISPLAY_NAME)
        options = {"variance": variance, "recurrence": recurrence_of(**recurrence)}
        return (current().make_sampler(sample_ddpm, options, chain),)


class LGSamplerDDIM:
    """DDIM Sampler."""

    DISPLAY_NAME = "DDIM Sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = "DDIM, from deterministic (eta 0) to as random as DDPM (eta 1)."
    SEARCH_ALIASES: ClassVar[list[str]] = ["ddim", "sampler", "eta"]
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("The sampler, for SamplerCustomAdvanced.",)
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "DDIM 采样器",
        "description": "DDIM 采样器：eta 为 0 时是确定性的，为 1 时与 DDPM 同样随机。",
        "inputs": {"eta": ("eta", ETA_ZH), **RECURRENCE_ZH},
        "outputs": OUTPUTS_ZH,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"eta": eta_input()}, "optional": recurrence_inputs()}

    def make(self, eta: float, **recurrence: Any) -> tuple[Any]:
        from ..latent_guidance.samplers import sample_ddim

        check_ranges(self, eta=eta, **recurrence)
        return (current().make_sampler(sample_ddim, {"eta": eta, "recurrence": recurrence_of(**recurrence)}),)


_SCALE_HELP = (
    "The scale is set in CFG or CFGGuider and is the paper's lambda: 0 is the negative alone, the paper goes up to 1, and more steps "
    "make the same value stronger. A negative is needed at any scale."
)
_SCALE_ZH = (
    "强度在 CFG 规则或 CFGGuider 中设置，即论文中的 lambda：0 只用反向条件，论文中最大为 1，"
    "步数越多同一数值越强。任何强度都需要反向条件。"
)


class LGSamplerDDIMCFGpp:
    """DDIM CFG++ Sampler."""

    DISPLAY_NAME = "DDIM CFG++ Sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "DDIM (at eta 0 also Euler, at eta 1 Euler ancestral) with CFG++: each step noises the guided picture again with the noise that "
        "the negative sees, which keeps strong guidance natural. " + _SCALE_HELP
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "cfg++", "cfgpp", "euler_cfg_pp", "euler_ancestral_cfg_pp", "ddim cfg++", "manifold-constrained cfg",
    ]  # fmt: skip
    FORMULAS_OF = "latent_guidance.samplers.cfg_pp"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = OUTPUT_HELP
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "DDIM CFG++ 采样器",
        "description": (
            "带 CFG++ 的 DDIM（eta 为 0 时即 Euler，为 1 时即 Euler ancestral）："
            "每一步用反向条件所见的噪声为引导后的画面重新加噪，使强引导保持自然。" + _SCALE_ZH
        ),
        "inputs": {"eta": ("eta", ETA_ZH), **RECURRENCE_ZH},
        "outputs": OUTPUTS_ZH,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"eta": eta_input()}, "optional": recurrence_inputs()}

    def make(self, eta: float, **recurrence: Any) -> tuple[Any]:
        from ..latent_guidance.samplers import sample_ddim_cfg_pp

        check_ranges(self, eta=eta, **recurrence)
        return (current().make_sampler(sample_ddim_cfg_pp, {"eta": eta, "recurrence": recurrence_of(**recurrence)}),)


class LGSamplerDPMpp2MCFGpp:
    """DPM++ 2M CFG++ Sampler."""

    DISPLAY_NAME = "DPM++ 2M CFG++ Sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "DPM++ 2M with CFG++: each step noises the guided picture again with the noise that the negative sees. "
        + _SCALE_HELP
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["cfg++", "cfgpp", "dpmpp_2m_cfg_pp", "dpm++ 2m cfg++"]
    FORMULAS_OF = "latent_guidance.samplers.cfg_pp"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = OUTPUT_HELP
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "DPM++ 2M CFG++ 采样器",
        "description": "带 CFG++ 的 DPM++ 2M：每一步用反向条件所见的噪声为引导后的画面重新加噪。" + _SCALE_ZH,
        "inputs": {},
        "outputs": OUTPUTS_ZH,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        from ..latent_guidance.samplers import sample_dpmpp_2m_cfg_pp

        return (current().make_sampler(sample_dpmpp_2m_cfg_pp, {}),)


class LGSamplerRectifiedCFGpp:
    """Rectified-CFG++ Sampler."""

    DISPLAY_NAME = "Rectified-CFG++ Sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Guidance for flow models (Stable Diffusion 3, Flux) inside the step: it goes along the prompt's own path and corrects it by what "
        "prompt and negative say half a step ahead. Leave CFG out of the Guider's chain but connect its negative (or set CFGGuider's cfg "
        "to 1), and set the scale here; three network passes a step."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "rectified cfg++",
        "cfg++",
        "flow guidance",
        "sd3",
        "flux",
        "predictor-corrector",
    ]
    FORMULAS_OF = "latent_guidance.samplers.rectified_cfg_pp"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = OUTPUT_HELP
    FUNCTION = "make"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "Rectified-CFG++ 采样器",
        "description": (
            "用于流模型（Stable Diffusion 3、Flux）的步内引导：沿提示词自身的路径前进，"
            "再按前方半步处提示词与反向条件之差修正。“引导器”的规则链中不要放 CFG，但要连接反向条件"
            "（或把 CFGGuider 的 cfg 设为 1），强度在此设置；每步三次网络调用。"
        ),
        "inputs": {
            "scale": (
                "引导强度",
                "修正的强度，即论文的 lambda_max，相当于普通 CFG 强度减 1。中性值：0（Euler）。范围：0 到 100。作者示例：3 到 4.5。",
            ),
            "gamma": (
                "gamma",
                "修正随 (1 - sigma)^gamma 增强：越大，引导越晚才起作用。中性值：0（强度不变）。范围：0 到 10。",
            ),
            "predictor_noise": (
                "预测噪声",
                "加到预测点上的噪声标准差，论文中的可选项。中性值：0。范围：0 到 1。作者的演示用 0.005。",
            ),
        },
        "outputs": OUTPUTS_ZH,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def number(default: float, high: float, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "FLOAT", {"default": default, "min": 0.0, "max": high, "step": step, "tooltip": tooltip}

        return {
            "required": {
                "scale": number(
                    3.0,
                    100.0,
                    0.1,
                    "How strongly the step is corrected: the paper's lambda_max, like the scale of plain CFG less 1. Neutral: 0 (Euler). "
                    "Range: 0 to 100. The authors show 3 to 4.5.",
                ),
                "gamma": number(
                    0.0,
                    10.0,
                    0.1,
                    "The correction grows as (1 - sigma)^gamma: the larger, the later in the run it acts. Neutral: 0 (always the same). "
                    "Range: 0 to 10.",
                ),
                "predictor_noise": number(
                    0.0,
                    1.0,
                    0.001,
                    "Standard deviation of noise added where the correction looks ahead, an option of the paper. Neutral: 0. "
                    "Range: 0 to 1. The authors' demo has 0.005.",
                ),
            }
        }

    def make(self, scale: float, gamma: float, predictor_noise: float) -> tuple[Any]:
        from ..latent_guidance.samplers import sample_rectified_cfg_pp

        options = {"scale": scale, "gamma": gamma, "predictor_noise": predictor_noise}
        check_ranges(self, **options)
        return (current().make_sampler(sample_rectified_cfg_pp, options),)


NODES: dict[str, type] = {
    "LGSamplerDDPM": LGSamplerDDPM,
    "LGSamplerDDIM": LGSamplerDDIM,
    "LGSamplerDDIMCFGpp": LGSamplerDDIMCFGpp,
    "LGSamplerDPMpp2MCFGpp": LGSamplerDPMpp2MCFGpp,
    "LGSamplerRectifiedCFGpp": LGSamplerRectifiedCFGpp,
}
