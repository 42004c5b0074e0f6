"""Weakened passes inside ComfyUI: changed attention by ComfyUI's patches, and sliding windows by its areas.

Each is a call of its own on the positive condition as ComfyUI has processed it, with copied options, so that nothing stays behind on the
model and other nodes' patches act in it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ....latent_guidance.attention import OPS, AttentionPatch, blurred, select_layers, shuffled, unreachable
from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance import Branch
from ....latent_guidance.windows import Windows

_STAGES = (("d", "input", "input_blocks"), ("m", "middle", "middle_block"), ("u", "output", "output_blocks"))
_DOUBLE = ("double_blocks", "joint_blocks", "double_layers", "transformer_blocks", "blocks")
_SINGLE = ("single_blocks", "single_layers")

Place = tuple[Any, ...]
"""Where ComfyUI looks for a layer's replacement: ("input", 4, 0) in a U-Net, ("double_block", 7) in a transformer."""


def _unet_layers(network: Any) -> dict[str, tuple[Place, Any]]:
    """Name -> place and transformer block, of ComfyUI's own U-Net class; empty for other networks."""
    found: dict[str, tuple[Place, Any]] = {}
    if not all(hasattr(network, stages) for _, _, stages in _STAGES):
        return found
    for kind, where, attribute in _STAGES:
        stages = getattr(network, attribute)
        stages = [part for part in [stages] if part is not None] if where == "middle" else stages
        layers = [
            ((where, i, k), block)
            for i, stage in enumerate(stages)
            for holder in stage
            for k, block in enumerate(getattr(holder, "transformer_blocks", ()))
        ]
        found |= {f"{kind}{n}": layer for n, layer in enumerate(layers)}
    return found


def _transformer_layers(network: Any) -> dict[str, Place]:
    """Name -> place, of ComfyUI's diffusion transformers; empty for other networks."""
    found: dict[str, Place] = {}
    for kind, place, attributes in (("", "double_block", _DOUBLE), ("s", "single_block", _SINGLE)):
        blocks = next((getattr(network, name) for name in attributes if hasattr(network, name)), ())
        found |= {f"{kind}{i}": (place, i) for i in range(len(blocks))}
    return found


def check_patch(network: Any, patch: AttentionPatch) -> None:
    """Refuse a change of attention that a diffusion model does not let in.

    Raises:
        UserError: saying so, or which layers there are.
    """
    own = getattr(network, "check_patch", None)  # the library's network, wrapped
    if own is not None:
        return own(patch)
    layers = list(_unet_layers(network))
    if not layers and patch.op == "skip":
        layers = list(_transformer_layers(network))
    if not layers:
        raise unreachable(patch, type(network).__name__)
    select_layers(patch.layers, layers)


def check_windows(entries: Iterable[Mapping[str, Any]]) -> None:
    """Refuse conditions that mean places of the whole picture, which sliding windows would squeeze into each of theirs.

    Raises:
        UserError: naming what is there.
    """
    for entry in entries:
        found = [name for name in ("area", "mask", "control", "gligen") if entry.get(name) is not None]
        if found:
            raise UserError(
                f"a positive conditioning with {', '.join(found)}, and Sliding Window Guidance",
                expected="a conditioning of the whole picture",
                mend="take the rule out, or the node that adds it",
            )


def check(branches: Iterable[Branch], network: Any, positive: Iterable[Any] = ()) -> None:
    """Refuse weakened passes of a diffusion model, or of a positive CONDITIONING, that cannot be made.

    Raises:
        UserError: see :func:`check_patch` and :func:`check_windows`.
    """
    for branch in branches:
        if branch.attention is not None:
            check_patch(network, branch.attention)
        if branch.windows is not None:
            check_windows(entry[1] for entry in positive)


def evaluate(
    model: Any,
    cond: Sequence[Mapping[str, Any]],
    branches: Mapping[str, Branch],
    x: Tensor,
    sigma: Tensor,
    options: Mapping[str, Any],
    sigmas: Tensor | None,
) -> dict[str, Tensor]:
    """The estimates (B, ...) of weakened passes, by name, each in a call of its own.

    Args:
        model: ComfyUI's BaseModel.
        cond: the positive condition, processed.
        branches: the passes to make.
        x: noisy latent (B, ...).
        sigma: noise level (B,).
        options: the model_options of this sampling; not changed.
        sigmas: the run's noise levels (N + 1,), None if unknown.

    Raises:
        UserError: a network that does not ask its patches.
    """
    estimates: dict[str, Tensor] = {}
    options = {key: value for key, value in options.items() if key != "multigpu_clones"}
    for name, branch in branches.items():
        if branch.windows is not None:
            estimates[name] = _through_windows(model, cond, branch.windows, x, sigma, options)
        else:
            estimates[name] = _patched(model, cond, branch.patches(sigma, sigmas), x, sigma, options)
    return estimates


