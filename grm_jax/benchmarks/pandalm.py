"""PandaLM test set (Wang et al., arXiv:2306.05087): 999 pairs, three annotators, ties are a class.

Reads `testset-v1.json`: `idx, instruction, input, response1, response2, annotator1..3: 0 | 1 | 2`,
0 for a tie. The true class is the majority of the annotators; the figures are accuracy over the
three classes and the macro averages of precision, recall and F1. A judge's verdict is "tie" if both
responses have the same score.

The authors' file has empty responses, and the JSON value `true` where a response was this word;
both are judged as texts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import FigureLike, Macro, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, prompt_key
from grm_jax.scoring.measures import Measure, Verdicts, top, unparsed_credit
from grm_jax.scoring.rules import Form, Rules

CLASSES = {"tie": (0.0, 0.0), "first": (1.0, 0.0), "second": (0.0, 1.0)}
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")
_VOTES = {0: "tie", 1: "first", 2: "second"}
SOURCE = Source(
    "clone github.com/WeOpenML/PandaLM and give data/testset-v1.json",
    folders=("pandalm", "PandaLM"),
    patterns=("*testset-v1.json",),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All pairs; labels (1, 0), (0, 1), or (0, 0) for a tie."""
    odd: list[str] = []
    paths = files(path, SOURCE)
    test_sets = [file for file in paths if file.name == "testset-v1.json"]  # not a judge's answers
    records = collect(
        rows_of(test_sets or paths), lambda f: _parse(f, odd), path, skip_bad_rows=skip_bad_rows
    )
    note = f"{len(odd)} responses are empty or not texts in the file; judged as they are"
    return BenchmarkRecords(records, records.skipped, [note] if odd else [])


def _parse(fields: Fields, odd: list[str]) -> list[Item]:
    said = collections.Counter(fields.choice(name, _VOTES) for name in _ANNOTATORS)
    (majority, count), *_ = said.most_common(1)
    if count < 2:
        raise fields.wrong("annotator1", "three annotators, three answers", "give a majority")
    responses = []
    for name in ("response1", "response2"):
        value = fields.get(name, "give a string")
        text = str(value) if isinstance(value, bool) else fields.text(name, empty=True)
        if isinstance(value, bool) or not text.strip():
            odd.append(fields.where)
        responses.append(text)
    asked = fields.text("instruction", empty=True)
    given = fields.text("input", empty=True)
    query = "\n\n".join(part for part in (asked, given) if part.strip())
    return [
        Item(
            fields.key("idx"),
            user(fields.checked("instruction", query)),
            tuple(responses),
            CLASSES[majority],
            domain=str(fields.row.get("motivation_app") or ""),
            source=fields.where,
        )
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[FigureLike, ...]:
    """overall: accuracy and the macro averages; classes: accuracy by the true class."""
    classes = {
        name: np.asarray([i for i, r in enumerate(records) if r.labels == labels], int)
        for name, labels in CLASSES.items()
    }
    classes = {name: members for name, members in classes.items() if len(members)}
    return (
        mean_figure("overall", "accuracy", np.arange(len(records)), "class"),
        *(
            Macro("overall", f"macro {kind}", kind, classes)
            for kind in ("precision", "recall", "f1")
        ),
        *(mean_figure("classes", name, members, "class") for name, members in classes.items()),
    )


def _says(name: str) -> Measure:
    """1 where a verdict is this class, else 0; 0 for unjudged records."""

    def measure(verdicts: Verdicts) -> np.ndarray:
        values = verdicts.empty()
        for members, scores, _ in verdicts.groups():
            leading = top(scores)  # [R, S, 2]
            both = leading.all(axis=2)
            said = {
                "tie": both,
                "first": leading[..., 0] & ~both,
                "second": leading[..., 1] & ~both,
            }
            values[members] = said[name]
        return values

    return measure


def _right(verdicts: Verdicts) -> np.ndarray:
    """1 where a verdict is the true class. Unjudged records earn what the rules say, with chance
    1/3."""
    rules, values = verdicts.rules, verdicts.empty()
    unread = unparsed_credit(rules, 3)
    for name, labels in CLASSES.items():
        here = np.asarray([record.labels == labels for record in verdicts.records])
        values[here] = _says(name)(verdicts)[here]
    return np.where(verdicts.votes.unjudged(), unread, values)


BENCHMARK = Benchmark(
    name="pandalm",
    about="PandaLM test set: 999 pairs with three annotators; ties are a class",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={"class": _right, **{f"says {name}": _says(name) for name in CLASSES}},
    authors=Rules(ties="wrong", unparsed="wrong", order="fixed"),
    paper=Rules(),
    fixed=("ties", "threshold"),
    cluster=prompt_key,
)
