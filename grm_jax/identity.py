"""What a run is, and how it is computed: only the first must be the same when a run is resumed.

A field of a recipe that is declared with `how(default)` says how results are computed, or how they
are shown: devices, memory, micro-batches, logging. All others say what the results are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")

_HOW = "how"


def how(default: T) -> T:
    """A dataclass field whose value may change when a run is resumed."""
    return dataclasses.field(default=default, metadata={_HOW: True})


def hows(recipe: Any, prefix: str = "") -> frozenset[str]:
    """Dotted names of the `how` fields of a dataclass and of the dataclasses in it."""
    found: set[str] = set()
    for field in dataclasses.fields(recipe):
        name, value = f"{prefix}{field.name}", getattr(recipe, field.name)
        if field.metadata.get(_HOW):
            found.add(name)
        elif dataclasses.is_dataclass(value):
            found |= hows(value, f"{name}.")
    return frozenset(found)


def differences(
    old: Any, new: Any, default: Any = None, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """(old, new) of each leaf, by its dotted name, in which two JSON trees differ.

    Args:
      default: the tree of default values: what a field is taken to be that one of the two does not
        have yet, or no longer. A field that is nowhere in it counts as None.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        usual = default if isinstance(default, dict) else {}
        for key in sorted(old.keys() | new.keys()):
            known = usual.get(key)
            pair = old.get(key, known), new.get(key, known)
            found |= differences(*pair, known, f"{prefix}{key}.")
        return found
    return {} if old == new else {prefix[:-1]: (old, new)}


def within(name: str, names: frozenset[str]) -> bool:
    """Whether a dotted name is one of `names` or lies in one of them."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))
