"""What may stand in the config.json of a network: checked field by field, before anything is built or allocated.

Only fields are checked that decide how large a network is, or that would make it another network than this library runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UserError, shown
from .files import read_json
from .text_encoder import VOCABULARY
from .tokenizer import CHUNK_LENGTH

MAX_WIDTH, MAX_LEVELS, MAX_LAYERS = 65_536, 12, 128
DEFAULT_SCALING_FACTOR = 0.18215
"""What diffusers takes for a VAE that does not say."""
Field: TypeAlias = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what fits, in words."""


def is_number(value: object) -> bool:
    """Whether ``value`` is a number that fits a float, and no truth value."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -1e300 < value < 1e300


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether ``value`` is a whole number from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Field:
    return (lambda value: is_whole(value, low, high)), f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> Field:
    return (lambda value: is_number(value) and low <= value <= high), f"a number from {low:g} to {high:g}"


def _one_of(*values: object) -> Field:
    names = " or ".join("null" if value is None else str(value) for value in values)
    return (lambda value: any(value == known and type(value) is type(known) for known in values)), names


def _or_null(field: Field) -> Field:
    return (lambda value: value is None or field[0](value)), f"{field[1]}, or null"


def _levels(field: Field) -> Field:
    def fits(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and 1 <= len(value) <= MAX_LEVELS and all(map(field[0], value))

    return fits, f"a list of 1 to {MAX_LEVELS} entries, each {field[1]}"


def _each_level(field: Field) -> Field:
    """One value for all levels, or a list of them (which may hold a list for the blocks of a level)."""
    deep = _levels((lambda value: field[0](value) or _levels(field)[0](value), field[1]))
    return (lambda value: field[0](value) or deep[0](value)), f"{field[1]}, or one for each level"


_NAME: Field = ((lambda value: isinstance(value, str) and len(value) <= 100), "the name of a block")
_WIDTHS = _levels(_whole(1, MAX_WIDTH))
_ACTIVATION = _one_of("silu", "swish", "mish", "gelu", "relu")

VAE_FIELDS: dict[str, Field] = {
    "in_channels": _one_of(3),
    "out_channels": _one_of(3),
    "latent_channels": _whole(1, MAX_WIDTH),
    "block_out_channels": _WIDTHS,
    "down_block_types": _levels(_NAME),
    "up_block_types": _levels(_NAME),
    "layers_per_block": _whole(1, MAX_LAYERS),
    "norm_num_groups": _whole(1, MAX_WIDTH),
    "act_fn": _ACTIVATION,
    "scaling_factor": (lambda value: is_number(value) and 0 < value <= 1e6, "a number above 0, at most 1000000"),
}
UNET_FIELDS: dict[str, Field] = {
    "in_channels": _whole(1, MAX_WIDTH),
    "out_channels": _whole(1, MAX_WIDTH),
    "block_out_channels": _WIDTHS,
    "down_block_types": _levels(_NAME),
    "up_block_types": _levels(_NAME),
    "cross_attention_dim": _whole(1, MAX_WIDTH),
    "mid_block_type": _one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "layers_per_block": _each_level(_whole(1, MAX_LAYERS)),
    "transformer_layers_per_block": _each_level(_whole(0, MAX_LAYERS)),
    "attention_head_dim": _each_level(_whole(1, MAX_WIDTH)),
    "num_attention_heads": _or_null(_each_level(_whole(1, MAX_WIDTH))),
    "norm_num_groups": _or_null(_whole(1, MAX_WIDTH)),
    "norm_eps": _number(0, 1),
    "act_fn": _ACTIVATION,
    "downsample_padding": _one_of(0, 1),
    "conv_in_kernel": _one_of(1, 3, 5, 7),
    "conv_out_kernel": _one_of(1, 3, 5, 7),
    "freq_shift": _one_of(0, 1),
    "time_embedding_type": _one_of("positional", "fourier"),
    "time_embedding_dim": _or_null(_whole(1, MAX_WIDTH)),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "class_embed_type": _one_of("projection", None),
    "projection_class_embeddings_input_dim": _or_null(_whole(1, MAX_WIDTH)),
    "num_class_embeds": _or_null(_whole(1, 2**20)),
    "addition_embed_type": _one_of(None),
    "encoder_hid_dim": _one_of(None),
    "encoder_hid_dim_type": _one_of(None),
}
TEXT_FIELDS: dict[str, Field] = {
    "hidden_size": _whole(1, MAX_WIDTH),
    "num_attention_heads": _whole(1, MAX_WIDTH),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "intermediate_size": _whole(1, MAX_WIDTH),
    "hidden_act": _one_of("quick_gelu", "gelu"),
    "vocab_size": _whole(VOCABULARY, 2**20),
    "max_position_embeddings": _whole(CHUNK_LENGTH, MAX_WIDTH),
    "layer_norm_eps": _one_of(1e-5),
}
_VAE_NEEDED = tuple(VAE_FIELDS)[:6]
_UNET_NEEDED = tuple(UNET_FIELDS)[:6]
_TEXT_NEEDED = tuple(TEXT_FIELDS)[:7]
_NETWORKS = {
    "UNet": "a UNet that takes its condition as tokens, as one projected vector, or as a class",
    "VAE": "an AutoencoderKL for RGB pictures",
    "text encoder": "a CLIP text encoder with CLIP's vocabulary",
}


def check_vae_config(config: Mapping[str, Any], path: Path, *, shifted: bool = False) -> None:
    """Refuse what is no AutoencoderKL for RGB pictures, and latents that are more than multiplied by a factor.

    Args:
        config: of diffusers' AutoencoderKL.
        path: where it comes from; named in errors.
        shifted: whether the caller minds a ``shift_factor`` that is taken off first (SD3, Flux); otherwise it is refused.

    Raises:
        UserError: A field is missing or out of its range; or a shift, a mean or a standard deviation per channel.
    """
    shift = config.get("shift_factor")
    if shifted and shift is not None and not (is_number(shift) and abs(shift) <= 1e6):
        raise UserError(
            f"{path} describes a VAE with shift_factor {shown(shift)}",
            expected="a number",
            mend="use the config that came with the weights",
        )
    for name in ("latents_mean", "latents_std") if shifted else ("shift_factor", "latents_mean", "latents_std"):
        if config.get(name):
            raise UserError(
                f"{path} describes a VAE with {name} {shown(config[name])}",
                expected="a VAE whose latents are only multiplied by scaling_factor",
                mend="use another VAE, or the loaders of ComfyUI for this model",
            )
    _check("VAE", config, path, VAE_FIELDS, "AutoencoderKL", _VAE_NEEDED)
    _check_levels("VAE", config, path)


def check_unet_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a UNet2DConditionModel of absurd size, or one that takes a condition which this library does not give.

    Raises:
        UserError: A field is missing or out of its range.
    """
    _check("UNet", config, path, UNET_FIELDS, "UNet2DConditionModel", _UNET_NEEDED)
    _check_levels("UNet", config, path)


