"""One node per guidance rule and one per ready-made loss, made from the rules and losses themselves."""

from __future__ import annotations

from ..latent_guidance.guidance import RULES
from ..latent_guidance.guidance.losses import LOSSES
from .from_loss import node_from_loss
from .from_rule import node_from_rule

NODES: dict[str, type] = {rule.node.id: node_from_rule(rule) for rule in RULES}
NODES |= {loss.node.id: node_from_loss(loss) for loss in LOSSES}
