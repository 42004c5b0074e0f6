"""Every rule in a real ComfyUI: alone, beside each of core's own guidance nodes, and in a covering sample of pairs."""

from __future__ import annotations

from typing import Any

import pytest

from latent_guidance.guidance import RULES

ACTS = 1e-4
"""Smallest difference, relative to the spread of the latents, that counts as an effect; rounding is about 1e-6 here."""
EVERYWHERE = {
    "CFGZeroStar", "CFGNorm", "TCFG", "APG", "Mahiro", "EpsilonScaling", "PerturbedAttentionGuidance", "SelfAttentionGuidance",
    "FreeU_V2", "FreSca", "LatentApplyOperationCFG",
}  # fmt: skip
"""Core's nodes in both versions that act before or after the combination, and so beside a rule that combines."""
NEWER = {"TemporalScoreRescaling", "NAGuidance"}
"""Those that not every version has."""
REPLACED = {"RescaleCFG", "RenormCFG", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance"}
"""Core's nodes that combine prompt and negative in their own way, the place of which a rule that combines takes (it is said)."""
NOTHING_TO_DO = {f"{node} + LGAutoguidance" for node in ("CFGZeroStar", "TCFG", "FreSca")} | {
    "CFGZeroStar + LGAdaptiveGuidance"
}
"""Where a node goes by the negative's estimate and the rule has it evaluated at no step, or at none at which the node acts."""
ONLY_IN_A_GUIDER = {
    "LGTwoConditions", "LGPerpNeg", "LGAutoguidance", "LGClassifierMeanShift", "LGClassifierPostStep", "LGDPS",
    "LGLossGuidedDiffusion", "LGFreeDoM", "LGUniversalGuidance", "LGTrainingFreeGuidance",
}  # fmt: skip
"""Rules that ask for what a MODEL under another guider does not have: conditions, models, gradients, or a place in the sampler."""
ONE_ACTS = {"LGLimitedInterval + LGDynamicThresholding", "LGGuidanceSchedule + LGGuidanceCurve"}
"""Pairs of which one leaves the other nothing: no guidance where a threshold would be passed; a curve sets the scale, whatever it was."""
SAME = 1e-4


def wrong(found: dict[str, dict[str, Any]], *differences: str) -> dict[str, dict[str, Any]]:
    """The results that are not finite, or do not differ as they should."""
    return {
        name: values
        for name, values in found.items()
        if not (values["finite"] and all(values[each] > ACTS for each in differences))
    }


def test_every_rule_acts_and_stays_finite(measured: dict[str, Any]) -> None:
    assert measured["not made"] == []
    assert set(measured["alone"]) == {rule.node.id for rule in RULES}
    assert wrong(measured["alone"], "from unguided") == {}
    acting = {name: values for name, values in measured["alone"].items() if name != "LGCFG"}
    assert wrong(acting, "from cfg") == {}


@pytest.mark.parametrize("way", ["CFGGuider", "KSampler", "BasicGuider"])
def test_a_rule_on_the_model_is_the_rule_in_the_guider(measured: dict[str, Any], way: str) -> None:
    on_model = {name: found[way] for name, found in measured["on the model"].items() if found[way] is not None}
    assert {name: found for name, found in on_model.items() if not found <= SAME} == {}
    assert len(on_model) >= (20 if way == "BasicGuider" else 24)
    assert set(measured["on the model"]) | ONLY_IN_A_GUIDER == {rule.node.id for rule in RULES}
    refused = measured["only in a guider"]
    assert set(refused) == ONLY_IN_A_GUIDER
    assert all(error.startswith("UserError") and name in error for error, name in refused.values()), refused


def test_every_rule_acts_beside_each_of_cores_nodes(measured: dict[str, Any]) -> None:
    ran = {name for name, refused in measured["core"].items() if not refused}
    assert ran - NEWER == EVERYWHERE | REPLACED, measured["core"]
    assert {measured["core"][name] for name in NEWER - ran} <= {"not in this version"}
    assert measured["core refused"] == {}
    beside = measured["core beside"]
    assert len(beside) == len(ran) * len(RULES)
    assert wrong(beside, "from unguided") == {}
    assert (
        wrong({pair: found for pair, found in beside.items() if not pair.endswith(" + LGCFG")}, "from the node") == {}
    )


def test_each_of_cores_nodes_acts_beside_every_rule_or_is_replaced(measured: dict[str, Any]) -> None:
    replaced = {pair: found for pair, found in measured["core beside"].items() if pair.split(" + ")[0] in REPLACED}
    acting = {pair: found for pair, found in measured["core beside"].items() if pair not in replaced}
    assert set(wrong(acting, "from the rule")) == NOTHING_TO_DO
    assert len(replaced) == len(REPLACED) * len(RULES)
    assert all(found["from the rule"] <= SAME for found in replaced.values())


def test_both_act_where_the_rule_is_on_the_model(measured: dict[str, Any]) -> None:
    """Also core's nodes that combine in their own way: a rule on the model that does not combine leaves them their place."""
    found, ran = measured["core under a patch"], [name for name, refused in measured["core"].items() if not refused]
    assert measured["core under a patch refused"] == {} and len(found) == 4 * len(ran)
    assert wrong(found, "from the node", "from the rule") == {}


def test_hypertile_acts_beside_a_classifier(measured: dict[str, Any]) -> None:
    found = measured["HyperTile"]
    assert found["from the node"] > ACTS and found["from the rule"] > ACTS and found["patch"] <= SAME


def test_a_sample_of_pairs_acts_and_stays_finite_or_is_refused_by_name(measured: dict[str, Any]) -> None:
    pairs = measured["pairs"]
    seen = {name for pair in pairs for name in pair.split(" + ")}
    assert seen == {rule.node.id for rule in RULES} and len(pairs) > len(RULES)
    assert wrong(pairs, "from unguided") == {}
    both = {
        pair: found for pair, found in pairs.items() if "LGCFG" not in pair.split(" + ")
    }  # it is in the others' chains
    assert set(wrong(both, "from the first", "from the second")) == ONE_ACTS
    for error, *names in measured["refused"].values():
        assert error.startswith("UserError") and all(name in error for name in names), error
