"""Memory for graphs: ComfyUI reserves what a model needs forwards; what autograd keeps for the way back is several times that.

It is asked for through ComfyUI's own mechanism: a wrapper around the preparation of a sampling shows it a larger batch than there is, and
models are loaded and unloaded for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.patcher_extension
import comfy.sampler_helpers

from ....latent_guidance.guidance.loss_rule import LossRule
from ....latent_guidance.guidance.losses.base import parts_of

GRAPH = 23
GRAPHS = {"SD15": 10, "SD3": 7, "SDXL": 21}
"""What a pass of the network needs with its graph, in ComfyUI's estimate for one without: at most, and for families that need much less
(by the name of ComfyUI's class of supported_models).

Counted on ComfyUI 0.33.0 by benchmarks/comfyui_graphs.py, as the bytes that autograd keeps over the estimate with fused attention, fp16:
9.0 for Stable Diffusion 1.5 at 512 pixels; at 1024, 5.6 for SD3 medium, 19.4 for SDXL, 21.1 for Flux (with the copies of what its layers
change in place). And 1 for the pass itself.
"""
ALL = 1e32
"""More bytes than any model has: what ComfyUI's own loading gives for "all of it"."""
DECODED = 3
"""The same of a VAE's decoder: 2.6 for that of Stable Diffusion in fp32, and some of 1 for the pass itself."""


def graph_factor(model: Any) -> int:
    """What a pass of ComfyUI's BaseModel ``model`` needs with its graph, in ComfyUI's estimate for one without."""
    return GRAPHS.get(type(model.model_config).__name__, GRAPH)


def graph_shape(model: Any, shape: Sequence[int], conds: Mapping[str, Any], rules: Sequence[Any]) -> list[int]:
    """The shape (B', ...) of a batch whose call without a graph would need as much memory as guidance of ``shape`` (B, ...) with one.

    Args:
        model: ComfyUI's BaseModel.
        shape: of the noise.
        conds: the guider's conditions; each of their entries is a pass.
        rules: all that guide.
    """
    batch, rest = shape[0], list(shape[1:])
    if any(rule.may_differentiate() for rule in rules):
        weakened = sum(branch.pieces for rule in rules for branch in rule.branches() if branch.patch is not None)
        entries = sum(len(entries) for entries in conds.values()) + weakened * len(conds.get("positive", ()))
        batch *= graph_factor(model) * max(1, entries)
    unit = float(model.memory_required([1, *rest]))
    looking = max((_looking(rule, tuple(shape)) for rule in rules), default=0.0)  # one after the other
    return [batch + (math.ceil(looking / unit) if unit > 0 else 0), *rest]


def _looking(rule: Any, shape: tuple[int, ...]) -> float:
    """Bytes for the pictures that a rule looks at, of latents of ``shape`` (B, C, h, w); 0 for rules that look at none.

    What the VAE decodes at once with a graph, and with that the graphs of the networks that look at it, as far as they say.
    """
    at_once = rule.decoded_at_once(shape) if isinstance(rule, LossRule) else None
    if at_once is None:
        return 0.0
    used = getattr(rule.vae, "memory_used", None)
    graphs = [getattr(part, "graph_used", None) for _, part in parts_of(rule.loss)]
    return (0.0 if used is None else DECODED * float(used(at_once))) + sum(graph() for graph in graphs if graph)


def reserve(model: Any, rules: Sequence[Any], key: str) -> None:
    """Have every sampling of a MODEL reserve memory for the graphs of ``rules``, all that guide it, under ``key`` among its wrappers.

    What a gradient goes through is loaded whole, MODEL, VAE and all: autograd keeps its weights anyway. ComfyUI is told so where it
    listens, and what it has still loaded in part (--novram, or a VAE that found no room) is loaded whole after it. Layers that stay
    behind are cast through buffers that newer ComfyUIs (0.33, with --disable-cuda-malloc) write over at the next layer.
    """
    wrapper = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    model.remove_wrappers_with_key(wrapper, key)  # that of fewer rules
    through = any(rule.may_differentiate() for rule in rules)
    if not through and all(not isinstance(rule, LossRule) or rule.vae is None for rule in rules):
        return
    handles = [handle for rule in rules if isinstance(rule, LossRule) and not rule.off for handle in rule.networks()]
    looked_through = [handle.patcher for handle in handles if hasattr(handle, "patcher")]

    def prepare(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        if through and "force_full_load" in kwargs:
            kwargs["force_full_load"] = True
        made = executor(model, graph_shape(model.model, noise_shape, conds, rules), conds, *args, **kwargs)
        for patcher in (model, *model.get_additional_models_with_key(key)) if through else looked_through:
            if getattr(patcher.model, "model_lowvram", False):
                patcher.partially_load(patcher.load_device, ALL)
        return made

    model.add_wrapper_with_key(wrapper, key, prepare)


def needed(guider: Any, shape: Sequence[int], rules: Sequence[Any]) -> dict[str, float]:
    """What to load models with beside a guider that samples a batch of ``shape`` (B, ...): ``load_models_gpu``'s arguments for memory."""
    larger = graph_shape(guider.inner_model, shape, guider.conds, rules)
    most, least = comfy.sampler_helpers.estimate_memory(guider.model_patcher, larger, guider.conds)
    return {"memory_required": most, "minimum_memory_required": least}
