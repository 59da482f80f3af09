"""A file of rows in, the same rows with verdicts out, line by line.

    rows of any shape (labels or not) -> requests, all checked -> judge -> {..row, "verdict": {..}}

Line i of the output belongs to row i of the input. Lines are written as soon as all before them are
there, so that a run that was stopped goes on behind the last whole line. A row that is wrong stops
the run before anything is sampled, or gets a verdict with failure "bad_row".
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grm_jax import files
from grm_jax.data.fields import Fields
from grm_jax.data.rows import SKIPPABLE, DataError, expand, iterate_rows, parse_line
from grm_jax.data.shapes import read_texts
from grm_jax.errors import UserError
from grm_jax.judge.judge import Judge
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.session import prepare
from grm_jax.judge.verdict import Verdict
from grm_jax.metrics import Progress

log = logging.getLogger("grm_jax")
BAD_ROW = "bad_row"
_CHUNK = 4096  # rows whose prompts are held at once


@dataclasses.dataclass(frozen=True)
class Task:
    """One row to be judged.

    Attributes:
      row: as it was read. where: "file:line".
      request: what the judge is asked; None for a bad row, with its `error`.
    """

    row: dict[str, Any]
    where: str
    request: JudgeRequest | None
    error: str | None = None


@dataclasses.dataclass
class Summary:
    """How many rows there are, and by name of a failure the places of those that have it."""

    rows: int = 0
    failures: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(map(len, self.failures.values()))


def read_tasks(
    source: str,
    options: ScoreOptions,
    judge: Judge,
    *,
    criteria: str | None = None,
    skip_bad_rows: bool = False,
) -> list[Task]:
    """All rows of a file, directory or pattern, or of standard input ("-"), as requests.

    Args:
      criteria: added to the principles of every row.

    Raises DataError "file:line: field: ..." for the first row that can not be read or judged,
    unless they are to be skipped.
    """
    tasks: list[Task] = []
    for where, load, cells in _rows(source):
        row: dict[str, Any] = {}
        try:
            row = load()
            request = request_of(row, options, criteria=criteria, cells=cells)
            prepare(judge, request)
        except UserError as error:
            if not skip_bad_rows:
                raise _placed(error, where) from None
            tasks.append(Task(row, where, None, str(_placed(error, where))))
        else:
            tasks.append(Task(row, where, request))
    if not tasks:
        raise UserError(f"{source}: no rows; give at least one")
    if all(task.request is None for task in tasks):
        raise UserError(f"all {len(tasks)} rows are bad; the first: {tasks[0].error}")
    return tasks


def request_of(
    row: dict[str, Any],
    options: ScoreOptions,
    *,
    criteria: str | None = None,
    cells: bool = False,
) -> JudgeRequest:
    """A row of any shape that `data/shapes.py` lists, with or without labels, as a request.

    `reference`, `principles` and `criteria` are read where they stand beside it.
    """
    fields = Fields(row, cells=cells)
    turns, responses = read_texts(fields)
    stated = fields.get("criteria")
    stated = [stated] if isinstance(stated, str) else list(stated or [])
    return JudgeRequest.make(
        turns, responses, reference=fields.get("reference"), principles=fields.get("principles"),
        criteria=[*stated, *([criteria] if criteria else [])] or None, options=options,
    )  # fmt: skip


def score_file(judge: Judge, tasks: Sequence[Task], output: Path, *, texts: bool = True) -> Summary:
    """Judge the tasks and write a line each; go on where an earlier run stopped.

    Args:
      texts: whether the critiques are written too, or their scores alone.

    Raises UserError where the output's lines are not those of these tasks, options and this judge.
    """
    summary = Summary()
    done = _resume(output, tasks, judge, summary)
    if done:
        log.info("output           %d of %d rows are there already", done, len(tasks))
    progress = Progress("judge", len(tasks))
    progress.skip(done)
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.named(output), output.open("a", encoding="utf-8", errors="backslashreplace") as out:
        for start in range(done, len(tasks), _CHUNK):
            part = tasks[start : start + _CHUNK]
            for task, verdict in zip(part, _in_order(judge, part), strict=True):
                line = {**task.row, "verdict": _entry(task, verdict, texts)}
                out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
                out.flush()
                _count(summary, task.where, line["verdict"])
                progress.update(1, judge.sampler.stats.line())
    return summary


def _in_order(judge: Judge, tasks: Sequence[Task]) -> Iterator[Verdict | None]:
    """The verdicts in the order of the tasks, each as soon as all before it are there."""
    asked = [index for index, task in enumerate(tasks) if task.request is not None]
    requests = [task.request for task in tasks if task.request is not None]
    ready: dict[int, Verdict | None] = {
        index: None for index, task in enumerate(tasks) if task.request is None
    }
    following = 0
    for place, verdict in judge.stream(requests):
        ready[asked[place]] = verdict
        while following in ready:
            yield ready.pop(following)
            following += 1
    while following in ready:
        yield ready.pop(following)
        following += 1


def _entry(task: Task, verdict: Verdict | None, texts: bool) -> dict[str, Any]:
    if task.request is None or verdict is None:
        return {"failure": BAD_ROW, "error": task.error}
    return {"request": task.request.digest, **verdict.to_json(critiques=texts)}


def _count(summary: Summary, where: str, entry: dict[str, Any]) -> None:
    summary.rows += 1
    if entry["failure"] is not None:
        summary.failures.setdefault(entry["failure"], []).append(where)


def _resume(output: Path, tasks: Sequence[Task], judge: Judge, summary: Summary) -> int:
    """How many lines are there already; a last line that was cut off is removed."""
    if not output.exists():
        return 0
    blob = files.read_bytes(output)
    whole = blob[: blob.rfind(b"\n") + 1]
    lines = whole.splitlines()
    fix = f"give another --output, or delete {output}"
    if len(lines) > len(tasks):
        raise UserError(f"{output}: {len(lines)} lines, and there are {len(tasks)} rows; {fix}")
    for number, (line, task) in enumerate(zip(lines, tasks, strict=False), 1):
        entry = parse_line(line, f"{output}:{number}").get("verdict")
        if not isinstance(entry, dict) or "failure" not in entry:
            raise UserError(f"{output}:{number}: no verdict; {fix}")
        said = entry.get("request"), entry.get("judge")
        wanted = (None, None) if task.request is None else (task.request.digest, judge.fingerprint)
        if said != wanted:
            raise UserError(
                f"{output}:{number}: it is of another row, other options or another judge than "
                f"{task.where} now; {fix}"
            )
        _count(summary, task.where, entry)
    if len(whole) < len(blob):
        with output.open("rb+") as file:
            file.truncate(len(whole))
    return len(lines)


def _rows(source: str) -> Iterable[tuple[str, Any, bool]]:
    """("file:line", what loads the row, whether it is of a CSV file) of each row."""
    if source == "-":
        for number, line in enumerate(sys.stdin.buffer, 1):
            if line.strip():
                where = f"standard input:{number}"
                yield where, lambda line=line, where=where: parse_line(line, where), False
        return
    for path in expand(source):
        for row in iterate_rows(path):
            yield row.where, row.load, row.cells


def _placed(error: UserError, where: str) -> UserError:
    if isinstance(error, DataError):
        return error if error.where else error.at(where)
    return UserError(f"{where}: {error}{SKIPPABLE}")
