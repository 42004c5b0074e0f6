"""The UNet: diffusers' UNet2DConditionModel, and the ways of letting a condition in.

==================  =======================================================================================
cross-attention     ``token_width``: every CrossAttn block attends to a sequence of tokens
AdaGN scale-shift   ``vector_width`` with ``vector_in="scale_shift"``: a projected vector joins the time embedding,
                    which scales and shifts the channels after each group norm (arXiv 2105.05233, section 3)
addition            ``vector_in="addition"``: the same vector is added to the channels instead
class embedding     ``class_count``: a table of one vector per class joins the time embedding
==================  =======================================================================================

Time itself comes in by the way that ``vector_in`` names. A condition is a mapping with the entries that the network
takes, ``tokens`` (B, L, token_width), ``vector`` (B, vector_width), ``label`` (B,) int64; tokens alone may come bare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import AttentionPatch
from ..denoiser import Cond, NetworkDenoiser
from ..errors import UserError
from ..schedules import schedule_from_config
from . import attention
from .configs import smallest_side, too_small

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

VECTOR_IN = {"scale_shift": "scale_shift", "addition": "default"}


def unet_config(
    *,
    latent_channels: int = 4,
    sample_size: int = 16,
    channels: Sequence[int] = (128, 128, 128),
    attention: Sequence[bool] = (False, True, True),
    layers: int = 1,
    heads: int = 4,
    token_width: int | None = 128,
    vector_in: str = "scale_shift",
    vector_width: int | None = None,
    class_count: int | None = None,
) -> dict[str, Any]:
    """UNet2DConditionModel's arguments.

    Args:
        latent_channels: Channels of x.
        sample_size: Side of the training latents.
        channels: Per level, multiples of 32 (ComfyUI's network has 32 norm groups); more than 32 for "addition".
        attention: Per level, whether it attends to tokens; the middle does if any does.
        layers: Residual blocks per level.
        heads: Attention heads (diffusers' ``attention_head_dim`` holds the *number* of heads, as in Stable Diffusion 1).
        token_width: Channels of a token; None for a network without cross-attention.
        vector_in: "scale_shift" (AdaGN) or "addition".
        vector_width: Channels of a condition vector; None for none.
        class_count: Rows of the class table; None for none.

    Raises:
        UserError: The options contradict each other.
    """
    if vector_in not in VECTOR_IN:
        raise UserError(
            f"vector_in={vector_in!r}", expected=f"one of {', '.join(VECTOR_IN)}", mend="choose one of them"
        )
    if vector_width is not None and class_count is not None:
        raise UserError(
            "A UNet with both a condition vector and a class table",
            expected="at most one of vector_width and class_count",
            mend="leave one of them out",
        )
    if len(channels) != len(attention) or any(count % 32 for count in channels):
        raise UserError(
            f"channels {tuple(channels)} and attention {tuple(attention)}",
            expected="one entry per level in both, channels being multiples of 32",
            mend="correct the lists",
        )
    if vector_in == "addition" and min(channels) <= 32:
        raise UserError(
            f"channels {tuple(channels)} with vector_in='addition'",
            expected="more than 32 channels per level: a norm group of one channel takes out again what is added to it",
            mend="widen the network, or let the condition in by scale_shift",
        )
    attends = [wanted and token_width is not None for wanted in attention]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if wanted else "DownBlock2D" for wanted in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if any(attends) else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if wanted else "UpBlock2D" for wanted in reversed(attends)],
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "attention_head_dim": heads,
        "cross_attention_dim": token_width if token_width is not None else channels[-1],
        "resnet_time_scale_shift": VECTOR_IN[vector_in],
        "norm_num_groups": 32,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if vector_width is not None:
        config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": vector_width}
    if class_count is not None:
        config["num_class_embeds"] = class_count
    return config


def new_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet with fresh random weights (from torch's global generator); ``config`` as from :func:`unet_config`."""
    from diffusers import UNet2DConditionModel

    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**known)


class ConditionedUNet:
    """The UNet as a plain function ``network(x, timestep, cond) -> output``.

    Args:
        unet: diffusers' UNet2DConditionModel.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        config = unet.config
        self.needs: tuple[str, ...] = ()
        kinds = (*config["down_block_types"], *config["up_block_types"], config["mid_block_type"])
        if any("CrossAttn" in str(kind) for kind in kinds):
            self.needs += ("tokens",)
        if config["class_embed_type"] == "projection":
            self.needs += ("vector",)
        if config["num_class_embeds"] is not None:
            self.needs += ("label",)
        channels = list(config["block_out_channels"])
        narrowest = map(min, channels, channels[:1] + channels)  # a level's first norm is of the channels that come in
        self.smallest = smallest_side(narrowest, config["norm_num_groups"], padding=config["downsample_padding"])

    def check_patch(self, patch: AttentionPatch) -> None:
        """Refuse a change of attention in layers that the network has not got."""
        attention.check_patch(self.unet, patch)

    def patched(self, patches: Sequence[AttentionPatch | None]) -> AbstractContextManager[None]:
        """In this context sample i of a call goes through with ``patches[i]``; see :func:`.attention.patched`."""
        return attention.patched(self.unet, patches)

    def __call__(self, x: Tensor, timestep: Tensor, cond: Cond = None) -> Tensor:
        """x (B, C, H, W) in the network's own scale, timestep (B,), cond as in the module's docstring.

        Raises:
            UserError: An entry of the condition is missing, the tokens have another width, or x is too small.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise too_small("UNet", x.shape[-2], x.shape[-1], self.smallest)
        entries: dict[str, Any] = {"tokens": cond} if isinstance(cond, Tensor) else dict(cond or {})
        absent = [name for name in self.needs if entries.get(name) is None]
        if absent:
            raise UserError(
                f"The UNet was given the conditions {sorted(entries) or 'none'}",
                expected=f"also {', '.join(absent)}",
                mend="encode a prompt (the empty one for no condition) with this checkpoint's text encoder",
            )
        unet = self.unet
        tokens = entries["tokens"] if "tokens" in self.needs else None
        width = int(unet.config["cross_attention_dim"])
        if tokens is not None and tokens.shape[-1] != width:
            raise UserError(
                f"Tokens of width {tokens.shape[-1]} for a UNet that attends to width {width}",
                expected="the encodings of this checkpoint's own text encoder",
                mend="load MODEL and CLIP from the same checkpoint",
            )
        which = "vector" if "vector" in self.needs else "label"
        output = unet(
            x.to(unet.dtype),
            timestep,
            encoder_hidden_states=None if tokens is None else tokens.to(unet.dtype),
            class_labels=entries[which] if which in self.needs else None,
        )
        return output.sample


def empty_cond(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A condition of zeros with everything that ``unet`` takes, for one sample."""
    config, needs = unet.config, ConditionedUNet(unet).needs
    zeros = {
        "tokens": lambda: torch.zeros(1, 2, config["cross_attention_dim"]),
        "vector": lambda: torch.zeros(1, config["projection_class_embeddings_input_dim"]),
        "label": lambda: torch.zeros(1, dtype=torch.int64),
    }
    return {name: zeros[name]() for name in needs}


def network_denoiser(unet: UNet2DConditionModel, scheduler_config: Mapping[str, Any]) -> NetworkDenoiser:
    """The UNet as a Denoiser under the schedule and parameterization of ``scheduler_config``.

    A UNet of twice as many output as input channels predicts a variance too (a learned range).

    Raises:
        UserError: Another number of output channels.
    """
    schedule, parameterization = schedule_from_config(scheduler_config)
    inputs, outputs = int(unet.config["in_channels"]), int(unet.config["out_channels"])
    if outputs not in (inputs, 2 * inputs):
        raise UserError(
            f"A UNet from {inputs} to {outputs} channels",
            expected=f"{inputs} output channels, or {2 * inputs} with a learned variance",
            mend="use a UNet that denoises latents",
        )
    return NetworkDenoiser(ConditionedUNet(unet), parameterization, schedule, learned_range=outputs == 2 * inputs)
