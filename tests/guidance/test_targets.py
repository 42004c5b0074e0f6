"""From a line of text to log p: parsing, and each row of the table in ``targets``."""

from __future__ import annotations

import time

import pytest
import torch

from latent_guidance.errors import UserError
from latent_guidance.guidance.targets import Term, class_target, parse_target, regression_target

LABELS = ("Smileys & Emotion", "Flags", "Food, Drink", "a:b")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Flags", (Term(1),)),
        ("  flags ", (Term(1),)),
        ("smileys & emotion", (Term(0),)),
        ("Food, Drink", (Term(2),)),
        ('"food, drink":2, flags', (Term(2, 2.0), Term(1))),
        ("flags:0.25, smileys & emotion:0.75", (Term(1, 0.25), Term(0, 0.75))),
        ("not flags", (Term(1, away=True),)),
        ("NOT flags:3, smileys & emotion", (Term(1, 3.0, away=True), Term(0))),
        ('"a:b"', (Term(3),)),
    ],
)
def test_a_line_of_text_names_its_terms(text: str, terms: tuple[Term, ...]) -> None:
    assert parse_target(text, LABELS) == terms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "cars",
        "flags, cars",
        "flags:zero",
        "flags:-1",
        "flags:nan",
        "flags:inf",
        '"flags',
        "flags:1:2",
        ",",
        "not",
    ],
)
def test_what_is_not_a_target_is_refused_and_the_labels_are_listed(text: str) -> None:
    with pytest.raises(UserError, match=r'Smileys & Emotion, Flags, "Food, Drink", "a:b"'):
        parse_target(text, LABELS)


def test_long_texts_are_parsed_or_refused_at_once() -> None:
    start = time.perf_counter()
    for text in (" " * 9000 + "x", "a " * 4000 + '"', "not " * 2000, ":" * 9000, "," * 9000, "flags" * 10**6):
        with pytest.raises(UserError):
            parse_target(text, LABELS)
    assert time.perf_counter() - start < 1.0


LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
P = LOGITS.softmax(dim=1)


@pytest.mark.parametrize(
    ("text", "combine", "expected"),
    [
        ("flags", "any", P[:, 1].log()),
        ("flags", "all", P[:, 1].log()),
        ("flags, smileys & emotion", "any", (P[:, 1] + P[:, 0]).log()),
        ("flags:3, smileys & emotion", "any", (3 * P[:, 1] + P[:, 0]).log()),
        ("flags:0.7, smileys & emotion:0.3", "all", 0.7 * P[:, 1].log() + 0.3 * P[:, 0].log()),
        ("not flags", "any", (1 - P[:, 1]).log()),
        ("not flags, smileys & emotion", "all", (1 - P[:, 1]).log() + P[:, 0].log()),
    ],
)
def test_log_p_is_the_formula_of_the_table(text: str, combine: str, expected: torch.Tensor) -> None:
    log_p = class_target(parse_target(text, LABELS), combine)(LOGITS)
    torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-12)


def test_going_away_from_a_class_that_is_certain_stays_finite() -> None:
    certain = torch.tensor([[0.0, 200.0, 0.0, 0.0]], dtype=torch.float64)
    log_p = class_target(parse_target("not flags", LABELS), "any")(certain)
    assert log_p.item() == pytest.approx(-200 + torch.tensor(3.0).log().item())


def test_a_regression_head_goes_up_or_down_and_nowhere_else() -> None:
    output = torch.tensor([[2.0], [-1.0]])
    assert regression_target("up")(output).tolist() == [2.0, -1.0]
    assert regression_target("Down")(output).tolist() == [-2.0, 1.0]
    with pytest.raises(UserError, match='"up" or "down"'):
        regression_target("flags")


def test_a_label_that_is_nearly_known_is_suggested() -> None:
    with pytest.raises(UserError, match='did you mean "Flags"'):
        parse_target("flagg", LABELS)
    with pytest.raises(UserError, match='did you mean "cat-face" or "cat"'):
        parse_target("Cats-face", ("dog", "cat", "cat-face"))
    with pytest.raises(UserError, match=r"does not know.*mend it: write for example"):
        parse_target("xyzzy", LABELS)