def _through_windows(
    model: Any, cond: Sequence[Mapping[str, Any]], windows: Windows, x: Tensor, sigma: Tensor, options: dict[str, Any]
) -> Tensor:
    """One entry per window; a mask of ones beside an area keeps ComfyUI from fading its borders."""
    check_windows(cond)
    windows.check_shape(tuple(x.shape))
    whole = torch.ones(1, *x.shape[2:], device=x.device, dtype=x.dtype)
    entries = []
    for top, left, height, width in windows.boxes(*x.shape[-2:]):
        here = {"area": (height, width, top, left), "mask": whole}
        entries += [{**entry, **here} for entry in cond]
    return comfy.samplers.calc_cond_batch(model, [entries], x, sigma, options)[0]


def _patched(
    model: Any,
    cond: Sequence[Mapping[str, Any]],
    rows: Sequence[AttentionPatch | None],
    x: Tensor,
    sigma: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """``rows`` is the change for each sample of x."""
    network = model.diffusion_model
    if hasattr(network, "check_patch"):
        with network.patched(rows):
            return comfy.samplers.calc_cond_batch(model, [cond], x, sigma, options)[0]
    changes = [patch for patch in rows if patch is not None]
    seen: set[str] = set()
    options, hooks, wanted = _with_patches(network, changes, options, seen.add)
    with hooks:
        [estimate] = comfy.samplers.calc_cond_batch(model, [list(cond)], x, sigma, options)
    if bool(torch.count_nonzero(estimate)) and not wanted <= seen:
        raise unreachable(changes[0], type(network).__name__)
    return estimate


def _with_patches(
    network: Any, rows: Sequence[AttentionPatch], options: dict[str, Any], saw: Callable[[str], None]
) -> tuple[dict[str, Any], AbstractContextManager[Any], set[str]]:
    """Options in which ``rows`` act, hooks for what ComfyUI has no patch for, and the layers that are changed.

    ``saw`` is told the name of every layer in which something was changed.
    """
    patch, unet = rows[0], _unet_layers(network)
    layers = {name: place for name, (place, _) in unet.items()} or _transformer_layers(network)
    chosen = select_layers(patch.layers, list(layers))
    hooks = ExitStack()
    options = {**options, "transformer_options": {**options.get("transformer_options", {})}}
    for name in chosen:
        if patch.op in ("identity", "blur"):
            replacement = _attention(name, patch, saw)
            where, number, index = layers[name]
            options = _replaced(options, replacement, "attn1", where, number, transformer_index=index)
        elif patch.op == "skip" and not unet:
            options = _replaced(options, _skip(name, saw), "dit", *layers[name])
        elif patch.op == "skip":
            hooks.callback(unet[name][1].register_forward_hook(_skip_hook(name, saw)).remove)
    if patch.op == "shuffle":
        shuffle = _shuffle({layers[name]: name for name in chosen}, rows, saw)
        patches = dict(options["transformer_options"].get("patches", {}))
        patches["middle_patch"] = [*patches.get("middle_patch", ()), shuffle]
        options["transformer_options"]["patches"] = patches
    return options, hooks, set(chosen)


_replaced = comfy.model_patcher.set_model_options_patch_replace


def _attention(name: str, patch: AttentionPatch, saw: Callable[[str], None]) -> Any:
    """In the place of a layer's self-attention: q, k, v (B, N, heads * C) to (B, N, heads * C)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any], mask: Any = None) -> Tensor:
        saw(name)
        tokens = math.prod(extra_options["activations_shape"][-2:]) if patch.op == "blur" else v.shape[1]
        if not q.shape[1] == v.shape[1] == tokens:
            raise UserError(
                f"{OPS[patch.op]} in the layer {name}, of whose {tokens} tokens another node has made {q.shape[1]} queries and "
                f"{v.shape[1]} values, as Token Merging (ToMe) and HyperTile do",
                expected="attention over all tokens of the picture",
                mend="take that node out, or the rule that weakens attention",
            )
        if patch.op == "identity":
            return v
        queries = blurred(q, *extra_options["activations_shape"][-2:], patch.blur_sigma).to(q)
        return comfy.ldm.modules.attention.optimized_attention(
            queries, k, v, extra_options["n_heads"], attn_precision=extra_options.get("attn_precision")
        )

    return attention


def _skip(name: str, saw: Callable[[str], None]) -> Any:
    """In the place of a transformer's block: what goes in comes out."""

    def skip(args: dict[str, Any], extra: Any) -> dict[str, Any]:
        saw(name)
        return args

    return skip


def _skip_hook(name: str, saw: Callable[[str], None]) -> Any:
    def skip(_: Any, args: Any, output: Tensor) -> Tensor:
        saw(name)
        return args[0]

    return skip


def _shuffle(places: Mapping[Place, str], rows: Sequence[AttentionPatch], saw: Callable[[str], None]) -> Any:
    """A patch on the tokens between a block's self-attention and the rest, for all blocks: acts on those in ``places``.

    The block treats all tokens alike, so that to shuffle them here is to shuffle what goes into it.
    """

    def shuffle(tokens: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        name = places.get((*(extra_options.get("block") or ()), extra_options.get("block_index")))
        if name is None:
            return tokens
        saw(name)
        if len(set(rows)) == 1:
            return shuffled(tokens, rows[0], name)
        singly = [shuffled(tokens[i : i + 1], rows[i % len(rows)], name) for i in range(len(tokens))]
        return torch.cat(singly)

    return shuffle
