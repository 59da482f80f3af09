"""What all readers share: finding files, taking a row's fields, leaving bad rows out.

files(path, source) -> Fields of every row -> items -> collect -> BenchmarkRecords
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grm_jax.critique.prompt import Turn
from grm_jax.data.rows import SKIPPABLE, SUFFIXES, DataError, check_text, iterate_rows, show
from grm_jax.scoring.benchmark import Source
from grm_jax.scoring.items import BenchmarkRecords, Item

Value = TypeVar("Value")


class Fields:
    """The fields of one row. A missing or wrong field raises a `DataError` with its place.

    Attributes:
        where: "file:line" or "file:row N".
    """

    def __init__(self, row: Mapping[str, Any], where: str):
        self.row, self.where = row, where

    def wrong(self, name: str, problem: str, fix: str) -> DataError:
        return DataError(name, problem, fix + SKIPPABLE, self.where)

    def __contains__(self, name: str) -> bool:
        return self.row.get(name) is not None

    def get(self, name: str, fix: str = "give it") -> Any:
        """The value of a required field."""
        if self.row.get(name) is None:
            null = name in self.row
            raise self.wrong(
                name, "null" if null else f"missing; the row has {sorted(self.row)}", fix
            )
        return self.row[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        """A text. empty: whether it may be blank."""
        return self.checked(name, self.get(name, "give a string"), empty=empty)

    def checked(self, name: str, value: Any, *, empty: bool = False) -> str:
        """The value, after checking that it is a text."""
        try:
            check_text(name, value, filled=not empty)
        except DataError as error:
            raise self.wrong(error.field, error.problem, error.fix) from None
        return value

    def texts(self, name: str, count: int | None = None, *, empty: bool = False) -> list[str]:
        """A list of texts, or a single text as a list. count: the required number of texts."""
        value = self.get(name, "give a list of strings")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or (count is not None and len(texts) != count):
            wanted = "a list of strings" if count is None else f"a list of {count} strings"
            raise self.wrong(name, show(value), f"give {wanted}")
        return [
            self.checked(f"{name}[{index}]", one, empty=empty) for index, one in enumerate(texts)
        ]

    def choice(self, name: str, values: Mapping[Any, Value]) -> Value:
        """The meaning of a field's value; any value that is not in `values` is an error."""
        value = self.get(name, f"give one of {', '.join(map(repr, values))}")
        # The types are compared too, since 1 == True == 1.0.
        for legal, meaning in values.items():
            if type(value) is type(legal) and value == legal:
                return meaning
        raise self.wrong(name, show(value), f"give one of {', '.join(map(repr, values))}")

    def integer(self, name: str, low: int, high: int | None = None) -> int:
        value = self.get(name, "give an integer")
        if type(value) is not int or value < low or (high is not None and value > high):
            limit = "" if high is None else f" to {high}"
            raise self.wrong(name, show(value), f"give an integer from {low}{limit}")
        return value

    def key(self, name: str) -> str:
        """An identifier: a string or an integer."""
        value = self.get(name, "give the row's id")
        if type(value) not in (int, str) or value == "":
            raise self.wrong(name, show(value), "give a string or an integer")
        return str(value)

    def decoded(self, name: str) -> Any:
        """The value of a field, decoded if it is a text that holds JSON."""
        value = self.get(name)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise self.wrong(name, f"not JSON: {error}", "give a JSON list") from None

    def inner(self, name: str) -> Fields:
        """The fields of a field that is an object."""
        value = self.get(name, "give an object")
        if not isinstance(value, Mapping):
            raise self.wrong(name, show(value), "give an object")
        return _Inner(value, self.where, name)


class _Inner(Fields):
    """The fields of an object within a row; messages name both fields."""

    def __init__(self, row: Mapping[str, Any], where: str, outer: str):
        super().__init__(row, where)
        self._outer = outer

    def wrong(self, name: str, problem: str, fix: str) -> DataError:
        return super().wrong(f"{self._outer}.{name}", problem, fix)


def user(query: str) -> tuple[Turn, ...]:
    """A conversation of one turn."""
    return (Turn(role="user", content=query),)


def collect(
    rows: Iterable[tuple[str, Callable[[], Fields]]],
    parse: Callable[[Fields], Sequence[Item]],
    where: Path,
    *,
    skip_bad_rows: bool,
    notes: Iterable[str] = (),
) -> BenchmarkRecords:
    """Parse every row into its items.

    Raises:
        DataError: the first bad row or repeated id (without `skip_bad_rows`), or no good row.
    """
    records: dict[str, Item] = {}
    skipped: list[str] = []
    for place, load in rows:
        try:
            items = parse(load())
            for item in items:
                if item.id in records:
                    raise DataError(
                        "id",
                        f"{item.id!r} is already the id of {records[item.id].source}",
                        "give each row once, with an id of its own" + SKIPPABLE,
                        place,
                    )
        except DataError as error:
            if not skip_bad_rows:
                raise (error if error.where else error.at(place)) from None
            skipped.append(str(error if error.where else error.at(place)))
            continue
        records |= {item.id: item for item in items}
    if not records:
        problem = f"no good row, the first: {skipped[0]}" if skipped else "no row"
        raise DataError("", problem, "see its fix", str(where))
    return BenchmarkRecords(records.values(), skipped, notes)


def rows_of(files: Iterable[Path]) -> Iterator[tuple[str, Callable[[], Fields]]]:
    """(place, a function that loads the row) of every row of the files."""
    for file in files:
        for row in iterate_rows(file):
            yield row.where, lambda row=row: Fields(row.load(), row.where)


def files(path: Path, source: Source, patterns: Sequence[str] | None = None) -> list[Path]:
    """The benchmark's files: `path` itself, or those below it that match a pattern.

    Patterns are matched with the path relative to `path`, ignoring case. A pattern that starts with
    "*/" also matches files directly in `path`. Hidden files are ignored.

    Raises:
        DataError: no files are found; the message says what to download.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError("", "no such file or directory", source.get, str(path))
    wanted = [pattern.lower() for pattern in patterns or source.patterns]
    wanted += [pattern.removeprefix("*/") for pattern in wanted if pattern.startswith("*/")]
    matching = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if file.is_file() and not hidden and _matches(name.lower(), wanted):
            matching.append(file)
    if not matching:
        shown = ", ".join(patterns or source.patterns)
        raise DataError("", f"no file like {shown} in this directory", source.get, str(path))
    return matching


def _matches(name: str, patterns: Sequence[str]) -> bool:
    data = name.endswith((*SUFFIXES, ".zip"))
    return data and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
