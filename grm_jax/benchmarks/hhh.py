"""HHH alignment (Askell et al., arXiv:2112.00861): 221 pairs; helpful, honest, harmless, other.

Reads BIG-bench's rows (`HuggingFaceH4/hhh_alignment`: `input, targets: {choices, labels}`, one
folder or file a part; or `task.json`: `examples: [{input, target_scores: {response: 0 | 1}}]`), and
the file of prometheus-eval, in which each response is inside a grading prompt: the query and
the response are taken from it, and the rubric is dropped, since it says what to look for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.critique.prompt import Turn
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, parse_line
from grm_jax.scoring.benchmark import Benchmark, Source, missing_note
from grm_jax.scoring.figures import Figure, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.rules import Form, Rules

PARTS = ("helpful", "honest", "harmless", "other")
_GRADING = re.compile(
    r"###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:\n(.*?)\n\n###", re.DOTALL
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
SOURCE = Source(
    "download HuggingFaceH4/hhh_alignment from the Hugging Face hub, or "
    "eval/benchmark/data/hhh_alignment_eval.json of github.com/prometheus-eval/prometheus-eval",
    folders=("hhh", "hhh_alignment", "prometheus_eval"),
    hub="HuggingFaceH4/hhh_alignment",
    patterns=("*hhh*.json", "*/task.json", "*.parquet", "*.jsonl"),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All pairs; `domain` is the part, the id its place in the file."""
    records: list[Preference] = []
    skipped: list[str] = []
    for file in files(path, SOURCE):
        names = (file.stem, *reversed(file.parent.parts))
        part = next((part for name in names for part in PARTS if name.startswith(part)), "")
        part_records = collect(
            _rows(file), functools.partial(_parse, part=part), file,
            skip_bad_rows=skip_bad_rows,
        )  # fmt: skip
        records += part_records
        skipped += part_records.skipped
    if not records:
        raise DataError("", f"no good row, the first: {skipped[0]}", "see its fix", str(path))
    return BenchmarkRecords(records, skipped, missing_note(records, PARTS))


def _rows(file: Path) -> Iterator[tuple[str, Callable[[], Fields]]]:
    """Rows of a file, or the `examples` of BIG-bench's task.json."""
    if file.name != "task.json":
        yield from rows_of([file])
        return
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise DataError("", f"cannot be read: {error}", "copy the file again", str(file)) from error
    task = Fields(parse_line(blob, str(file)), str(file))
    examples = task.get("examples", "give BIG-bench's task.json")
    if not isinstance(examples, list) or not all(isinstance(one, dict) for one in examples):
        raise task.wrong("examples", "no list of objects", "give BIG-bench's task.json")
    for number, row in enumerate(examples, 1):
        where = f"{file}:row {number}"
        yield where, lambda row=row, where=where: Fields(row, where)


def _parse(fields: Fields, *, part: str) -> list[Item]:
    row = re.split(r"row |:", fields.where)[-1]
    if "chosen_instruction" in fields or "rejected_instruction" in fields:
        part = fields.choice("source", {name: name for name in PARTS})
        query, chosen = _graded(fields, "chosen_instruction")
        other, rejected = _graded(fields, "rejected_instruction")
        if query != other:
            raise fields.wrong(
                "rejected_instruction", "another query than in chosen_instruction",
                "give a pair of responses to one query",
            )  # fmt: skip
        labels = (1.0, 0.0)
    elif "target_scores" in fields:
        query, marks = fields.text("input"), fields.inner("target_scores").row
        if len(marks) != 2 or sorted(marks.values(), key=str) != [0, 1]:
            raise fields.wrong("target_scores", str(marks)[:60], "give two responses, one with 1")
        chosen, rejected = (fields.checked("target_scores", text, empty=True) for text in marks)
        labels = tuple(float(mark) for mark in marks.values())
    else:
        targets = fields.inner("targets")
        query = fields.text("input")
        chosen, rejected = targets.texts("choices", 2, empty=True)
        values = targets.get("labels", "give [1, 0] or [0, 1]")
        if values not in ([1, 0], [0, 1]):
            raise fields.wrong("targets.labels", str(values)[:60], "give [1, 0] or [0, 1]")
        labels = tuple(float(value) for value in values)
    return [
        Item(
            f"{part or 'hhh'}/{row}", _conversation(query), (chosen, rejected), labels,
            domain=part, source=fields.where,
        )
    ]  # fmt: skip


def _graded(fields: Fields, name: str) -> tuple[str, str]:
    """(query, response) of a grading prompt."""
    match = _GRADING.search(fields.text(name))
    if match is None:
        raise fields.wrong(
            name, "no '###The instruction to evaluate:' with '###Response to evaluate:' after it",
            "give the file as it was published",
        )  # fmt: skip
    query, response = match.groups()
    return fields.checked(name, query), fields.checked(name, response, empty=True)


def _conversation(query: str) -> tuple[Turn, ...]:
    """A query, or the turns of "Human: ... Assistant: ... Human: ..."."""
    parts = _TURN.split(query.strip())
    said = [text.strip() for text in parts[2::2]]
    if parts[0].strip() or len(parts) < 5 or not all(said):
        return user(re.sub(r"\AHuman: ?", "", query.strip()))
    roles = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
    if roles[-1] != "user":
        return user(query)
    return tuple(Turn(role=r, content=t) for r, t in zip(roles, said, strict=True))


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: accuracy; sections: the parts."""
    members = group_by(records, lambda record: record.domain)
    return (
        mean_figure("overall", "accuracy", np.arange(len(records))),
        *(mean_figure("sections", name, members[name]) for name in PARTS if name in members),
    )


BENCHMARK = Benchmark(
    name="hhh",
    about="HHH alignment: 221 pairs; helpful, honest, harmless, other",
    read=read,
    figures=figures,
    source=SOURCE,
    authors=Rules(ties="half", unparsed="wrong"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
