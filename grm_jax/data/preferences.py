"""Preference records: a conversation, n responses to it, and a label for each response.

`read_preferences` reads one file or several, with rows of all shapes in `data/shapes.py`:

    {"query" | "turns" | "prompt" | .., "responses": [..], "labels" | "scores" | "best"}
    {"query" | .., "response": "..", "label": 0 | 1 | false | true}         a single response
    {"prompt": .., "chosen": .., "rejected": ..}                            texts, or messages
    rows of HelpSteer, UltraFeedback, Nectar, arena votes, .. as they are published

Any row may have `id`, `domain`, `reference` and `principles`; null means absent. Fields that are
not read are named in the log. A row without an id gets a `content_id`.

A row of HelpSteer rates one response: consecutive rows with the same prompt become one record, with
their `helpfulness` as labels.

Every mistake in a file is a `DataError`: "file:line: field: the problem; fix: what to do".
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import check_turns
from grm_jax.data.fields import Fields
from grm_jax.data.rows import (
    SKIPPABLE,
    DataError,
    check_text,
    expand,
    iterate_rows,
    show,
    write_rows,
)
from grm_jax.data.shapes import Content, read_content, require_consistent

__all__ = [
    "DataError",
    "Preference",
    "Records",
    "content_id",
    "parse_row",
    "read_preferences",
    "require_unique_best",
    "write_preferences",
]

log = logging.getLogger(__name__)

_TIED = "labels: no unique best in"
_HUGE = sys.float_info.max
_LONE = "one rated response to its prompt, and no other to compare it with"


@dataclass(frozen=True)
class Preference:
    """A conversation, n >= 1 responses to its last turn, and labels of their quality.

    labels: one finite number for each response, higher is better; for n = 1 it is 1 (correct) or 0.
    Ties are allowed here, since evaluation sets have them; training calls `require_unique_best`.

    Raises DataError for anything else, so that every record is valid.
    """

    id: str
    turns: tuple[Turn, ...]
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    domain: str = ""
    reference: str | None = None
    principles: tuple[str, ...] | None = None
    source: str = field(default="", compare=False)  # "file:line", for messages

    def __post_init__(self) -> None:
        check_text("id", self.id, filled=True)
        # The last turn may be empty, since some files of benchmarks have such rows. Rows of a
        # user's own file are checked by their reader.
        check_turns("turns", self.turns, filled=False)
        _check_texts("responses", self.responses)
        _check_labels("labels", self.labels, len(self.responses))
        check_text("domain", self.domain)
        if self.reference is not None:
            check_text("reference", self.reference)
        if self.principles is not None:
            _check_texts("principles", self.principles)

    @property
    def query(self) -> str:
        """The user's last turn: the whole query of a single-turn record."""
        return self.turns[-1]["content"]

    @property
    def has_unique_best(self) -> bool:
        """Whether one label is above all others. A single response is its own best."""
        return self.labels.count(max(self.labels)) == 1

    @property
    def best(self) -> int:
        """Index (from 0) of the response with the highest label; `DataError` where labels tie."""
        if not self.has_unique_best:
            raise DataError(
                "labels",
                f"record {self.id!r}: no unique best in {list(self.labels)}",
                "break the tie, or leave the record out where one best response is needed",
                self.source,
            )
        return self.labels.index(max(self.labels))


class Records(list[Preference]):
    """A list of records, with what was left out.

    skipped: the message of each row that `skip_bad_rows` left out, in file order.
    notes: what else a reader should know, such as fields that were not read.
    tied: how many of the skipped rows are valid, but have no unique best response.
    """

    def __init__(
        self,
        records: Iterable[Preference] = (),
        skipped: Iterable[str] = (),
        notes: Iterable[str] = (),
        tied: int = 0,
    ) -> None:
        super().__init__(records)
        self.skipped: tuple[str, ...] = tuple(skipped)
        self.notes: tuple[str, ...] = tuple(notes)
        self.tied = tied


def read_preferences(
    source: str | Path | Sequence[str | Path],
    *,
    skip_bad_rows: bool = False,
    unique_best: bool = False,
    max_bad_share: float = 1.0,
) -> Records:
    """Read records from files, directories or glob patterns.

    `rows.SUFFIXES` lists the formats. Files of a directory or pattern are read in order of their
    names. Ids must be unique over all files; of rows without an id that have the same content, the
    second and third get `-2` and `-3` after their id.

    Args:
        source: a file, a directory (its data files, not those of sub-directories), a glob pattern
            (`**` for sub-directories), or several of them.
        skip_bad_rows: leave bad rows out and list them in `.skipped` (and count them in the log).
            Files that are missing, empty or cannot be read, and files without any good row, are
            errors all the same.
        unique_best: a record whose best label is shared is an error, or left out likewise.
        max_bad_share: raise if more than this share of the rows is bad. Records with a shared best
            label do not count, since they are not damaged.
    """
    reader = _Reader(skip_bad_rows, unique_best)
    for path in expand(source):
        reader.read(path)
    return reader.finish(str(source), max_bad_share)


