"""Rules that leave the pictures of a run as they are: said in a warning, since nothing in a picture tells."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ..process import Process
from .base import Rule, Stage

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


def idle_at_one(rules: Sequence[Rule]) -> tuple[str, ...]:
    """Names of the rules that only change how prompt and negative meet, in a chain that leaves it to its host's scale whether they do."""
    if any(rule.stage is Stage.COMBINE for rule in rules):
        return ()
    return tuple(rule.node.name for rule in rules if rule.stage in (Stage.SCALE, Stage.BRANCHES))


def warn_of_no_guidance(names: Sequence[str]) -> None:
    """Log a warning for rules by their ``names``, of :func:`idle_at_one`, in a run whose scale was 1 down to its last noise level."""
    log.warning(
        "%s did nothing in this run: it changes how the prompt is guided away from the negative, and the guidance scale was 1 down to the "
        "last noise level, where it has nothing to change. Put Classifier-Free Guidance (CFG) before it in the chain, or, on a MODEL, set "
        "the sampler's cfg to another value.",
        " and ".join(names),
    )
