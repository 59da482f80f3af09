"""Dataclasses from JSON as people have it: each value of the type that is declared, or named.

A field that a later version adds takes its default when an older file is read; one that this
version does not know is an error, since leaving it out could change what the file means.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from grm_jax.errors import UserError

T = TypeVar("T")
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def require_known(
    raw: Any, known: list[str], where: str, kind: type[UserError] = UserError
) -> None:
    """Raise `kind` unless `raw` is a JSON object with known fields only."""
    if not isinstance(raw, Mapping):
        raise kind(
            f"{where} is {raw!r:.60}; a JSON object with the fields {', '.join(known)} is expected"
        )
    unknown = sorted(raw.keys() - set(known))
    if unknown:
        raise kind(
            f"{where} has the fields {unknown}, which this version does not know (it knows "
            f"{', '.join(known)}); delete them there, or install the version that wrote them"
        )


def decode(cls: type[T], raw: Any, where: str, kind: type[UserError] = UserError) -> T:
    """A dataclass from a JSON object; fields that are not there take their defaults.

    Args:
      where: names the object in messages: its file, or "file: field".
      kind: what to raise for an unknown field, a value of another type, one that the class itself
        refuses, and a field without a default that is not there.
    """
    fields = [field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init]
    require_known(raw, [field.name for field in fields], where, kind)
    lost = [field.name for field in fields if field.name not in raw and not _has_default(field)]
    if lost:
        raise kind(f"{where}: {', '.join(lost)} is missing; copy the file again")
    hints = typing.get_type_hints(cls)
    dot = "." if ": " in where else ": "
    try:
        return cls(**{n: _value(hints[n], v, f"{where}{dot}{n}", kind) for n, v in raw.items()})
    except UserError as error:
        if where in str(error):
            raise
        raise kind(f"{where}: {error}") from error  # of the class itself, which knows no file


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _value(hint: Any, value: Any, where: str, kind: type[UserError]) -> Any:
    """A JSON value as `hint` has it: a number, text, None, tuple, literal or dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _value(hint, value, where, kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise kind(f"{where} is {value!r:.60}; a list is expected")
        return tuple(_value(arguments[0], v, f"{where}[{i}]", kind) for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise kind(f"{where} is {value!r:.60}; give one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where, kind)
    right = type(value) is hint or (hint is float and type(value) is int)
    if not right or (hint is float and not math.isfinite(value)):
        raise kind(f"{where} is {value!r:.60}; {_KINDS[hint]} is expected")
    return hint(value)
