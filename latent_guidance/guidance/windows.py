"""Rules whose window of noise levels holds none of a run's: they would leave the picture as it is, without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ..process import Process
from .base import Rule

log = logging.getLogger("latent_guidance")


def warn_of_closed_windows(rules: Sequence[Rule], process: Process, sigmas: Tensor) -> None:
    """Log a warning for every rule that acts at none of the run's noise levels ``sigmas`` (N + 1,)."""
    levels = sigmas[sigmas > 0].float()
    for rule in rules if len(levels) else ():
        why = rule.closed(process, levels)
        if why:
            log.warning(
                "%s never acts in this run: %s, and the run's noise levels go from %.3g down to %.3g (sigma of %s). "
                "Set sigma_lo and sigma_hi so that some of them lie between; 0 and 1000 cover all.",
                rule.node.name, why, float(levels.max()), float(levels.min()), process.name,
            )  # fmt: skip
