"""The fields of one row, with a record of which were read and which were null.

Values are accepted in the forms that data sets use: numbers as texts ("8.5"), `true` for 1, lists
as JSON in a text. Anything else is refused with an error that shows the value.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grm_jax.data.conversation import is_message
from grm_jax.data.rows import DataError, check_text, show

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HUGE = sys.float_info.max


class Fields:
    """One row of a file.

    Attributes:
        unused: names of non-empty fields of messages that were not read.
    """

    def __init__(self, row: Mapping[str, Any], *, cells: bool = False) -> None:
        """cells: the row is from a CSV file, in which messages are JSON in a cell."""
        self._row = {name: value for name, value in row.items() if value is not None}
        self._null = set(row) - set(self._row)
        self._read: set[str] = set()
        self._cells = cells
        self.unused: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the row has the field and it is not null."""
        return name in self._row

    def without(self, name: str) -> Fields:
        """The same row without one field. Both share the record of what was read."""
        other = copy.copy(self)
        other._row = {key: value for key, value in self._row.items() if key != name}
        return other

    def names(self) -> list[str]:
        return sorted([*self._row, *self._null])

    def not_read(self) -> set[str]:
        """The non-empty fields that were not read."""
        return (self._row.keys() - self._read) | self.unused

    def get(self, name: str) -> Any:
        """The value; None if the field is missing or null."""
        self._read.add(name)
        value = self._row.get(name)
        if self._cells and isinstance(value, str) and value[:1] in ("[", "{"):
            # Only messages are decoded, since an ordinary text may be JSON too.
            messages = decoded(value)
            one = messages[0] if isinstance(messages, list) and messages else messages
            return messages if is_message(one) else value
        return value

    def need(self, name: str, fix: str) -> Any:
        """The value of a required field."""
        value = self.get(name)
        if value is None:
            raise DataError(name, self.absence(name), fix)
        return value

    def absence(self, name: str) -> str:
        return "null" if name in self._null else f"missing; the row has {self.names()}"

    def one_of(self, names: Sequence[str]) -> str:
        """The name of the field, exactly one of `names`, that the row has."""
        present = [name for name in names if name in self]
        if len(present) == 1:
            return present[0]
        listed = ", ".join(repr(n) for n in names)
        if not present:
            nulls = [name for name in names if name in self._null]
            first = nulls[0] if nulls else names[0]
            raise DataError(first, self.absence(first), f"give one of {listed}")
        problem = f"given together with {present[0]!r}"
        raise DataError(present[1], problem, f"give only one of {listed}")

    def text(self, name: str, *, filled: bool = False) -> str:
        value = self.need(name, "give a string")
        check_text(name, value, filled=filled)
        return value

    def items(self, name: str, fix: str) -> list[Any]:
        """A list, which may be JSON in a text."""
        value = self.need(name, fix)
        if isinstance(value, str):
            parsed = decoded(value)
            value = parsed if isinstance(parsed, list) else value
        if not isinstance(value, list):
            raise DataError(name, show(value), fix)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        texts = self.items(name, "give a list of strings")
        for i, text in enumerate(texts):
            check_text(f"{name}[{i}]", text)
        return tuple(texts)

    def number(self, name: str) -> float:
        return number(name, self.need(name, "give a number"))


def number(name: str, value: Any) -> float:
    """A finite number, which may be written as a text. Raises DataError naming the value."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise DataError(name, show(value), "give a number")
        value = float(value)
    if type(value) not in (int, float):  # bool is a subclass of int, but not a grade
        raise DataError(name, show(value), "give a number")
    if not -_HUGE <= value <= _HUGE:  # false for NaN, and safe for integers beyond floats
        raise DataError(name, show(value), "give a finite number")
    return float(value)


def grade(name: str, value: Any) -> float:
    """A number, or a boolean ("true" and "false" of a CSV file too)."""
    truth = _truth(value)
    return number(name, value) if truth is None else float(truth)


def grades(name: str, values: Sequence[Any]) -> tuple[float, ...]:
    """Numbers, or only booleans; a mixture of both is an error."""
    truths = [_truth(value) for value in values]
    if all(truth is not None for truth in truths):
        return tuple(float(bool(truth)) for truth in truths)
    return tuple(number(f"{name}[{i}]", value) for i, value in enumerate(values))


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def decoded(text: str) -> Any:
    """The value of a text that is JSON; None for other texts."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
