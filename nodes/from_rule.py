"""A node made from a guidance rule: its inputs are the rule's knobs, its output is the chain with the rule at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..latent_guidance.errors import UserError
from ..latent_guidance.guidance.base import Rule
from ..latent_guidance.guidance.knobs import Choice, Knob, Number, Socket, Switch, Text, Whole, default, knobs
from ..latent_guidance.guidance.recommended import recommended
from ..latent_guidance.guidance.weakened import WeakenedPass
from .runtime import current

CATEGORY = "latent guidance/guidance"

CHAIN_HELP = "Rules that come before this one; the order inside one stage is that of the chain. Optional."
CHAIN_HELP_ZH = "排在本规则之前的规则；同一阶段内按链的顺序作用。可选。"
OUTPUT_HELP = (
    "The chain with this rule at its end: connect it to the next rule, to Guider, or to Apply Guidance to Model."
)
GUIDER_OUTPUT_HELP = "The chain with this rule at its end: connect it to the next rule or to Guider."
STEP_OUTPUT_HELP = "The chain with this rule at its end: connect it to the next such rule or to DDPM Sampler."
OUTPUT_ZH = "末尾加上本规则的规则链：连接到下一条规则、“引导器”，或“将引导应用于模型”。"
GUIDER_OUTPUT_ZH = "末尾加上本规则的规则链：连接到下一条规则或“引导器”。"
STEP_OUTPUT_ZH = "末尾加上本规则的规则链：连接到下一条同类规则或“DDPM 采样器”。"


def _tooltip(knob: Knob, recommended: Any = None) -> str:
    parts = [knob.help]
    if knob.neutral_text:
        parts.append(f"Neutral: {knob.neutral_text}.")
    if isinstance(knob, Number | Whole):
        parts.append(f"Range: {_shown(knob.min)} to {_shown(knob.max)}.")
    if isinstance(knob, Number) and knob.paper_range:
        parts.append(f"Usual: {knob.paper_range}.")
    if recommended is not None:
        parts.append(f"Recommended on the emoji model: {_shown(recommended)}.")
    return " ".join(parts)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tooltip_zh(knob: Knob, recommended: Any = None) -> str:
    """What an input's tooltip says in Chinese, with the value that was measured to be recommended if there is one."""
    parts = [knob.help_zh]
    if knob.neutral_text:
        parts.append(f"中性值：{knob.neutral_text}。")
    if isinstance(knob, Number | Whole):
        parts.append(f"范围：{_shown(knob.min)} 到 {_shown(knob.max)}。")
    if isinstance(knob, Number) and knob.paper_range:
        parts.append(f"常用：{knob.paper_range_zh or knob.paper_range.replace(' to ', ' 到 ')}。")
    if recommended is not None:
        parts.append(f"emoji 模型上的推荐值：{_shown(recommended)}。")
    return "".join(parts)


def input_of(knob: Knob, value: Any, recommended: Any = None) -> tuple[Any, dict[str, Any]]:
    """ComfyUI's description of the input for a knob with default ``value``; ``recommended`` is for the tooltip."""
    options: dict[str, Any] = {"tooltip": _tooltip(knob, recommended)}
    match knob:
        case Number():
            bounds = {"min": knob.min, "max": knob.max, "step": knob.step, "round": knob.step / 100}
            return "FLOAT", {"default": value, **bounds, **options}
        case Whole():
            return "INT", {"default": value, "min": knob.min, "max": knob.max, "step": knob.step, **options}
        case Choice():
            return list(knob.options), {"default": value, **options}
        case Switch():
            return "BOOLEAN", {"default": value, **options}
        case Text():
            return "STRING", {"default": value, "multiline": False, "placeholder": knob.placeholder, **options}
        case Socket():
            return knob.type, options
    raise TypeError(f"no input for the knob {knob!r}")


def node_from_rule(rule_class: type[Rule]) -> type:
    """The node class of a rule; its id is ``rule_class.node.id``."""
    text, own, measured = rule_class.node, knobs(rule_class), recommended(rule_class.node.id)
    described = {name: input_of(knob, default(rule_class, name), measured.get(name)) for name, knob in own.items()}
    optional = {name for name, knob in own.items() if isinstance(knob, Socket) and knob.optional}
    step = rule_class.stage.value == "step"
    asks_little = rule_class.branches is Rule.branches or issubclass(rule_class, WeakenedPass)
    on_model = asks_little and not rule_class.guider_only

    class RuleNode:
        DISPLAY_NAME = text.name
        CATEGORY = CATEGORY
        DESCRIPTION = text.description
        SEARCH_ALIASES: ClassVar[list[str]] = list(text.search_aliases)
        RETURN_TYPES = ("LG_GUIDANCE",)
        RETURN_NAMES = ("rules",)
        OUTPUT_TOOLTIPS = (STEP_OUTPUT_HELP if step else OUTPUT_HELP if on_model else GUIDER_OUTPUT_HELP,)
        FUNCTION = "append"
        RULE = rule_class
        ZH: ClassVar[dict[str, Any]] = {
            "display_name": text.name_zh,
            "description": text.description_zh,
            "inputs": {
                **{name: (knob.label_zh, tooltip_zh(knob, measured.get(name))) for name, knob in own.items()},
                "rules": ("规则链", CHAIN_HELP_ZH),
            },
            "outputs": (("规则链", STEP_OUTPUT_ZH if step else OUTPUT_ZH if on_model else GUIDER_OUTPUT_ZH),),
        }

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {
                "required": {name: spec for name, spec in described.items() if name not in optional},
                "optional": {
                    **{name: spec for name, spec in described.items() if name in optional},
                    "rules": ("LG_GUIDANCE", {"tooltip": CHAIN_HELP}),
                },
            }

        def append(self, rules: tuple[Rule, ...] = (), **inputs: Any) -> tuple[tuple[Rule, ...]]:
            return ((*chain_of(rules, text.name), _made(rule_class, taken(rule_class, inputs))),)

    RuleNode.__name__ = RuleNode.__qualname__ = text.id
    RuleNode.__doc__ = text.description
    return RuleNode


def taken(described: type, inputs: dict[str, Any]) -> dict[str, Any]:
    """A node's inputs as the library has them: tensors of LATENT and IMAGE, and a VAE that decodes with gradients.

    Pictures come as (B, 3, H, W) in [-1, 1], latents unscaled as they are in the graph.
    """

    def converted(name: str, value: Any) -> Any:
        match getattr(knobs(described)[name], "type", None):
            case "LATENT" if value is not None:
                return value["samples"]
            case "IMAGE" if value is not None:
                return value[..., :3].movedim(-1, 1) * 2 - 1
            case "VAE" if value is not None:
                return current().decoder(value)
        return value

    return {name: converted(name, value) for name, value in inputs.items()}


def _made(rule_class: Callable[..., Rule], inputs: dict[str, Any]) -> Rule:
    return rule_class(**inputs)


def chain_of(rules: Any, where: str) -> tuple[Rule, ...]:
    """The chain of rules that an optional input brought, empty if nothing is connected.

    Raises:
        UserError: something that is not a chain.
    """
    if rules is None:
        return ()
    if not isinstance(rules, tuple):
        raise UserError(
            f"{type(rules).__name__} at the rules input of {where}",
            expected="a chain of rules (LG_GUIDANCE)",
            mend="connect the output of a rule node, such as Classifier Guidance",
        )
    return rules
