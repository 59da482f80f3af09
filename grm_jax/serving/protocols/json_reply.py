"""Replies that follow a JSON schema: found in what a model wrote, and checked.

Sampling is not bound to the schema here. A text that does not follow it is refused, so that no
client reads another shape than it asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grm_jax.data.rows import DataError
from grm_jax.errors import UserError

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(name))
# Regular expressions of a client would run here, and some of them never end.
_NOT_RUN = ("pattern", "patternProperties")
_MOST_BROKEN = 200  # braces that open nothing, after which a text is given up
_WHERE = "response_format.json_schema.schema"


class ReplySchema:
    """A JSON schema that replies must follow.

    Raises DataError for what is not a schema, for a reference to a schema elsewhere, and for a
    keyword that is not supported.
    """

    def __init__(self, schema: dict[str, Any]):
        import jsonschema.validators
        import referencing

        for name in _NOT_RUN:
            if name in _keywords(schema):
                raise DataError(_WHERE, f"{name!r} is not checked here", "leave it out")
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise DataError(_WHERE, error.message[:200], "give a JSON schema") from None
        self.schema = schema
        self._validator = kind(schema, registry=referencing.Registry())

    def problem(self, value: Any) -> str | None:
        """Why a value does not follow the schema; None if it does."""
        import jsonschema.exceptions
        import referencing.exceptions

        try:
            error = jsonschema.exceptions.best_match(self._validator.iter_errors(value))
        except (referencing.exceptions.Unresolvable, RecursionError) as broken:
            problem = f"it can not be followed ({type(broken).__name__})"
            raise DataError(
                _WHERE, problem, "give one that ends and refers to itself alone"
            ) from None
        if error is None:
            return None
        place = "".join(f"[{step!r}]" for step in error.absolute_path)
        return f"{place or 'the reply'}: {error.message[:200]}"

    def project(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """What of an object the schema names, where it allows nothing else."""
        names = self.schema.get("properties")
        if self.schema.get("additionalProperties") is not False or not isinstance(names, Mapping):
            return dict(value)
        return {name: value[name] for name in names if name in value}


def json_text(text: str, schema: ReplySchema | None) -> str:
    """The JSON in a reply: the whole text, a fenced block, or the last object in it.

    Args:
      schema: what it must follow; None: any object.

    Raises UserError where there is none.
    """
    problem = "it holds no JSON object"
    for candidate in _candidates(text):
        if schema is None:
            if isinstance(candidate, dict):
                return json.dumps(candidate, ensure_ascii=False)
            continue
        found = schema.problem(candidate)
        if found is None:
            return json.dumps(candidate, ensure_ascii=False)
        problem = found
    raise UserError(
        f"response_format: the model's reply does not follow it ({problem}); ask again with "
        "another seed, show the form in the prompt, or leave response_format out"
    )


def _candidates(text: str) -> Iterator[Any]:
    for part in (text, *reversed(_FENCE.findall(text))):
        with contextlib.suppress(ValueError, RecursionError):
            yield _DECODER.decode(part.strip())
    found, at, left = [], text.find("{"), _MOST_BROKEN
    while at >= 0 and left:
        try:
            value, end = _DECODER.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end, left = at + 1, left - 1
        at = text.find("{", end)
    yield from reversed(found)


def _keywords(schema: Any) -> set[str]:
    """Every name in a schema that may be a keyword. Names of properties count, too, where they are
    spelt like one; that errs on the safe side."""
    if isinstance(schema, Mapping):
        inner = [_keywords(value) for value in schema.values()]
        return set(schema).union(*inner)
    if isinstance(schema, list):
        return set().union(*map(_keywords, schema))
    return set()


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
