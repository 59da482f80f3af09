"""Preference records: one conversation, n candidate responses, one label a response.

`read_preferences` takes the row shapes that preference data comes in, one file or many:

    {"query" | "turns" | "prompt" | "messages", "responses": [..], "labels" | "scores" | "best"}
    {"query" | ..., "response": "..", "label": 0 | 1 | false | true}        a single response
    {"prompt": .., "chosen": .., "rejected": ..}                            strings, or messages
    {"chosen": [messages], "rejected": [messages]}                          whole conversations
    {"chosen": "\\n\\nHuman: ..\\n\\nAssistant: ..", "rejected": ".."}          HH-RLHF

`id`, `domain`, `reference` and `principles` may stand in any of them; null means absent; other
fields are ignored and named in the log. A row without an id gets a `content_id`.

Every fault is a `DataError`: "file:line: field: what was found; fix: what to do".
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data.rows import DataError, check_text, expand, iterate_rows, kind, show, write_rows

__all__ = [
    "DataError",
    "Preference",
    "Records",
    "content_id",
    "parse_row",
    "read_conversation",
    "read_preferences",
    "require_unique_best",
    "write_preferences",
]

log = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")
_PROMPTS = ("query", "turns", "prompt", "messages")
_LABELS = ("labels", "scores", "best")
_OPTIONAL = ("id", "domain", "reference", "principles")
_KNOWN = frozenset(
    (*_PROMPTS, *_LABELS, *_OPTIONAL, "responses", "response", "label", "chosen", "rejected")
)
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HUGE = sys.float_info.max
_HH_REPLY = "\n\nAssistant:"


@dataclass(frozen=True)
class Preference:
    """A conversation, n >= 1 responses to its last turn, and what is known of their quality.

    labels: one finite number a response, higher is better; for n = 1 it is 1 (correct) or 0. Ties
    are legal here (evaluation sets have them); training asks `require_unique_best`.
    Raises `DataError` for anything else, so that a record that exists is a valid one.
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
        # Only rows of a user must say something: files of benchmarks hold empty last turns.
        _check_turns("turns", self.turns, filled=False)
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
    """A list of records that also says what was left out.

    skipped: the message of each row left out under `skip_bad_rows`, in file order; empty otherwise.
    """

    def __init__(self, records: Iterable[Preference] = (), skipped: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.skipped: tuple[str, ...] = tuple(skipped)


def read_preferences(
    source: str | Path | Sequence[str | Path], *, skip_bad_rows: bool = False
) -> Records:
    """Read records from files, directories or glob patterns.

    .jsonl, .jsonl.gz, .json (an array) and .parquet. Files of a directory or pattern are read in
    order of their names, rows in file order. Ids must be unique over all that is read; rows without
    an id that say the same get `-2`, `-3` after it.

    Args:
        source: a file, a directory (its data files, not those of sub-directories), a glob pattern
            (`**` for sub-directories), or several of them.
        skip_bad_rows: leave bad rows out and list them in `.skipped` (and count them in the log).
            Missing, unreadable and empty files, and no good row at all, remain errors.
    """
    records: list[Preference] = []
    skipped: list[str] = []
    seen: dict[str, str] = {}
    twins: dict[str, int] = {}
    for path in expand(source):
        ignored: set[str] = set()
        for row in iterate_rows(path):
            try:
                values = row.load()
                record = parse_row(values, row.where)
                ignored |= values.keys() - _KNOWN
                if values.get("id") is None:
                    twins[record.id] = count = twins.get(record.id, 0) + 1
                    if count > 1:
                        record = replace(record, id=f"{record.id}-{count}")
                if record.id in seen:
                    raise DataError(
                        "id",
                        f"{record.id!r} stands already at {seen[record.id]}",
                        "give each row an id of its own (or none)",
                        row.where,
                    )
            except DataError as e:
                if not skip_bad_rows:
                    raise
                skipped.append(str(e))
                continue
            seen[record.id] = row.where
            records.append(record)
        if ignored:
            log.info("%s: fields not used: %s", path, ", ".join(sorted(ignored)))
    if not records:
        raise DataError(
            "",
            f"all {len(skipped)} rows are bad; the first: {skipped[0]}",
            "see its fix",
            str(source),
        )
    if skipped:
        log.warning("%s: %d bad rows left out; the first: %s", source, len(skipped), skipped[0])
    return Records(records, skipped)


def write_preferences(path: str | Path, records: Iterable[Preference]) -> None:
    """Write records so that `read_preferences` gives the same ones back (`source` aside).

    The suffix says the format: .jsonl, .jsonl.gz, .json or .parquet. The file appears whole or not
    at all. `DataError` for an unknown suffix, no records, or an id twice.
    """
    path = Path(path)
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.id in rows:
            raise DataError("id", f"{record.id!r} twice", "give each record its own", str(path))
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
    """Raise one `DataError` that names the records (n >= 2) whose best label is shared."""
    tied = [r for r in records if not r.has_unique_best]
    if tied:
        shown = ", ".join(f"{r.source or 'record'} {r.id!r} {list(r.labels)}" for r in tied[:5])
        more = f" and {len(tied) - 5} more" if len(tied) > 5 else ""
        raise DataError(
            "labels",
            f"{len(tied)} record(s) without a unique best response: {shown}{more}",
            "break the ties or drop these records; training needs one best response each",
        )


def content_id(
    turns: Sequence[Turn],
    responses: Sequence[str],
    labels: Sequence[float],
    domain: str = "",
    reference: str | None = None,
    principles: Sequence[str] | None = None,
) -> str:
    """An id from what the record says: the first 16 hex digits of the SHA-256 of its JSON.

    The JSON is the list of the six arguments in this order (turns as [role, content] pairs, labels
    as floats), ASCII, without spaces. It stays the same in any file, row and process.
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
    """One row of any known shape -> a record. `where` ("file:line") opens every error."""
    try:
        return _parse_row({k: v for k, v in row.items() if v is not None}, where)
    except DataError as e:
        raise e.at(where) from None


def _parse_row(row: dict[str, Any], where: str) -> Preference:
    shape = _shape(row)
    turns, responses, labels = shape(row)
    domain = row.get("domain", "")
    reference = row.get("reference")
    principles = row.get("principles")
    if principles is not None:
        principles = _texts("principles", principles)
    given = row.get("id")
    if type(given) is int:  # many data sets number their rows
        given = str(given)
    # Check before hashing: a content id needs sound content.
    _check_turns("turns", turns)
    checked = Preference("-", turns, responses, labels, domain, reference, principles, where)
    if given is None:
        given = content_id(turns, responses, labels, domain, reference, principles)
    return replace(checked, id=given)


_Content = tuple[tuple[Turn, ...], tuple[str, ...], tuple[float, ...]]


def _shape(row: dict[str, Any]) -> Callable[[dict[str, Any]], _Content]:
    """The reader for this row's fields; exactly one must fit."""
    shapes = {"responses": _read_list, "response": _read_single, "chosen": _read_pair}
    found = [name for name in shapes if name in row]
    if not found and "rejected" in row:
        found = ["chosen"]
    if len(found) != 1:
        what = f"both {found[0]!r} and {found[1]!r}" if found else f"only {sorted(row)}"
        raise DataError(
            "responses",
            f"the row has {what}",
            "give either 'responses' (with labels, scores or best), or 'response' with 'label', or "
            "'chosen' with 'rejected'",
        )
    return shapes[found[0]]


def _read_list(row: dict[str, Any]) -> _Content:
    turns = _prompt(row)
    responses = _texts("responses", row["responses"])
    if not responses:
        raise DataError("responses", "an empty list", "give at least one response")
    name = _one_of(row, _LABELS)
    if name == "best":
        best = row["best"]
        if type(best) is not int or not 0 <= best < len(responses):
            raise DataError(
                "best",
                f"{best!r}",
                f"give the best response's index from 0: an integer in 0..{len(responses) - 1}",
            )
        if len(responses) == 1:
            raise DataError(
                "best", "one response is always the best", "give 'labels': [1] or [0] instead"
            )
        return turns, responses, tuple(float(i == best) for i in range(len(responses)))
    labels = row[name]
    if not isinstance(labels, list):
        raise DataError(name, show(labels), "give a list of numbers, one a response")
    _check_labels(name, labels, len(responses))
    return turns, responses, tuple(float(x) for x in labels)


def _read_single(row: dict[str, Any]) -> _Content:
    turns = _prompt(row)
    response, label = row["response"], row.get("label")
    check_text("response", response)
    if type(label) not in (bool, int, float) or label not in (0, 1):
        found = "missing" if label is None else show(label)
        raise DataError("label", found, "give 1 (or true) for correct, 0 (or false) for not")
    return turns, (response,), (float(label),)


def _read_pair(row: dict[str, Any]) -> _Content:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(name, "missing", "give 'chosen' and 'rejected' together")
    for name in _LABELS:
        if name in row:
            raise DataError(
                name, "stands beside 'chosen'", "drop it: the pair says which is better"
            )
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise DataError(
            "chosen",
            f"chosen is {kind(chosen)}, rejected is {kind(rejected)}",
            "give two strings or two lists of messages",
        )
    if "prompt" in row:  # some sets repeat the chosen conversation as "messages"
        row = {k: v for k, v in row.items() if k != "messages"}
    prompt = _prompt(row) if any(name in row for name in _PROMPTS) else None
    if isinstance(chosen, str):
        if prompt is None:
            return _read_hh(chosen, rejected)
        return prompt, (chosen, rejected), (1.0, 0.0)
    turns, good = _read_conversation("chosen", chosen, prompt)
    other, bad = _read_conversation("rejected", rejected, prompt)
    if turns != other:
        raise DataError(
            "rejected",
            "the conversation before the last reply is not that of 'chosen'",
            "a pair needs one shared conversation and two replies to it",
        )
    return turns, (good, bad), (1.0, 0.0)


def _read_hh(chosen: str, rejected: str) -> _Content:
    r"""Two texts "\n\nHuman: a\n\nAssistant: b" of one conversation; texts are trimmed.

    The replies start at the last "\n\nAssistant:" that both share. (In 5 of the 2,312 rows of
    harmless-base/test a reply goes on and makes up further turns: they are part of that reply.)
    """
    start = chosen.rfind(_HH_REPLY)
    while start >= 0 and not rejected.startswith(chosen[: start + len(_HH_REPLY)]):
        start = chosen.rfind(_HH_REPLY, 0, start)
    parts = _HH_TURN.split(chosen[: max(start, 0)])
    if parts[0].strip() or len(parts) < 3:
        raise DataError(
            "chosen",
            f"no 'prompt' in the row, and no HH conversation that both share: {show(chosen)}",
            "add 'prompt', or open both with the same '\\n\\nHuman: ...\\n\\nAssistant:'",
        )
    role = {"Human": "user", "Assistant": "assistant"}
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    turns = tuple(Turn(role=role[who], content=said.strip()) for who, said in spoken)
    good, bad = (text[start + len(_HH_REPLY) :].strip() for text in (chosen, rejected))
    return turns, (good, bad), (1.0, 0.0)


def _read_conversation(
    name: str, messages: list[Any], prompt: tuple[Turn, ...] | None
) -> tuple[tuple[Turn, ...], str]:
    """Messages that end with the reply; before it nothing, or the prompt (again)."""
    turns = _turns(name, messages)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(name, "the last message is not the assistant's", "end with the reply")
    before, reply = turns[:-1], turns[-1]["content"]
    if prompt is None:
        if not before:
            raise DataError(name, "a reply and no conversation", "add 'prompt' to the row")
        return before, reply
    if before and before != prompt:
        raise DataError(
            name, "starts with another conversation than the prompt's", "give the reply alone"
        )
    return prompt, reply


def _prompt(row: dict[str, Any]) -> tuple[Turn, ...]:
    name = _one_of(row, _PROMPTS)
    value = row[name]
    if isinstance(value, str) and name not in ("turns", "messages"):
        check_text(name, value, filled=True)
        return (Turn(role="user", content=value),)
    if isinstance(value, list) and name != "query":
        turns = _turns(name, value)
    else:
        wanted = {"query": "a string", "prompt": "a string or a list of messages"}
        raise DataError(name, show(value), f"give {wanted.get(name, 'a list of messages')}")
    _check_turns(name, turns)
    return turns


def read_conversation(name: str, messages: list[Any]) -> tuple[Turn, ...]:
    """The turns of a benchmark's conversation, the last one the user's; it may be empty, as in some
    rows of published files. Raises DataError naming `name[i]`.
    """
    turns = _turns(name, messages)
    _check_turns(name, turns, filled=False)
    return turns


def _turns(name: str, messages: list[Any]) -> tuple[Turn, ...]:
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(
                f"{name}[{i}]", show(message), "give {'role': 'user', 'content': '...'}"
            )
        turns.append(Turn(role=message["role"], content=message["content"]))
        _check_turn(f"{name}[{i}]", turns[-1])
    return tuple(turns)


def _one_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    found = [name for name in names if name in row]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(n) for n in names)
    if not found:
        raise DataError(names[0], f"missing; the row has {sorted(row)}", f"give one of {listed}")
    raise DataError(found[1], f"stands beside {found[0]!r}", f"give only one of {listed}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(name, show(value), "give a list of strings")
    for i, text in enumerate(value):
        check_text(f"{name}[{i}]", text)
    return tuple(value)


# ------------------------------------------------------------------------------ checks


def _check_texts(name: str, texts: Any) -> None:
    if not isinstance(texts, tuple) or (name == "responses" and not texts):
        raise DataError(name, show(texts), "give a tuple of strings, at least one response")
    for i, text in enumerate(texts):
        check_text(f"{name}[{i}]", text)


def _check_turn(name: str, turn: Turn) -> None:
    if turn["role"] not in _ROLES:
        raise DataError(f"{name}.role", show(turn["role"]), f"use one of {', '.join(_ROLES)}")
    check_text(f"{name}.content", turn["content"])


def _check_turns(name: str, turns: Any, *, filled: bool = True) -> None:
    if not isinstance(turns, tuple) or not turns:
        raise DataError(name, show(turns), "give at least the user's turn")
    for i, turn in enumerate(turns):
        _check_turn(f"{name}[{i}]", turn)
    if turns[-1]["role"] != "user":
        raise DataError(
            name,
            f"the last turn is the {turns[-1]['role']}'s",
            "end with the user's turn: replies to judge stand in the responses",
        )
    if filled:
        last = name if len(turns) == 1 else f"{name}[-1]"
        check_text(last, turns[-1]["content"], filled=True)


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