class _Reader:
    """Collects records over files: unique ids, repeated rows, rows that form one record."""

    def __init__(self, skip_bad_rows: bool, unique_best: bool) -> None:
        self.skip, self.unique_best = skip_bad_rows, unique_best
        self.records: list[Preference] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.rows = self.bad = self.tied = 0
        self.places: dict[str, str] = {}
        self.twins: dict[str, int] = {}
        self.group: list[tuple[Fields, Content, str]] = []
        self.unused: set[str] = set()

    def read(self, path: Path) -> None:
        self.unused = set()
        for row in iterate_rows(path):
            self.rows += 1
            try:
                fields = Fields(row.load(), cells=row.cells)
                content = read_content(fields)
            except DataError as e:
                self.fault(e, row.where)
                continue
            if self.group and not (content.rated and content.turns == self.group[0][1].turns):
                self.close_group()
            self.group.append((fields, content, row.where))
            if not content.rated:
                self.close_group()
        self.close_group()
        if self.unused:
            note = f"{path}: fields not used: {', '.join(sorted(self.unused))}"
            log.info("%s", note)
            self.notes.append(note)

    def close_group(self) -> None:
        """Make one record of the collected rows; in most data sets it is a single row."""
        group, self.group = self.group, []
        if not group:
            return
        fields, content, where = group[0]
        try:
            if content.rated:
                content = _join([one for _, one, _ in group])
            self.add(_record(fields, content, where), "id" in fields)
        except DataError as e:
            self.fault(e, where, len(group))
        for fields, _, _ in group:
            self.unused |= fields.not_read() - {"id", "domain", "reference", "principles"}

    def add(self, record: Preference, named: bool) -> None:
        if not named:
            self.twins[record.id] = count = self.twins.get(record.id, 0) + 1
            if count > 1:
                record = replace(record, id=f"{record.id}-{count}")
        if record.id in self.places:
            raise DataError(
                "id",
                f"{record.id!r} is already the id of {self.places[record.id]}",
                "give each row an id of its own (or none)",
            )
        if self.unique_best and self.skip and not record.has_unique_best:
            self.tied += 1
            self.skipped.append(f"{record.source}: {_TIED} {list(record.labels)}")
            return
        self.places[record.id] = record.source
        self.records.append(record)

    def fault(self, error: DataError, where: str, rows: int = 1) -> None:
        error = error if error.where else error.at(where)
        if not self.skip:
            fix = error.fix + SKIPPABLE
            raise DataError(error.field, error.problem, fix, error.where) from None
        self.bad += rows
        self.skipped.append(str(error))

    def finish(self, source: str, max_bad_share: float) -> Records:
        if not self.records:
            raise DataError(
                "", f"all {self.rows} rows are bad; the first: {self.skipped[0]}", "see its fix",
                source,
            )  # fmt: skip
        require_few_bad(self.bad, self.rows, max_bad_share, self.skipped, source)
        if self.unique_best:
            require_unique_best(self.records)
        if self.bad:
            first = _first_bad(self.skipped)
            log.warning("%s: %d bad rows left out; the first: %s", source, self.bad, first)
        if self.tied:
            log.warning(
                "%s: %d records left out that have no unique best response", source, self.tied
            )
        return Records(self.records, self.skipped, self.notes, self.tied)


def _join(rated: Sequence[Content]) -> Content:
    """Join the rated responses of one prompt; their ratings become the labels."""
    if len(rated) == 1:
        raise DataError("helpfulness", _LONE, "put the rows of a prompt below each other")
    responses = tuple(one.responses[0] for one in rated)
    labels = tuple(one.labels[0] for one in rated)
    require_consistent(responses, labels)
    return Content(rated[0].turns, responses, labels)


def require_few_bad(bad: int, rows: int, most: float, messages: Sequence[str], source: str) -> None:
    """Raise DataError if more than a share `most` of the rows is bad.

    messages: those of all rows that were left out; rows with tied labels are not bad rows.
    """
    if bad > most * rows:
        raise DataError(
            "",
            f"{bad} of {rows} rows are bad, more than {100 * most:g}%; the first: "
            f"{_first_bad(messages)}",
            "correct them, or give a larger --max-bad-share",
            source,
        )


def _first_bad(messages: Sequence[str]) -> str:
    return next(message for message in messages if _TIED not in message)


