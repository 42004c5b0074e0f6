"""Ready-made losses for x0-space guidance, one per file, and what a loss is (:mod:`.base`)."""

from __future__ import annotations

from .base import SPACES, Loss, ReadyLoss, at_step, loss_values, name_of, networks_of, parts_of
from .class_label import ClassLabel
from .clip_text import CLIPText
from .edges import SketchEdges
from .masked import MaskedLoss
from .palette import ColourPalette
from .reference import ReferenceLatent
from .symmetry import Symmetry
from .weighted_sum import WeightedSum

LOSSES: tuple[type[ReadyLoss], ...] = (
    ReferenceLatent,
    ColourPalette,
    SketchEdges,
    Symmetry,
    ClassLabel,
    CLIPText,
    MaskedLoss,
    WeightedSum,
)
"""Every ready-made loss there is, in menu order. A new one is a file in this folder and a line here."""

__all__ = [
    "LOSSES",
    "SPACES",
    "CLIPText",
    "ClassLabel",
    "ColourPalette",
    "Loss",
    "MaskedLoss",
    "ReadyLoss",
    "ReferenceLatent",
    "SketchEdges",
    "Symmetry",
    "WeightedSum",
    "at_step",
    "loss_values",
    "name_of",
    "networks_of",
    "parts_of",
]
