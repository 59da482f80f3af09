"""Trajectories: a query, its responses as they were shown, and a critique of them.

What supervised training and the meta RM learn from, as readable JSONL:

    {"id": .., "query": .. | [turns], "responses": [..], "critique": "..",          needed
     "labels": [..], "scores": [..] | null, "correct": .., "failure": .., "finish_reason": ..,
     "hinted": .., "kept": .., "sample": .., "order": [..], "reference": .., "principles": [..]}

`responses`, `labels` and `scores` stand in the order in which the responses were shown; `order`
gives their original indices. A row may instead be plain instruction data, which supervised training
mixes in: {"messages": [.., {"role": "assistant", "content": ..}]}. Messages are read as those of
preferences are (`conversation.py`): tool calls and results become text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import read_turns
from grm_jax.data.rows import DataError, expand, iterate_rows, show, write_rows

_TEXT, _BOOLEAN = (str, "a text"), (bool, "true or false")
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "id": _TEXT,
    "critique": _TEXT,
    "finish_reason": _TEXT,
    "failure": ((str, type(None)), "a text or null"),
    "reference": ((str, type(None)), "a text or null"),
    "correct": ((bool, type(None)), "true, false or null"),
    "hinted": _BOOLEAN,
    "kept": _BOOLEAN,
    "sample": (int, "a whole number"),
}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One critique and what it was about. See the module's docstring for the fields."""

    id: str
    query: str | tuple[Turn, ...]
    responses: tuple[str, ...]
    critique: str
    labels: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    correct: bool | None = None
    failure: str | None = None
    finish_reason: str = "stop"
    hinted: bool = False
    kept: bool = True
    sample: int = 0
    order: tuple[int, ...] | None = None
    reference: str | None = None
    principles: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Plain instruction data: the last message is the assistant's reply to learn."""

    messages: tuple[Turn, ...]


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write a JSONL file, whole or not at all. Fields that are not known are left out."""
    write_rows(Path(path), [dataclasses.asdict(trajectory) for trajectory in trajectories])


def read_trajectories(path: str | Path) -> list[Trajectory | Instruction]:
    """Read trajectory and instruction rows. Raises DataError naming file, line, field and fix."""
    rows: list[Trajectory | Instruction] = []
    for file in expand(path):
        for row in iterate_rows(file):
            rows.append(parse_trajectory(row.load(), row.where))
    return rows


def parse_trajectory(
    row: Any, where: str, unused: set[str] | None = None
) -> Trajectory | Instruction:
    """One row. Raises DataError.

    unused: gets the names of fields of messages that hold something and were not read.
    """
    if not isinstance(row, dict):
        raise DataError("row", show(row), "write {...}", where)
    if "messages" in row:
        return Instruction(_messages("messages", row["messages"], "assistant", where, unused))
    for field in ("id", "query", "responses", "critique"):
        if field not in row:
            raise DataError(field, "is missing", "a trajectory needs it", where)
    known = {field.name for field in dataclasses.fields(Trajectory)}
    values = {name: value for name, value in row.items() if name in known}
    for field in ("responses", "labels", "scores", "order", "principles"):
        if values.get(field) is not None:
            if not isinstance(values[field], list):
                raise DataError(field, show(values[field]), "write a list", where)
            values[field] = tuple(values[field])
    for field in ("responses", "principles"):
        found = values.get(field) or ()
        empty = field == "responses" and not found
        if empty or not all(isinstance(text, str) for text in found):
            raise DataError(field, "is not a list of texts", 'write ["..", ".."]', where)
    for field in ("labels", "scores", "order"):
        found = values.get(field)
        if found is not None and len(found) != len(values["responses"]):
            raise DataError(
                field,
                f"has {len(found)} entries for {len(values['responses'])} responses",
                "give one a response",
                where,
            )
        for index, number in enumerate(found or ()):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise DataError(f"{field}[{index}]", show(number), "write a number", where)
    if isinstance(values["query"], list):
        values["query"] = _messages("query", values["query"], "user", where, unused)
    elif not isinstance(values["query"], str):
        raise DataError("query", show(values["query"]), "write a text or messages", where)
    for field, (kinds, wanted) in _KINDS.items():
        if field in values and not isinstance(values[field], kinds):
            raise DataError(field, show(values[field]), f"write {wanted}", where)
    return Trajectory(**values)


def _messages(
    field: str, value: Any, last: str, where: str, unused: set[str] | None
) -> tuple[Turn, ...]:
    """Turns of a list of messages, the last one of the role `last`."""
    if not isinstance(value, list) or not value:
        wanted = 'write [{"role": .., "content": ..}]'
        raise DataError(field, f"is not a list of messages: {show(value)}", wanted, where)
    try:
        turns = read_turns(field, value, unused)
    except DataError as error:
        raise error.at(where) from None
    if turns[-1]["role"] != last:
        raise DataError(
            field, f"does not end with the {last}", f"end with the {last}'s turn", where
        )
    return turns
