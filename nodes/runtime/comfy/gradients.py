"""What autograd needs of ComfyUI's objects: nodes run in inference mode, and what they made is not fit for a graph as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance.gradient import normal, normal_parameters_, same_kind

log = logging.getLogger("latent_guidance")
FLAG = "--disable-dynamic-vram"


def plain_patcher(patcher: Any, what: str) -> Any:
    """A patcher of the same network whose weights autograd may keep until the backward pass.

    Newer ComfyUIs (0.33, on NVIDIA) page weights in and out under a *dynamic* patcher, through buffers that the next layer writes over:
    what autograd has saved of them is no longer there, or another layer's, when it goes back. ComfyUI makes a plain patcher of
    the same MODEL, patches and all, for what cannot bear that (hooks, torch.compile), by loading the file once more; it is kept
    with the MODEL it was made of.

    Args:
        patcher: a ModelPatcher of any kind.
        what: what needs it, for the log and the error.

    Raises:
        UserError: a dynamic patcher whose loader has not told ComfyUI how to load it again.
    """
    if not is_dynamic(patcher):
        return patcher
    if getattr(patcher, "cached_patcher_init", None) is None:
        raise UserError(
            f"{what} under ComfyUI's dynamic VRAM, by a loader that cannot load it a second time without",
            expected="one whose weights stay where they are until the backward pass",
            mend=f"start ComfyUI with {FLAG}, or load it with ComfyUI's own loaders or with those of this pack",
        )
    log.info("%s: it is loaded once more, without dynamic VRAM, since autograd goes through it.", what)
    return patcher.get_non_dynamic_delegate()


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI pages the weights of a patcher in and out while it runs."""
    asked = getattr(patcher, "is_dynamic", None)
    return asked is not None and bool(asked())


def check_differentiable(model: Any, *conditionings: Any, why: str) -> None:
    """Refuse what hands a part of the call to networks that autograd cannot pass through.

    Args:
        model: the MODEL.
        conditionings: those that it is evaluated on.
        why: what differentiates through it.

    Raises:
        UserError: clones of the MODEL on other GPUs, or a ControlNet under dynamic VRAM.
    """
    if model.get_additional_models_with_key("multigpu") or model.model_options.get("multigpu_clones"):
        raise UserError(
            f"a MODEL that is spread over several GPUs, and {why}",
            expected="a MODEL on one GPU, in which one graph holds the whole call",
            mend="take the multi-GPU node out, or use a rule at the estimate itself, such as MPGD",
        )
    for entry in [entry for conditioning in conditionings for entry in conditioning or ()]:
        control = entry[1].get("control")
        if control is not None and any(is_dynamic(patcher) for patcher in control.get_models()):
            raise UserError(
                f"a ControlNet under ComfyUI's dynamic VRAM, and {why}",
                expected="one whose weights stay where they are until the backward pass",
                mend=f"start ComfyUI with {FLAG}, take the ControlNet out, or use a rule at the estimate itself, such as MPGD",
            )


def normal_conds(conds: Any) -> Any:
    """Processed conditions (lists of dicts with COND objects) with every inference tensor cloned; what is no tensor is shared."""
    if isinstance(conds, Mapping):
        return {key: _control(value) if key == "control" else normal_conds(value) for key, value in conds.items()}
    if isinstance(conds, list | tuple):
        return same_kind(conds, [normal_conds(entry) for entry in conds])
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
    their own.

    Newer ComfyUIs (0.33) have kernels for Flux and its like that autograd cannot pass through; they leave them aside where one trains,
    and so here.
    """
    normal_parameters_(model)
    management = comfy.model_management
    training: bool | None = getattr(management, "in_training", None)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        if training is not None:
            management.in_training = True
        yield
    finally:
        if training is not None:
            management.in_training = training
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
