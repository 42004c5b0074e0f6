"""What autograd needs of ComfyUI's objects: nodes run in inference mode, and what they made is not fit for a graph as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....latent_guidance.guidance.gradient import normal, normal_parameters_


def normal_conds(conds: Any) -> Any:
    """Processed conditions (lists of dicts with COND objects) with every inference tensor cloned; what is no tensor is shared."""
    if isinstance(conds, Mapping):
        return {key: _control(value) if key == "control" else normal_conds(value) for key, value in conds.items()}
    if isinstance(conds, list | tuple):
        return type(conds)(normal_conds(entry) for entry in conds)
    if hasattr(conds, "cond") and hasattr(conds, "process_cond"):
        copied = copy.copy(conds)
        copied.cond = normal(conds.cond)
        return copied
    return normal(conds)


def _control(control: Any) -> Any:
    """A ControlNet, and those before it, with normal parameters and hints."""
    one = control
    while one is not None:
        network = getattr(one, "control_model", None)
        if isinstance(network, nn.Module):
            normal_parameters_(network)
        for name in ("cond_hint", "cond_hint_original"):
            if isinstance(getattr(one, name, None), Tensor):
                setattr(one, name, normal(getattr(one, name)))
        one = getattr(one, "previous_controlnet", None)
    return control


@contextmanager
def through(model: Any) -> Iterator[None]:
    """In this context autograd can pass through a BaseModel: its tensors are normal, and its parameters collect no gradient of
    their own."""
    normal_parameters_(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def unscaled(model: Any, latents: Tensor) -> Tensor:
    """Latents as the model's VAE has them, of those that the model has; attached to the graph."""
    format = model.latent_format
    with torch.inference_mode(False):
        for name, value in list(vars(format).items()):
            if isinstance(value, Tensor):
                setattr(format, name, normal(value))
    return model.process_latent_out(latents)
