"""What is known of the latents that a model works on, and whether a network made for others fits them.

Latents of one VAE come at many scales: a model sees ``(z - shift_factor) * scaling_factor`` of the VAE's z, with numbers of its family
(Stable Diffusion 1.5 and SDXL have 4 channels both, and different VAEs and factors). A classifier of other latents does not fail, it
gives nonsense; so these numbers are compared before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..process import Process

CLOSE = 1e-3
"""Largest difference of two scaling or shift factors, relative to the scale, at which latents are the same."""


@dataclass(frozen=True)
class Latents:
    """The latents of a model or of a classifier.

    Attributes:
        name: for people, such as "SDXL"; it decides only where the factors cannot.
        channels: how many.
        scaling_factor: what latents are multiplied by, after the shift; None if every channel has its own.
        shift_factor: what is subtracted from the VAE's latents first.
    """

    name: str
    channels: int
    scaling_factor: float | None
    shift_factor: float = 0.0

    def __str__(self) -> str:
        scaled = "every channel scaled by itself"
        if self.scaling_factor is not None:
            scaled = f"scaling factor {self.scaling_factor:g}" + (
                f", shift {self.shift_factor:g}" if self.shift_factor else ""
            )
        return f"{self.name!r} ({self.channels} channels, {scaled})"

    def same_as(self, other: Latents) -> bool:
        """Whether a network made for one fits the other: by channels and factors, or by name where a channel has its own."""
        if self.channels != other.channels:
            return False
        if self.scaling_factor is None or other.scaling_factor is None:
            return self.name.casefold() == other.name.casefold()
        return math.isclose(self.scaling_factor, other.scaling_factor, rel_tol=CLOSE) and math.isclose(
            self.shift_factor, other.shift_factor, rel_tol=CLOSE, abs_tol=CLOSE / self.scaling_factor
        )


def check_other_model(
    same_network: bool,
    rules: Sequence[str],
    latents: tuple[Latents | None, Latents | None],
    processes: tuple[Process, Process],
) -> None:
    """Refuse a rule's own model that cannot be evaluated beside the guider's.

    Args:
        same_network: whether the two are one network.
        rules: names of rules on the rule's own model.
        latents: those of the guider's model and of the rule's own; None where unknown.
        processes: what x is for each of them.

    Raises:
        UserError: the same network, one of other latents or another process, or one with rules of its own.
    """
    if same_network:
        raise UserError(
            "one model as a rule's own and as the guider's, be it with other patches: a program holds its weights only once",
            expected="another network: smaller, or trained for less long",
            mend="load the rule's model by a loader of its own, from another checkpoint",
        )
    if rules:
        raise UserError(
            f"a rule's own model with rules on it ({', '.join(rules)})",
            expected="a plain model",
            mend="take Apply Guidance to Model out from before the rule",
        )
    mine, theirs = latents
    alike = mine is None or theirs is None or mine.same_as(theirs)
    if not alike or processes[0] != processes[1]:
        on_mine, on_theirs = ("" if alike else f" on {space}" for space in latents)
        raise UserError(
            f"a rule's own model of {processes[1]} latents{on_theirs}, for a guider's of {processes[0]} latents{on_mine}",
            expected="both models on the same latents and the same kind of noise",
            mend="load both models from checkpoints of one family",
        )
