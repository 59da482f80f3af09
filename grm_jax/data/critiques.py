"""The record type of a critique, and its file samples.jsonl, from which all figures are
computed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grm_jax.data.rows import DataError, iterate_rows, show
from grm_jax.files import written_whole

GREEDY = -1  # `Critique.sample` of the critique at temperature 0


@dataclasses.dataclass(frozen=True)
class Critique:
    """One critique of one record. Raises DataError for invalid fields.

    Attributes:
        example_id: id of the record.
        sample: index of the sample, 0..k-1; GREEDY (-1) for the greedy one.
        order: order[j] is the record's index of the response shown in place j.
        scores: one finite number for each response, in the record's order; None if it failed.
        failure: why there are no scores; None if there are scores.
        finish_reason: "stop" or "length" (truncated).
        text: the generated text.
        meta: the meta RM's score of this critique; None without a meta RM.
        tokens: the number of generated tokens.
    """

    example_id: str
    sample: int
    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    failure: str | None
    finish_reason: str
    text: str = ""
    meta: float | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("example_id", "finish_reason", "text"):
            if not isinstance(getattr(self, name), str):
                raise DataError(name, show(getattr(self, name)), "give a string")
        for name, least in (("sample", GREEDY), ("tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DataError(name, show(value), f"give an integer, {least} or more")
        try:
            sound = len(self.order) > 0 and sorted(self.order) == list(range(len(self.order)))
        except TypeError:
            sound = False
        if not sound:
            raise DataError("order", show(self.order), "give each of 0..n-1 once")
        self._check_verdict()
        if self.failure is not None and not isinstance(self.failure, str):
            raise DataError("failure", show(self.failure), "give its name, or null")
        if self.scores is not None:
            if len(self.scores) != len(self.order):
                raise DataError(
                    "scores",
                    f"{len(self.scores)} for {len(self.order)} responses",
                    "give one number a response",
                )
            for index, score in enumerate(self.scores):
                _check_number(f"scores[{index}]", score)
        if self.meta is not None:
            _check_number("meta", self.meta)

    def _check_verdict(self) -> None:
        if (self.scores is None) == (self.failure is None):
            raise DataError(
                "failure",
                f"scores are {self.scores}, failure is {self.failure!r}",
                "a sample has scores, or the name of its failure",
            )

    @property
    def greedy(self) -> bool:
        return self.sample == GREEDY

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


_FIELDS = tuple(field.name for field in dataclasses.fields(Critique))
_NEEDED = ("example_id", "sample", "order", "finish_reason")


def read_critiques(path: str | Path) -> list[Critique]:
    """The critiques of a samples.jsonl, in file order.

    Raises:
        DataError: a missing or empty file, an invalid row, or two rows of one sample.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("", "no such file", "give the samples.jsonl of an evaluation", str(path))
    rows: list[Critique] = []
    seen: dict[tuple[str, int], str] = {}
    for line in iterate_rows(path):
        row = critique_from_json(line.load(), line.where)
        name = (row.example_id, row.sample)
        if name in seen:
            raise DataError(
                "sample",
                f"{row.sample} of {row.example_id!r} is already in {seen[name]}",
                "keep one of them",
                line.where,
            )
        seen[name] = line.where
        rows.append(row)
    return rows


def write_critiques(path: str | Path, rows: Iterable[Critique]) -> None:
    """Write critiques as JSONL; the file appears whole or not at all."""
    with (
        written_whole(Path(path)) as partial,
        # A lone surrogate of a byte-level tokenizer becomes an escape that JSON reads back.
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(vars(row), ensure_ascii=False, allow_nan=False) + "\n")


def critique_from_json(values: Mapping[str, Any], where: str) -> Critique:
    """A critique from the JSON of its `vars`. Raises DataError naming `where`."""
    try:
        return _from_json(values)
    except DataError as error:
        raise error.at(where) from None


def _from_json(values: Mapping[str, Any]) -> Critique:
    for name in _NEEDED:
        if values.get(name) is None:
            raise DataError(name, f"missing; the row has {sorted(values)}", "write it again")
    fields = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    for name in ("order", "scores"):
        if name in fields:
            if not isinstance(fields[name], list):
                raise DataError(name, show(fields[name]), "give a list of numbers")
            fields[name] = tuple(fields[name])
    return Critique(**{"scores": None, "failure": None, **fields})


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(name, show(value), "give a finite number; a failed sample has none")
