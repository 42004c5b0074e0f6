"""Which rules can act together, on a model, or under which sampler: said in words before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .base import Rule, Stage


def check_chain(rules: Sequence[Rule]) -> None:
    """Refuse chains that cannot act together.

    Raises:
        UserError: a rule for a sampler's step among them, two rules that combine the branches, a rule that changes or compares
            branches which the one that combines does not go by, or one rule twice.
    """
    for rule in rules:
        if rule.stage is Stage.STEP:
            raise UserError(
                f"the rule {rule.node.name!r} in a guider",
                expected="rules that act on the denoised estimate",
                mend=f"connect {rule.node.name!r} to the rules input of the DDPM sampler node instead",
            )
    combining = [rule for rule in rules if rule.stage is Stage.COMBINE]
    if len(combining) > 1:
        raise UserError(
            "two rules that combine the conditional and unconditional estimates: "
            + " and ".join(rule.node.name for rule in combining),
            expected="at most one",
            mend="take one of them out of the chain (of the guider, or of the model that it guides)",
        )
    for own in combining:
        for rule in rules:
            changes = rule.stage is Stage.BRANCHES and own.branches()
            if changes or (not own.uses_uncond and (rule.stage is Stage.BRANCHES or rule.looks_at_branches)):
                raise UserError(
                    f"the rule {rule.node.name!r}, which goes by prompt and negative, beside {own.node.name!r}, which goes by others",
                    expected=f"{rule.node.name!r} with a rule that guides from the negative to the prompt, such as CFG",
                    mend="take one of the two out of the chain",
                )
    for i, rule in enumerate(rules):
        if any(rule.does_the_same_as(other) for other in rules[:i]):
            raise UserError(
                f"the rule {rule.node.name!r} twice, with the same settings",
                expected="every rule once: in the guider or on the model",
                mend=f"take one {rule.node.name!r} out, or raise its strength instead",
            )


def combining_anew(rules: Sequence[Rule]) -> list[str]:
    """Display names of the rules that, in a node of their own, combine the branches again."""
    return [rule.node.name for rule in rules if rule.stage in (Stage.SCALE, Stage.BRANCHES, Stage.COMBINE)]


def check_order(first: Sequence[Rule], then: Sequence[Rule]) -> None:
    """Refuse rules of two nodes, of which the later would do away with what the earlier has done.

    Within a chain rules act in the order of their stages. Nodes act one after the other (a guider before what is on its model): rules for
    the scale, the branches or their combination combine the branches anew, without what came after the combination before.

    Args:
        first: rules of the node that acts first.
        then: of the one that acts on its estimate.

    Raises:
        UserError: such rules.
    """
    done = [rule.node.name for rule in first if rule.stage in (Stage.POST, Stage.GRADIENT)]
    anew = combining_anew(then)
    if done and anew:
        raise UserError(
            f"{' and '.join(anew)} in a node that acts after {' and '.join(done)}: prompt and negative would be combined anew, and what "
            f"{' and '.join(done)} did would be lost",
            expected="these rules in one chain, where each acts in its place",
            mend=f"connect them all to the rules input of one node (on a model, {' and '.join(anew)} may also come in an earlier "
            "Apply Guidance to Model)",
        )


def check_on_model(rules: Sequence[Rule]) -> None:
    """Refuse rules that cannot act on a model under a guider which knows only a prompt and a negative.

    Raises:
        UserError: rules that go by a condition or a model of their own, or that differentiate through the denoiser. Weakened passes of
            the prompt are not refused.
    """
    for rule in rules:
        if rule.may_differentiate():
            raise UserError(
                f"the rule {rule.node.name!r} on a model, where the estimate comes without its gradient",
                expected="it in a guider, which evaluates the model for it",
                mend="connect the rule to Guider and sample with SamplerCustomAdvanced, or use MPGD, which needs no gradient "
                "through the model",
            )
        if any(branch.model is not None or branch.cond != "cond" for branch in rule.branches()):
            raise UserError(
                f"the rule {rule.node.name!r} on a model, where only prompt and negative are evaluated",
                expected="it in a guider, which evaluates what it asks for",
                mend="connect the rule to Guider and sample with SamplerCustomAdvanced",
            )


def check_by_uncond(rules: Sequence[Rule]) -> None:
    """Refuse rules that have no meaning under a CFG++ sampler, whose scale is 0 where nothing guides.

    Raises:
        UserError: rules for the scale whose neutral value 1 is full guidance there.
    """
    for rule in rules:
        if rule.rests_at_one:
            raise UserError(
                f"the rule {rule.node.name!r} with a CFG++ sampler",
                expected="a scale that stays as it is set: where this rule stops guiding it sets the scale to 1, which is neutral for "
                "other samplers and strong guidance in CFG++ (there 0 is none)",
                mend=f"take {rule.node.name!r} out of the chain, or use another sampler; Guidance Curve can set the scale by noise level",
            )
