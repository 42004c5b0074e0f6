r"""What a classifier is asked for: from a line of text to log p(y | x) as a function of its logits.

| text                    | combine | log p                                                          |
|-------------------------|---------|----------------------------------------------------------------|
| ``flags``               | any/all | log p(flags)                                                   |
| ``flags, symbols``      | any     | log(p(flags) + p(symbols)): one of them, no matter which        |
| ``flags:3, symbols:1``  | any     | log(3 p(flags) + p(symbols))                                   |
| ``flags:0.7, symbols:0.3`` | all  | 0.7 log p(flags) + 0.3 log p(symbols): soft labels              |
| ``not flags``           | any/all | log(1 - p(flags)): away from it                                |
| ``up`` / ``down``       |         | + / - the value of a regression head                           |

A label may be written in any case, with double quotes around it if it holds a comma or a colon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from ..errors import UserError

COMBINE = ("any", "all")

LONGEST = 10_000
"""Characters of a target at most."""

_TERM = re.compile(r'(?:"[^"]*"|[^",])+')  # the text between commas; each character can be matched in one way only


@dataclass(frozen=True)
class Term:
    """One label of a target: its index among the classifier's labels, its weight, and whether to go away from it."""

    index: int
    weight: float = 1.0
    away: bool = False


def parse_target(text: str, labels: Sequence[str]) -> tuple[Term, ...]:
    """The terms that ``text`` names among ``labels``.

    Raises:
        UserError: an unknown label (the error lists the known ones), a weight that is not a positive number, nothing at all.
    """
    if text.strip() in labels:  # a label is taken as it stands, whatever commas it holds
        return (Term(labels.index(text.strip())),)
    if len(text) > LONGEST or text.count('"') % 2:
        raise _target_error(f"the target {text[:60]!r}, which is too long or leaves a quotation mark open", labels)
    terms = [part.strip() for part in _TERM.findall(text) if part.strip()]
    if not terms:
        raise _target_error("an empty target", labels)
    return tuple(_term(part, labels) for part in terms)


def _term(text: str, labels: Sequence[str]) -> Term:
    """One term: ``name``, ``name:weight``, ``"name":weight``, each after ``not`` or without."""
    away = text.casefold().startswith("not ")
    rest = text[4:].strip() if away else text
    if rest.startswith('"'):
        name, _, weight = rest[1:].partition('"')
        if weight and not weight.strip().startswith(":"):
            raise _target_error(f"the target {text!r}, with {weight.strip()!r} after the label", labels)
        weight = weight.strip()[1:] if weight.strip() else None
    else:
        name, colon, after = rest.partition(":")
        weight = after if colon else None
    return Term(_index(name.strip(), labels), _weight(weight, text, labels), away)


def _index(name: str, labels: Sequence[str]) -> int:
    folded = [label.casefold() for label in labels]
    if name.casefold() not in folded:
        alike = get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)
        meant = " or ".join(f'"{labels[folded.index(label)]}"' for label in alike)
        raise _target_error(f"the label {name!r}, which the classifier does not know", labels, meant)
    return folded.index(name.casefold())


def _weight(text: str | None, target: str, labels: Sequence[str]) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise _target_error(
            f"the weight {text.strip()!r} in the target {target!r}, which is not a number above 0", labels
        )
    return weight


def _target_error(found: str, labels: Sequence[str], meant: str = "") -> UserError:
    example = 'write for example "{0}", "{0}:2, {1}" or "not {0}" in the label input'.format(labels[0], labels[-1])
    return UserError(
        found,
        expected="one or more of "
        + ", ".join(f'"{label}"' if "," in label or ":" in label else label for label in labels),
        mend=f"did you mean {meant}? Else {example}" if meant else example,
    )


def class_target(terms: Sequence[Term], combine: str) -> Callable[[Tensor], Tensor]:
    """log p of the target as a function of logits (B, K) -> (B,).

    Args:
        terms: what to go to and away from.
        combine: "any" for alternatives, log sum_i w_i q_i; "all" for conjunctions, sum_i w_i log q_i; with q_i = p_i, or
            1 - p_i for a label to go away from.
    """

    def log_prob(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(dim=1)
        columns = []
        for term in terms:
            if term.away:  # log(1 - p) = log-sum of all the other classes: no cancellation where p is near 1
                others = torch.cat([log_probs[:, : term.index], log_probs[:, term.index + 1 :]], dim=1)
                columns.append(others.logsumexp(dim=1))
            else:
                columns.append(log_probs[:, term.index])
        stacked = torch.stack(columns, dim=1)
        weights = stacked.new_tensor([term.weight for term in terms])
        return (stacked + weights.log()).logsumexp(dim=1) if combine == "any" else (stacked * weights).sum(dim=1)

    return log_prob


def regression_target(text: str) -> Callable[[Tensor], Tensor]:
    """log p as a function of a regression head's output (B, 1): ``up`` raises it, ``down`` lowers it.

    Raises:
        UserError: any other text.
    """
    if text.strip().casefold() not in ("up", "down"):
        raise UserError(
            f"the target {text!r} for a classifier with a regression head",
            expected='"up" or "down"',
            mend='write "up" in the label input to raise the score, "down" to lower it',
        )
    sign = 1.0 if text.strip().casefold() == "up" else -1.0
    return lambda output: sign * output[:, 0]
