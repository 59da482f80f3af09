"""Trajectories: critiques with their records, from which training learns, and their JSONL files.

    {"example_id": .., "query": .. | [turns], "responses": [..], "text": ".."       needed
     "order": [..], "labels": [..], "scores": [..] | null, "failure": .., "finish_reason": ..,
     "correct": .., "hinted": .., "kept": .., "sample": .., "reference": .., "principles": [..]}

`responses`, `labels` and `scores` are in the record's order; order[j] is the index of the response
that was shown in place j.

In critiques written by people or by other programs the text may be called `critique`, and the id
`id`. Then `responses`, `labels` and `scores` are in the order in which they were shown, as in files
of earlier versions, and `order`, if given, maps it to the record's order.

A row may instead be plain instruction data, which supervised training mixes in:
{"messages": [.., {"role": "assistant", "content": ..}]}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grm_jax.critique import shuffle, unshuffle
from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import read_turns
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, expand, iterate_rows, show, write_rows

_TEXT, _BOOLEAN = (str, "a text"), (bool, "true or false")
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "example_id": _TEXT,
    "text": _TEXT,
    "finish_reason": _TEXT,
    "failure": ((str, type(None)), "a text or null"),
    "reference": ((str, type(None)), "a text or null"),
    "correct": ((bool, type(None)), "true, false or null"),
    "hinted": _BOOLEAN,
    "kept": _BOOLEAN,
    "sample": (int, "a whole number"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory(Critique):
    """One critique with its record.

    Attributes:
      query, responses, reference, principles: those of the record.
      labels: the labels of the responses, if they are known.
      correct: whether the scores are correct by the labels.
      hinted: whether the prompt revealed the best response.
      kept: whether it was not rejected.
    """

    query: str | tuple[Turn, ...]
    responses: tuple[str, ...]
    labels: tuple[float, ...] | None = None
    correct: bool | None = None
    hinted: bool = False
    kept: bool = True
    reference: str | None = None
    principles: tuple[str, ...] | None = None

    @property
    def shown(self) -> list[str]:
        """The responses in the order in which they were shown."""
        return shuffle(self.responses, self.order)

    def _check_verdict(self) -> None:
        """Scores may be unknown: they are parsed when the critique is used for training."""
        if self.scores is not None:
            super()._check_verdict()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Plain instruction data: the last message is the assistant's reply to learn."""

    messages: tuple[Turn, ...]


def to_trajectory(
    record: Preference, critique: Critique, correct: bool, *, kept: bool, hinted: bool = False
) -> Trajectory:
    """A critique together with its record."""
    said = {field.name: getattr(critique, field.name) for field in dataclasses.fields(Critique)}
    return Trajectory(
        **said,
        query=record.query if len(record.turns) == 1 else record.turns,
        responses=record.responses,
        labels=record.labels,
        correct=correct,
        hinted=hinted,
        kept=kept,
        reference=record.reference,
        principles=record.principles,
    )


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write a JSONL file, whole or not at all. Fields that are None are left out."""
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

    unused: names of non-empty fields of messages that were not read are added to it.
    """
    if not isinstance(row, dict):
        raise DataError("row", show(row), "write {...}", where)
    if "messages" in row:
        return Instruction(_messages("messages", row["messages"], "assistant", where, unused))
    values = dict(row)
    as_shown = "critique" in values
    spelled: dict[str, str] = {}  # field -> its name in such a row
    if "critique" in values or "id" in values:
        spelled = {"text": "critique", "example_id": "id"}
    for name, other in spelled.items():
        if other in values:
            values.setdefault(name, values.pop(other))
    for field in ("example_id", "query", "responses", "text"):
        if field not in values:
            name = spelled.get(field, field)
            raise DataError(name, "is missing", "a trajectory needs it", where)
    field_names = {field.name for field in dataclasses.fields(Trajectory)}
    values = {name: value for name, value in values.items() if name in field_names}
    for field in ("responses", "labels", "scores", "order", "principles"):
        if values.get(field) is not None:
            if not isinstance(values[field], list):
                raise DataError(field, show(values[field]), "write a list", where)
            values[field] = tuple(values[field])
    for field in ("responses", "principles"):
        entries = values.get(field) or ()
        empty = field == "responses" and not entries
        if empty or not all(isinstance(text, str) for text in entries):
            raise DataError(field, "is not a list of texts", 'write ["..", ".."]', where)
    for field in ("labels", "scores", "order"):
        entries = values.get(field)
        if entries is not None and len(entries) != len(values["responses"]):
            raise DataError(
                field,
                f"has {len(entries)} entries for {len(values['responses'])} responses",
                "give one a response",
                where,
            )
        for index, number in enumerate(entries or ()):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise DataError(f"{field}[{index}]", show(number), "write a number", where)
    if isinstance(values["query"], list):
        values["query"] = _messages("query", values["query"], "user", where, unused)
    elif not isinstance(values["query"], str):
        raise DataError("query", show(values["query"]), "write a text or messages", where)
    for field, (kinds, wanted) in _KINDS.items():
        if field in values and not isinstance(values[field], kinds):
            raise DataError(
                spelled.get(field, field), show(values[field]), f"write {wanted}", where
            )
    if values.get("order") is None:
        values["order"] = tuple(range(len(values["responses"])))
    elif as_shown:
        for field in ("responses", "labels", "scores"):
            if values.get(field) is not None:
                values[field] = _unshuffled(values[field], values["order"], where)
    try:
        return Trajectory(**{"scores": None, "failure": None, "finish_reason": "stop", "sample": 0}
                          | values)  # fmt: skip
    except DataError as error:
        raise error.at(where) from None


def _unshuffled(values: tuple[Any, ...], order: tuple[int, ...], where: str) -> tuple[Any, ...]:
    try:
        return unshuffle(values, order)
    except ValueError:
        wanted = "give the index of the response shown in each place, each once"
        raise DataError("order", show(list(order)), wanted, where) from None


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
