"""What a noisy-latent classifier thinks of finished latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def class_probabilities(classifier: Any, latents: Tensor) -> Tensor:
    """p(label | latent) of clean latents, at the lowest noise level that the classifier was trained on.

    Args:
        classifier: with ``config`` and ``logits``, as guidance rules take it.
        latents: (B, C, h, w), unscaled.

    Returns:
        (B, K) that sum to 1; of a regression head (B, 1), its value.

    Raises:
        UserError: The latents hold NaN or infinity.
    """
    if not bool(torch.isfinite(latents).all()):
        raise UserError(
            "latents that hold NaN or infinity",
            expected="the latents of pictures",
            mend="look at what made them: a guidance_scale much too large does it",
        )
    config = classifier.config
    log_snr = torch.full((len(latents),), float(config.log_snr_range[1]), device=latents.device)
    signal = log_snr.sigmoid().sqrt().reshape(-1, *(1,) * (latents.ndim - 1))
    scaled = (latents.float() - getattr(config, "shift_factor", 0.0)) * config.scaling_factor
    logits = classifier.logits(scaled * signal, log_snr).float()
    return logits if config.head == "regression" else logits.softmax(dim=1)
