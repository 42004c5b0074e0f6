"""What a rule's fields carry: range, step, neutral value and help, for checks, nodes and help pages alike.

A rule's field is annotated with one knob, ``guidance_scale: Annotated[float, Number(...)] = 1.0``. The texts are
literals, so that a tooltip can be found by searching for its words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Any, get_type_hints

from ..errors import UserError

UNLIMITED = 1000.0
"""The largest value of a knob that bounds something from above; at it nothing is bounded."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One input of a rule: ``help`` and ``help_zh`` say what it does in one sentence each."""

    help: str
    help_zh: str
    label_zh: str

    def check(self, value: object, where: str) -> None:
        """Raise UserError unless ``value`` is allowed; ``where`` names the field and the rule."""

    @property
    def neutral_text(self) -> str:
        """The neutral value in words, or an empty string if there is none."""
        neutral = getattr(self, "neutral", None)
        return "" if neutral is None else f"{neutral:g}" if isinstance(neutral, float) else str(neutral)


@dataclass(frozen=True, kw_only=True)
class Number(Knob):
    """A real number in [min, max].

    ``neutral``: the value at which the rule is an exact no-op; None if there is none. ``paper_range``: what is usual;
    ``paper_range_zh`` is needed where that has more words than "to".
    """

    min: float
    max: float
    step: float
    neutral: float | None = None
    paper_range: str = ""
    paper_range_zh: str = ""

    def check(self, value: object, where: str) -> None:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not self.min <= number <= self.max:  # nan is in no range
            raise UserError(
                f"{where} is {value!r}",
                expected=f"a number from {self.min:g} to {self.max:g}",
                mend="choose a value in this range"
                + (f"; {self.neutral:g} is neutral" if self.neutral is not None else ""),
            )


@dataclass(frozen=True, kw_only=True)
class Whole(Knob):
    """A whole number in [min, max]."""

    min: int
    max: int
    step: int = 1
    neutral: int | None = None

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not self.min <= value <= self.max:
            raise UserError(
                f"{where} is {value!r}",
                expected=f"a whole number from {self.min} to {self.max}",
                mend="choose a value in this range"
                + (f"; {self.neutral} is neutral" if self.neutral is not None else ""),
            )


@dataclass(frozen=True, kw_only=True)
class Choice(Knob):
    """One of ``options``."""

    options: tuple[str, ...]
    neutral: str | None = None

    def check(self, value: object, where: str) -> None:
        if value not in self.options:
            raise UserError(
                f"{where} is {value!r}",
                expected="one of " + ", ".join(self.options),
                mend="choose one of these",
            )


@dataclass(frozen=True, kw_only=True)
class Text(Knob):
    """A line of text, whose meaning the rule checks."""

    placeholder: str = ""
    neutral: str | None = None

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, str):
            raise UserError(f"{where} is {value!r}", expected="text", mend="write it in quotation marks")


@dataclass(frozen=True, kw_only=True)
class Switch(Knob):
    """On or off."""

    neutral: bool | None = None

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, bool):
            raise UserError(f"{where} is {value!r}", expected="True or False", mend="choose one of these")


@dataclass(frozen=True, kw_only=True)
class Socket(Knob):
    """An object that another node makes: ``type`` is ComfyUI's name for its kind (MASK, LG_CLASSIFIER)."""

    type: str
    optional: bool = False
    made_by: str = ""

    def check(self, value: object, where: str) -> None:
        if value is None and not self.optional:
            raise UserError(
                f"{where} is missing", expected=f"an object of type {self.type}", mend=f"connect {self.made_by or 'it'}"
            )


def knobs(rule_class: type) -> Mapping[str, Knob]:
    """Field name -> knob of a rule class, in the order of its fields."""
    hints = get_type_hints(rule_class, include_extras=True)
    found: dict[str, Knob] = {}
    for field in fields(rule_class):
        [knob] = [extra for extra in hints[field.name].__metadata__ if isinstance(extra, Knob)]
        found[field.name] = knob
    return MappingProxyType(found)


def check_fields(described: Any, name: str) -> None:
    """Raise UserError if a field of a dataclass of knobs is out of its range; ``name`` is what the error calls it."""
    for field, knob in knobs(type(described)).items():
        knob.check(getattr(described, field), f"{field} of {name}")


def default(rule_class: type, name: str) -> Any:
    """The default of a rule's field; None if it has none (a required socket)."""
    [field] = [field for field in fields(rule_class) if field.name == name]
    return None if field.default is MISSING else field.default
