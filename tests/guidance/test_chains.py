"""Rules in two nodes: what the earlier does after the combination, the later must not undo."""

from __future__ import annotations

import pytest

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    AdaptiveProjectedGuidance,
    GuidanceSchedule,
    LimitedInterval,
    MomentumGuidance,
    PerturbedAttention,
    RescaleGuidance,
    Rule,
    check_order,
)

ANEW = (CFG(), LimitedInterval(), GuidanceSchedule(), AdaptiveProjectedGuidance())
AFTER = (RescaleGuidance(), MomentumGuidance(), PerturbedAttention())


@pytest.mark.parametrize("later", ANEW, ids=lambda rule: rule.node.id)
@pytest.mark.parametrize("earlier", AFTER, ids=lambda rule: rule.node.id)
def test_what_would_be_lost_is_refused_and_the_other_order_is_not(earlier: Rule, later: Rule) -> None:
    with pytest.raises(UserError) as caught:
        check_order([earlier], [later])
    assert earlier.node.name in str(caught.value) and later.node.name in str(caught.value)
    check_order([later], [earlier])


def test_rules_that_leave_the_combination_alone_may_follow_any() -> None:
    check_order(AFTER, AFTER)
    check_order(ANEW, ANEW)
    check_order(ANEW, ())
    check_order((), ANEW)
