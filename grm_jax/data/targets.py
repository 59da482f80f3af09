r"""The targets of supervised training, checked when they are read: critiques need parsable scores.

The run's template must be able to parse each critique, and its scores must agree with the row's own
`scores` and `correct`. A model that learns critiques without a parsable box never gives a verdict,
and its loss does not show that. The usual cause is a single backslash in the JSON: `"\boxed"` is a
backspace and "oxed". Trajectories that a stage has sampled may have failed critiques; they are not
read with this module.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from grm_jax.critique import Template, is_correct, read, shuffle
from grm_jax.critique.parse import last_box
from grm_jax.data.rows import MAX_BAD_SHARE, DataError, expand, iterate_rows
from grm_jax.data.trajectories import Instruction, Trajectory, parse_trajectory

log = logging.getLogger("grm_jax")

_LISTED = 10  # bad rows that the log shows
_CLOSE = 1e-6  # scores that differ by less count as equal

# What becomes of a LaTeX command with a single backslash in JSON, such as "\b" and "oxed".
_ESCAPES = {"\b": "b", "\f": "f", "\t": "t", "\r": "r", "\n": "n"}
_SINGLE_BACKSLASH = re.compile(
    "\b[a-z]+|\f(?:rac|orall)(?![a-z])|\t(?:ext[a-z]*\\{|imes(?![a-z])|heta(?![a-z]))"
    "|\r(?:ight|angle)(?![a-z])|\nabla(?![a-z])"
)
_NAMES = {"\b": "a backspace", "\f": "a form feed", "\t": "a tab", "\r": "a carriage return"}
_FAULTS = {
    "no_box": "holds no \\boxed{...} with scores",
    "empty": "has nothing in its \\boxed{}",
    "several_boxes": "has several boxes, none of which is a verdict",
    "separators": "has other separators than commas in its box",
    "markup": "has markup in its box",
    "wrong_count": "has another number of scores than responses in its box",
    "out_of_range": "has a score outside the template's range",
    "not_a_number": "has something else than numbers in its box",
    "truncated": "stopped at the length limit before its verdict",
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """Rows to learn from.

    Attributes:
      rows: trajectories and instructions.
      sources: the place of each row, as "file:line".
      skipped: the message of each bad row that was left out, in file order.
      causes: the number of bad rows by cause.
      rejected: the number of rows with `kept: false`, which are left out too.
    """

    rows: list[Trajectory | Instruction]
    sources: list[str]
    skipped: tuple[str, ...] = ()
    causes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rejected: int = 0


class TargetError(DataError):
    """A row that is not a valid target; `cause` names the kind of mistake."""

    def __init__(
        self, field: str, problem: str, fix: str, where: str = "", cause: str = "format"
    ) -> None:
        super().__init__(field, problem, fix, where)
        self.cause = cause


def read_targets(
    source: str | Path,
    *,
    many: Template,
    single: Template,
    skip_bad_rows: bool = False,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Targets:
    """Read the trajectories and instructions of `--instructions`, each checked.

    Args:
      many, single: the templates to which the critiques reply.
      skip_bad_rows: leave bad rows out and count them.
      max_bad_share: raise if more than this share of the rows is bad.

    Raises DataError for the first bad row, with the number of bad rows by cause; with
    `skip_bad_rows` if too many rows are bad or none is left.
    """
    rows: list[Trajectory | Instruction] = []
    sources: list[str] = []
    bad: list[DataError] = []
    causes: collections.Counter[str] = collections.Counter()
    unused: set[str] = set()
    rejected = 0
    for file in expand(source):
        for row in iterate_rows(file):
            try:
                target = parse_trajectory(row.load(), row.where, unused)
                if isinstance(target, Trajectory) and not target.kept:
                    rejected += 1
                    continue
                check_target(target, row.where, many=many, single=single)
            except DataError as error:
                bad.append(error)
                causes[error.cause if isinstance(error, TargetError) else "format"] += 1
                continue
            rows.append(target)
            sources.append(row.where)
    if unused:
        log.info("%s: fields of messages not used: %s", source, ", ".join(sorted(unused)))
    if rejected:
        log.info("%s: %d rows say kept: false; they are left out", source, rejected)
    if bad:
        _report(str(source), bad, causes, len(rows), skip_bad_rows, max_bad_share)
    if not rows:
        raise DataError(
            "kept", f"all {rejected} rows say false", "give rows that were kept", str(source)
        )
    return Targets(rows, sources, tuple(map(str, bad)), causes, rejected)


def _report(
    source: str,
    bad: list[DataError],
    causes: collections.Counter[str],
    good: int,
    skip_bad_rows: bool,
    max_bad_share: float,
) -> None:
    """Raise for bad rows, or log which are left out."""
    first, total = bad[0], good + len(bad)
    counted = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    shown = f"{len(bad)} of {total} rows are bad ({counted})"
    if not skip_bad_rows:
        more = f" ({shown}; --skip-bad-rows leaves them out)"
        raise DataError(first.field, first.problem, first.fix + more, first.where)
    if not good or len(bad) > max_bad_share * total:
        raise DataError(
            "",
            f"{shown}, more than {100 * max_bad_share:g}%; the first: {first}",
            "correct the file, since this many bad rows are no accident; or give a larger "
            "--max-bad-share",
            source,
        )
    for error in bad[:_LISTED]:
        log.warning("left out: %s", error)
    log.warning("%s: %s; they are left out", source, shown)


def check_target(
    row: Trajectory | Instruction, where: str = "", *, many: Template, single: Template
) -> None:
    """Raise TargetError for a critique that the template cannot parse or that contradicts its row,
    and for a text that has lost a backslash in JSON."""
    if isinstance(row, Instruction):
        reply = row.messages[-1]["content"]
        if not reply.strip():
            fix = "give the reply to learn"
            raise TargetError("messages[-1].content", "empty", fix, where, "empty reply")
        _check_backslashes("messages[-1].content", reply, where)
        return
    _check_backslashes("critique", row.text, where)
    n = len(row.responses)
    template = single if n == 1 else many
    cut = row.finish_reason == "length"
    parsed = read(template, row.text, n, truncated=cut)
    if parsed.scores is None:
        assert parsed.failure is not None
        box = last_box(row.text)
        raise TargetError(
            "critique",
            _FAULTS[parsed.failure] + (f": {box}" if box else f", and ends {row.text[-40:]!r}"),
            f"end it as the template {template.name!r} asks: {_example(template, n)}",
            where,
            parsed.failure,
        )
    if row.scores is not None and any(
        not abs(said - in_box) <= _CLOSE
        for said, in_box in zip(shuffle(row.scores, row.order), parsed.scores, strict=True)
    ):
        raise TargetError(
            "scores",
            f"{list(row.scores)}, but the critique says {last_box(row.text)}",
            "correct one of the two, or leave 'scores' out",
            where,
            "scores contradict the box",
        )
    if row.correct is not None and row.labels is not None:
        right = _says(parsed.scores, tuple(shuffle(row.labels, row.order)), template.threshold)
        if right is not None and right != row.correct:
            raise TargetError(
                "correct",
                f"{str(row.correct).lower()}, but by the labels {list(row.labels)} the critique's "
                f"{last_box(row.text)} is {'right' if right else 'wrong'}",
                "correct one of the three, or leave 'correct' out",
                where,
                "correct contradicts the box",
            )


def _says(
    scores: tuple[float, ...], labels: tuple[float, ...], threshold: float | None
) -> bool | None:
    """Whether the scores are correct; None if the labels do not decide it, or the top is tied."""
    if max(labels) in sorted(labels)[:-1] or max(scores) in sorted(scores)[:-1]:
        return None
    if len(labels) == 1 and (labels[0] not in (0, 1) or scores[0] == threshold):
        return None
    return is_correct(scores, labels, threshold=threshold)


def _check_backslashes(field: str, text: str, where: str) -> None:
    match = _SINGLE_BACKSLASH.search(text)
    if match is None:
        return
    mark, rest = match.group()[0], match.group()[1:].rstrip("{")
    letter = _ESCAPES[mark]
    raise TargetError(
        field,
        f"U+{ord(mark):04X} stands before {rest!r}: `\\{letter}` in the JSON is "
        f"{_NAMES.get(mark, 'a line end')}",
        f"write `\\\\{letter}{rest}`",
        where,
        "single backslash",
    )


def _example(template: Template, n: int) -> str:
    if template.reads == "index":
        return "\\boxed{1} for the first response"
    return f"\\boxed{{{', '.join([f'{template.high:g}'] * n)}}} for {n} response(s) at the top"