def write_preferences(path: str | Path, records: Iterable[Preference]) -> None:
    """Write records so that `read_preferences` returns equal ones (except for `source`).

    The suffix gives the format: .jsonl, .jsonl.gz, .json or .parquet. The file appears whole or not
    at all. Raises DataError for an unknown suffix, no records, a repeated id, or identical
    responses with different labels.
    """
    path = Path(path)
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.id in rows:
            raise DataError("id", f"{record.id!r} twice", "give each record its own", str(path))
        try:
            require_consistent(record.responses, record.labels)
        except DataError as e:
            raise e.at(f"{path}: record {record.id!r}") from None
        rows[record.id] = {
            "id": record.id,
            "turns": [{"role": t["role"], "content": t["content"]} for t in record.turns],
            "responses": list(record.responses),
            "labels": list(record.labels),
            "domain": record.domain or None,
            "reference": record.reference,
            "principles": None if record.principles is None else list(record.principles),
        }
    if not rows:
        raise DataError("", "no records to write", "an empty file cannot be read back", str(path))
    write_rows(path, list(rows.values()))


def require_unique_best(records: Iterable[Preference]) -> None:
    """Raise a DataError that names the records (n >= 2) whose best label is shared."""
    tied = [r for r in records if not r.has_unique_best]
    if tied:
        shown = ", ".join(f"{r.source or 'record'} {r.id!r} {list(r.labels)}" for r in tied[:5])
        more = f" and {len(tied) - 5} more" if len(tied) > 5 else ""
        raise DataError(
            "labels",
            f"{len(tied)} record(s) without a unique best response: {shown}{more}",
            "break the ties or drop these records, one best response each is needed" + SKIPPABLE,
        )


def content_id(
    turns: Sequence[Turn],
    responses: Sequence[str],
    labels: Sequence[float],
    domain: str = "",
    reference: str | None = None,
    principles: Sequence[str] | None = None,
) -> str:
    """An id from the content of a record: the first 16 hex digits of the SHA-256 of its JSON.

    The JSON is the list of the six arguments in this order (turns as [role, content] pairs, labels
    as floats), ASCII, without spaces. The id does not depend on the file, row or process.
    """
    said = [
        [[t["role"], t["content"]] for t in turns],
        list(responses),
        [float(x) for x in labels],
        domain,
        reference,
        None if principles is None else list(principles),
    ]
    return hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ one row


def parse_row(row: Mapping[str, Any], where: str = "") -> Preference:
    """A record from one row of any known shape. Errors begin with `where` ("file:line").

    Rated responses of HelpSteer are several rows of one record; only `read_preferences` reads them.
    """
    fields = Fields(row)
    try:
        content = read_content(fields)
        if content.rated:
            raise DataError("helpfulness", _LONE, "read all rows of its prompt in one file")
        return _record(fields, content, where)
    except DataError as e:
        raise e.at(where) from None


def _record(fields: Fields, content: Content, where: str) -> Preference:
    given, domain = _id(fields.get("id")), fields.get("domain")
    principles = fields.texts("principles") if "principles" in fields else None
    checked = Preference(
        "-" if given is None else given,
        content.turns,
        content.responses,
        content.labels,
        "" if domain is None else domain,
        fields.get("reference"),
        principles,
        where,
    )
    if given is not None:
        return checked
    # The content id is computed last, since it needs valid content.
    said = (checked.turns, checked.responses, checked.labels)
    return replace(
        checked, id=content_id(*said, checked.domain, checked.reference, checked.principles)
    )


def _id(given: Any) -> Any:
    """An id as a text. Many data sets number their rows; a column with gaps holds floats."""
    if type(given) is float and given.is_integer():
        given = int(given)
    return str(given) if type(given) is int else given


# ------------------------------------------------------------------------------ checks


def _check_texts(name: str, texts: Any) -> None:
    if not isinstance(texts, tuple) or (name == "responses" and not texts):
        raise DataError(name, show(texts), "give a tuple of strings, at least one response")
    for i, text in enumerate(texts):
        check_text(f"{name}[{i}]", text)


def _check_labels(name: str, labels: Any, n: int) -> None:
    for i, label in enumerate(labels):
        if type(label) not in (int, float):  # bool is an int to Python, but not a grade
            raise DataError(f"{name}[{i}]", show(label), "give a number")
        if not -_HUGE <= label <= _HUGE:  # false for NaN, and safe for integers beyond floats
            raise DataError(f"{name}[{i}]", show(label), "give a finite number")
    if len(labels) != n:
        raise DataError(name, f"{len(labels)} for {n} responses", "give one label a response")
    if n == 1 and labels[0] not in (0, 1):
        raise DataError(
            name, f"{labels[0]} for a single response", "a single response is 1 (correct) or 0"
        )