def check_text_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a text tower that cannot read CLIP's tokens in chunks of 77.

    Raises:
        UserError: A field is missing or out of its range.
    """
    _check("text encoder", config, path, TEXT_FIELDS, None, _TEXT_NEEDED)
    if config["hidden_size"] % config["num_attention_heads"]:
        raise _unfit("text encoder", path, config, "num_attention_heads", f"a divisor of {config['hidden_size']}")


def read_vae_config(folder: Path, *, shifted: bool = False) -> dict[str, Any]:
    """``folder/config.json``, checked (``shifted``: see :func:`check_vae_config`); the other readers likewise."""
    config = read_json(folder / "config.json")
    check_vae_config(config, folder / "config.json", shifted=shifted)
    return config


def read_unet_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    check_unet_config(config, folder / "config.json")
    return config


def read_text_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    check_text_config(config, folder / "config.json")
    return config


def smallest_side(channels: Iterable[int], groups: int | None, *, padding: int = 1) -> int:
    """The smallest latent side that a network takes which halves its maps from level to level.

    A group norm cannot tell one single value from its mean, so that no level may come down to one value per group.

    Args:
        channels: Of each level.
        groups: Of the norms; None for none.
        padding: 1 where a side is halved upwards (5 to 3), 0 where downwards (5 to 2).
    """
    needed = [2 if groups is not None and count // groups <= 1 else 1 for count in channels]
    if padding:
        return max((side - 1) * 2**level + 1 for level, side in enumerate(needed))
    return max(side * 2**level for level, side in enumerate(needed))


def too_small(what: str, height: int, width: int, least: int, *, ratio: int = 8) -> UserError:
    """The error for latents smaller than :func:`smallest_side`; ``ratio`` is the VAE's, pixels per latent."""
    side = ratio * least
    return UserError(
        f"latents of {width}x{height} for a {what}",
        expected=f"at least {least}x{least} for this network, which are pictures of {side}x{side} pixels at {ratio} pixels per latent",
        mend=f"set width and height to at least {side}",
    )


def _check(
    what: str,
    config: Mapping[str, Any],
    path: Path,
    fields: Mapping[str, Field],
    class_name: str | None,
    needed: Iterable[str],
) -> None:
    given = config.get("_class_name")
    missing = [name for name in needed if name not in config]
    if missing or (class_name is not None and given not in (None, class_name)):
        raise UserError(
            f"{path} describes {given or 'no network'}" + (f" and lacks {', '.join(missing)}" if missing else ""),
            expected=f"the config of {class_name or 'a CLIPTextModel'}",
            mend="give the folder of the right component",
        )
    for name, (fits, expected) in fields.items():
        if name in config and not fits(config[name]):
            raise _unfit(what, path, config, name, expected)


def _check_levels(what: str, config: Mapping[str, Any], path: Path) -> None:
    count = len(config["block_out_channels"])
    for name in (
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
        "num_attention_heads",
    ):
        value = config.get(name)
        if isinstance(value, (list, tuple)) and len(value) != count:
            raise _unfit(what, path, config, name, f"{count} entries, one for each of block_out_channels")


def _unfit(what: str, path: Path, config: Mapping[str, Any], name: str, expected: str) -> UserError:
    return UserError(
        f"{path} gives a {what} {name} = {shown(config[name])}",
        expected=f"{expected}, in the config of {_NETWORKS[what]}",
        mend=f"use a checkpoint with such a {what}; if this one was, copy its config.json again",
    )
