"""The nodes: thin, one file per menu category (samplers have one of their own), without mathematics."""

from __future__ import annotations


def all_nodes() -> dict[str, type]:
    """Node id -> class of every node of the pack, in menu order."""
    from . import conditioning, evaluation, guidance, loaders, samplers, sampling

    found: dict[str, type] = {}
    for module in (loaders, conditioning, guidance, sampling, samplers, evaluation):
        found.update(module.NODES)
    return found


def display_names() -> dict[str, str]:
    """Node id -> display name."""
    return {node_id: node.DISPLAY_NAME for node_id, node in all_nodes().items()}  # type: ignore[attr-defined]
