"""Text towers of checkpoint folders as ComfyUI CLIPs, with ComfyUI's own tokenizer, chunks and weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.models.files import load_weights

_VOCABULARY = 49408
_PREFIX = "text_model."


def _text_model_weights(weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """CLIPTextModel's state dict with the prefix that newer transformers leave out, and no projection."""
    named = {key if key.startswith((_PREFIX, "text_projection")) else _PREFIX + key: v for key, v in weights.items()}
    named.pop(_PREFIX + "embeddings.position_ids", None)
    named.setdefault("text_projection.weight", torch.eye(width))
    return named


def native_clip(config: Mapping[str, Any], weights: Mapping[str, Tensor], *, pad: int, path: Path) -> comfy.sd.CLIP:
    """A CLIP of a transformers CLIPTextModel.

    Args:
        config: CLIPTextConfig.
        weights: its state dict.
        pad: the token that fills a chunk up, as the checkpoint's tokenizer says (49407, or 0 as in open_clip).
        path: where they come from; named in errors.

    Raises:
        UserError: not CLIP's vocabulary, or weights that do not fill the network.
    """
    if config.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        raise UserError(
            f"a text encoder with {config['vocab_size']} tokens",
            expected=f"CLIP's vocabulary of {_VOCABULARY}",
            mend="train the text encoder on CLIP's tokens; other vocabularies cannot be loaded",
        )
    width = int(config["hidden_size"])
    settings = {**config, "eos_token_id": 49407}  # many configs still say 2, a relic that moves the pooled token

    class TextTower(comfy.sd1_clip.SDClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None
        ) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(settings),
                max_length=int(config.get("max_position_embeddings", 77)),
                special_tokens={"start": 49406, "end": 49407, "pad": pad},
                return_projected_pooled=False,
                model_options=dict(model_options or {}),
            )

    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        max_length=int(config.get("max_position_embeddings", 77)),
        pad_with_end=pad == 49407,
        embedding_size=width,
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=TextTower),
    )
    made = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in weights.values()),
        model_options={"dtype": torch.float32},  # ComfyUI would choose fp16, even on a CPU
    )
    load_weights(
        made.cond_stage_model.clip_l.transformer, _text_model_weights(weights, width), path=path, what="text encoder"
    )
    return made


def encode(clip: comfy.sd.CLIP, text: str) -> Any:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it."""
    if clip is None:
        raise UserError(
            "a checkpoint without a text encoder",
            expected="a CLIP",
            mend="load one with Load Text Encoder",
        )
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
