"""Guidance rules, one per file, and the Guider that applies them."""

from __future__ import annotations

from .adaptive import AdaptiveGuidance
from .angle_domain import AngleDomainGuidance
from .apg import AdaptiveProjectedGuidance
from .autoguidance import Autoguidance
from .base import Branch, NodeText, Rule, Stage, Step
from .cfg import CFG
from .cfg_zero_star import CFGZeroStar
from .chains import check_by_uncond, check_chain, check_on_model, check_order
from .classifier import ClassifierGuidance
from .classifier_mean_shift import ClassifierMeanShift
from .classifier_post_step import ClassifierPostStep
from .clip import NoisyCLIPGuidance
from .curve import GuidanceCurve
from .dps import DPS
from .dynamic_threshold import DynamicThresholding
from .freedom import FreeDoM
from .frequency_decoupled import FrequencyDecoupledGuidance
from .guider import Guider
from .lgd import LossGuidedDiffusion
from .limited_interval import LimitedInterval
from .log_prob import LogProbGuidance
from .magnitude_aware import MagnitudeAwareGuidance
from .momentum import MomentumGuidance
from .mpgd import MPGD
from .perp_neg import PerpNeg
from .perturbed_attention import PerturbedAttention
from .rescale import RescaleGuidance
from .run import GuidanceRun
from .schedule import GuidanceSchedule
from .skipped_layers import SkippedLayers
from .sliding_mode import SlidingModeCFG
from .sliding_window import SlidingWindow
from .smoothed_energy import SmoothedEnergy
from .tangential import TangentialCFG
from .tfg import TrainingFreeGuidance
from .token_perturbation import TokenPerturbation
from .two_conditions import TwoConditions
from .universal import UniversalGuidance
from .weakened import WeakenedPass

RULES: tuple[type[Rule], ...] = (
    CFG,
    CFGZeroStar,
    FrequencyDecoupledGuidance,
    AngleDomainGuidance,
    TwoConditions,
    PerpNeg,
    Autoguidance,
    PerturbedAttention,
    SmoothedEnergy,
    SkippedLayers,
    TokenPerturbation,
    SlidingWindow,
    LimitedInterval,
    GuidanceSchedule,
    GuidanceCurve,
    AdaptiveGuidance,
    MagnitudeAwareGuidance,
    AdaptiveProjectedGuidance,
    TangentialCFG,
    SlidingModeCFG,
    RescaleGuidance,
    DynamicThresholding,
    MomentumGuidance,
    ClassifierGuidance,
    ClassifierMeanShift,
    ClassifierPostStep,
    NoisyCLIPGuidance,
    MPGD,
    DPS,
    LossGuidedDiffusion,
    FreeDoM,
    UniversalGuidance,
    TrainingFreeGuidance,
    LogProbGuidance,
)
"""Every rule there is, in menu order. A new rule is a file in this folder and a line here."""

__all__ = [
    "CFG",
    "DPS",
    "MPGD",
    "RULES",
    "AdaptiveGuidance",
    "AdaptiveProjectedGuidance",
    "AngleDomainGuidance",
    "Autoguidance",
    "Branch",
    "CFGZeroStar",
    "ClassifierGuidance",
    "ClassifierMeanShift",
    "ClassifierPostStep",
    "DynamicThresholding",
    "FreeDoM",
    "FrequencyDecoupledGuidance",
    "GuidanceCurve",
    "GuidanceRun",
    "GuidanceSchedule",
    "Guider",
    "LimitedInterval",
    "LogProbGuidance",
    "LossGuidedDiffusion",
    "MagnitudeAwareGuidance",
    "MomentumGuidance",
    "NodeText",
    "NoisyCLIPGuidance",
    "PerpNeg",
    "PerturbedAttention",
    "RescaleGuidance",
    "Rule",
    "SkippedLayers",
    "SlidingModeCFG",
    "SlidingWindow",
    "SmoothedEnergy",
    "Stage",
    "Step",
    "TangentialCFG",
    "TokenPerturbation",
    "TrainingFreeGuidance",
    "TwoConditions",
    "UniversalGuidance",
    "WeakenedPass",
    "check_by_uncond",
    "check_chain",
    "check_on_model",
    "check_order",
]
