"""Changes of attention in diffusers' U-Nets, for chosen samples of a batch: hooks that are there for as long as a context lasts.

Nothing of the network is replaced, so that it may compute its attention in whatever way, and samples that are to go through as they are
share the call with changed ones. What a changed sample's layer would have answered is computed and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import AttentionPatch, blurred, select_layers, shuffled, unreachable

Rows = Callable[[Tensor], Tensor]
"""A batch (B, ...) -> the indices of the samples to change."""


class Layer(NamedTuple):
    """A transformer block, and the module that gives it its tokens from feature maps (B, C, H, W)."""

    block: Any
    holder: nn.Module


def layers_of(unet: nn.Module) -> dict[str, Layer]:
    """The transformer blocks of a UNet2DConditionModel by name (see ``latent_guidance.attention``), from its input to its output."""
    network: Any = unet
    found: dict[str, Layer] = {}
    for kind, stages in (("d", network.down_blocks), ("m", [network.mid_block]), ("u", network.up_blocks)):
        holders = [holder for stage in stages for holder in getattr(stage, "attentions", None) or ()]
        layers = [Layer(block, holder) for holder in holders for block in getattr(holder, "transformer_blocks", ())]
        found |= {f"{kind}{i}": layer for i, layer in enumerate(layers)}
    return found


def check_patch(unet: nn.Module, patch: AttentionPatch) -> None:
    """Refuse a change of attention in layers that ``unet`` has not got.

    Raises:
        UserError: saying so.
    """
    layers = layers_of(unet)
    if not layers:
        raise unreachable(patch, f"{type(unet).__name__} without transformer blocks")
    select_layers(patch.layers, list(layers))


@contextmanager
def patched(unet: nn.Module, patches: Sequence[AttentionPatch | None]) -> Iterator[None]:
    """In this context sample i of a call of ``unet`` goes through with ``patches[i % len(patches)]``; None leaves it as it is.

    Raises:
        UserError: layers that ``unet`` has not got.
    """
    layers = layers_of(unet)
    with ExitStack() as stack:
        for patch in dict.fromkeys(patches):
            for name in [] if patch is None else select_layers(patch.layers, list(layers)):
                for handle in _hooked(layers[name], name, patch, _rows(patches, patch)):  # type: ignore[arg-type]
                    stack.callback(handle.remove)
        yield


def _rows(patches: Sequence[AttentionPatch | None], patch: AttentionPatch | None) -> Rows:
    def rows(batch: Tensor) -> Tensor:
        chosen = [i for i in range(len(batch)) if patches[i % len(patches)] == patch]
        return torch.tensor(chosen, device=batch.device)

    return rows


def _hooked(layer: Layer, name: str, patch: AttentionPatch, rows: Rows) -> list[Any]:
    """The handles of the hooks that make ``patch`` act on the samples ``rows`` in one layer."""
    block, holder = layer
    if patch.op == "skip":
        return [block.register_forward_hook(_skip(rows), with_kwargs=True)]
    if patch.op == "shuffle":
        return [block.register_forward_pre_hook(_shuffle(rows, name, patch), with_kwargs=True)]
    if patch.op == "identity":
        return [block.attn1.register_forward_hook(_identity(rows), with_kwargs=True)]
    sizes: list[tuple[int, int]] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        height, width = _tokens(args, kwargs).shape[-2:]
        sizes[:] = [(height, width)]

    def blur(_: Any, __: Any, queries: Tensor) -> Tensor:
        chosen = rows(queries)
        return queries.index_copy(0, chosen, blurred(queries[chosen], *sizes[0], patch.blur_sigma).to(queries))

    return [
        holder.register_forward_pre_hook(look, with_kwargs=True),
        block.attn1.to_q.register_forward_hook(blur),
    ]


def _tokens(args: Any, kwargs: Any) -> Tensor:
    """What a module works on: its first argument."""
    return args[0] if args else kwargs["hidden_states"]


def _skip(rows: Rows) -> Any:
    def skip(_: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        chosen = rows(output)
        return output.index_copy(0, chosen, _tokens(args, kwargs)[chosen].to(output))

    return skip


def _shuffle(rows: Rows, name: str, patch: AttentionPatch) -> Any:
    def shuffle(_: Any, args: Any, kwargs: Any) -> Any:
        tokens = _tokens(args, kwargs)
        chosen = rows(tokens)
        changed = tokens.index_copy(0, chosen, shuffled(tokens[chosen], patch, name))
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return shuffle


def _identity(rows: Rows) -> Any:
    def own_values(attention: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        chosen = rows(output)
        values = attention.to_v(_tokens(args, kwargs)[chosen])
        for part in attention.to_out:
            values = part(values)
        return output.index_copy(0, chosen, values.to(output))

    return own_values
