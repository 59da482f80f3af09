"""PPE Correctness, Preference Proxy Evaluations (Frick et al., arXiv:2410.14872): verifiable truth.

Reads `lmarena-ai/PPE-*-Best-of-K`, five data sets: `question_id, prompt, response_1 ..
response_32, scores: [bool], sampled_conflict_pairs: [[i, j]]` with i, j from 0.

    form "pairs"   the sampled pairs: what LLM judges are scored on, mean over the data sets
    form "single"  every response rated alone: best-of-K curve with its maximum, loss and end
                   (section 5.2), and ROC-AUC of scores scaled to 0..1 within each row

GSM8K's published solutions (`example_model_solutions.jsonl` of openai/grade-school-math:
`question`, and a solution with `is_correct` of each of four models) are read as one more data set,
with all of a row's pairs of a correct and an incorrect one.

Best of K is the exact expectation over all subsets of K of a row's responses; if several responses
share the top of a subset, one of them is drawn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grm_jax.benchmarks.ppe_preference import GET, PATTERNS
from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark, Source, missing_note
from grm_jax.scoring.figures import Combined, Figure, FigureLike, RocAuc, Term, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, item_of, prompt_key
from grm_jax.scoring.measures import Measure, Verdicts, score
from grm_jax.scoring.rules import Form, Rules

OFFICIAL = ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")
SETS = {  # data set -> pattern of the names of its files and folders
    "GSM8K": r"gsm8k|grade[-_]school",
    "MMLU-Pro": r"mmlu[-_]?pro",
    "MATH": r"math",
    "GPQA": r"gpqa",
    "MBPP-Plus": r"mbpp",
    "IFEval": r"ifeval",
}
SOURCE = Source(GET, folders=("ppe-correctness", "ppe", "gsm8k_solutions"), patterns=PATTERNS)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """The sampled pairs of every row, or (form "single") every response; `domain`: the data set."""
    records: list[Preference] = []
    skipped: list[str] = []
    repeats: list[str] = []
    for file in files(path, SOURCE):
        if path.is_dir() and re.search("human[-_]?preference", str(file), re.IGNORECASE):
            continue  # it lies beside the other sets if all of PPE was downloaded
        name = _set_of(file)
        parse = functools.partial(_row, name=name, form=form, repeats=repeats)
        of_file = collect(rows_of([file]), parse, file, skip_bad_rows=skip_bad_rows)
        records += of_file
        skipped += of_file.skipped
    notes = missing_note(records, OFFICIAL)
    if repeats:
        notes.append(f"{len(repeats)} sampled pairs that are repeated (or reversed) are asked once")
    return BenchmarkRecords(records, skipped, notes)


def _set_of(file: Path) -> str:
    """The data set of a file, from its name or the name of the nearest folder that matches."""
    for part in (file.name, *reversed(file.parent.parts)):
        for name, pattern in SETS.items():
            if re.search(pattern, part, re.IGNORECASE):
                return name
    raise DataError(
        "", "its path names no data set", f"keep a folder named after one of {', '.join(SETS)}",
        str(file),
    )  # fmt: skip


def _row(fields: Fields, *, name: str, form: Form, repeats: list[str]) -> list[Item]:
    if "ground_truth" in fields and "question" in fields:
        prompt, number, replies, right, pairs = _solutions(fields)
    else:
        number = fields.key("question_id")
        count = sum(re.fullmatch(r"response_\d+", field) is not None for field in fields.row)
        replies = [fields.text(f"response_{i + 1}", empty=True) for i in range(count)]
        right = _flags(fields, count)
        pairs = _pairs(fields, right) if form == "pairs" else []
        prompt = fields.text("prompt", empty=True)
    item = f"{name}/{number}"
    if form == "single":
        return [
            Item(
                f"{item}/{i}", user(prompt), (reply,), (float(right[i]),), domain=name,
                source=fields.where, item=item, place=str(i),
            )
            for i, reply in enumerate(replies)
        ]  # fmt: skip
    once: dict[frozenset[int], tuple[int, int]] = {}
    for i, j in pairs:
        key = frozenset((i, j))
        if key in once:
            repeats.append(item)
        once.setdefault(key, (i, j) if right[i] else (j, i))
    return [
        Item(
            f"{item}/{good}-{bad}", user(prompt), (replies[good], replies[bad]), (1.0, 0.0),
            domain=name, source=fields.where, item=item, place=f"{good}-{bad}",
        )
        for good, bad in once.values()
    ]  # fmt: skip


def _solutions(
    fields: Fields,
) -> tuple[str, str, list[str], list[bool], list[tuple[int, int]]]:
    """GSM8K's rows: (prompt, number, replies, which are right, all pairs of right and wrong)."""
    number = fields.where.rpartition(":")[2].removeprefix("row ")
    names = [name for name, value in fields.row.items() if isinstance(value, dict)]
    solutions = [fields.inner(name) for name in names]
    replies = [one.text("solution", empty=True) for one in solutions]
    right = [one.choice("is_correct", {True: True, False: False}) for one in solutions]
    places = range(len(right))
    pairs = [(i, j) for i in places for j in places if right[i] and not right[j]]
    return fields.text("question", empty=True), number, replies, right, pairs


def _flags(fields: Fields, count: int) -> list[bool]:
    value = fields.get("scores", "give a list of true and false")
    if (
        not isinstance(value, list)
        or len(value) != count
        or any(not isinstance(x, bool) for x in value)
    ):
        raise fields.wrong(
            "scores",
            f"{str(value)[:60]} for {count} responses",
            f"give a list of {count} of true and false",
        )
    return value


def _pairs(fields: Fields, right: Sequence[bool]) -> list[tuple[int, int]]:
    value: Any = fields.get("sampled_conflict_pairs", "give pairs of places, from 0")
    fine = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
        for pair in value
    )
    if not fine or any(not 0 <= i < len(right) for pair in value for i in pair):
        raise fields.wrong(
            "sampled_conflict_pairs", str(value)[:60], f"give pairs of integers 0..{len(right) - 1}"
        )
    for n, (i, j) in enumerate(value):
        if right[i] == right[j]:
            raise fields.wrong(
                f"sampled_conflict_pairs[{n}]", f"[{i}, {j}]: both are {right[i]}",
                "give pairs of one correct and one incorrect response",
            )  # fmt: skip
    return [(i, j) for i, j in value]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[FigureLike, ...]:
    """Pairs: mean accuracy of the data sets. Single: the best-of-K curve and the ROC-AUC."""
    sets = group_by(records, lambda record: record.domain)
    # GSM8K is reported, but is not one of the sets in PPE's mean.
    mean = {name: sets[name] for name in OFFICIAL if name in sets} or sets
    if rules.form == "single":
        return _single_figures(records, sets, mean)
    sections = [mean_figure("sections", name, members) for name, members in sets.items()]
    terms = tuple(Term(1.0, members) for members in mean.values())
    return (Figure("overall", "accuracy", terms), *sections)


def _single_figures(
    records: Sequence[Preference], sets: dict[str, np.ndarray], mean: dict[str, np.ndarray]
) -> tuple[FigureLike, ...]:
    # Only K that every row has, so that all points of the curve are over the same rows.
    count = min(map(len, group_by(records, item_of).values()))
    right = np.asarray([record.labels[0] == 1 for record in records])
    ks = [k for k in (1, 2, 4, 8, 16, 32) if k < count] + [count]

    def over_sets(group: str, name: str, measure: str) -> Figure:
        terms = tuple(Term(1.0, members, measure) for members in mean.values())
        return Figure(group, name, terms)

    aucs = [
        RocAuc("ROC-AUC", name, members[right[members]], members[~right[members]], "scaled")
        for name, members in sets.items()
    ]
    return (
        over_sets("overall", "best of K, end", "end"),
        Combined(
            "overall",
            "best of K, maximum",
            tuple(over_sets("", "", f"best of {k}") for k in range(1, count + 1)),
            "largest",
        ),
        over_sets("overall", "best of K, loss", "loss"),
        *(over_sets("best of K", f"K={k}", f"best of {k}") for k in ks),
        *(mean_figure("sections", name, members, "end") for name, members in sets.items()),
        *aucs,
    )


@functools.cache
def _drawn_among(n: int) -> np.ndarray:
    """[m, K - 1]: P(K of n drawn without replacement all lie among m given ones), K = 1..n."""
    m, steps = np.arange(n + 1)[:, None], np.arange(n)
    return np.cumprod(np.maximum(m - steps, 0) / (n - steps), axis=1)


def best_of(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(the top of a random subset of K is right), and P(the subset has a right one), K = 1..n.

    Args:
        scores: [n]; NaN counts as below all others. right: [n] bools.
    """
    n = len(scores)
    among = _drawn_among(n)
    _, level = np.unique(np.where(np.isnan(scores), -np.inf, scores), return_inverse=True)
    sizes = np.bincount(level)
    share = np.bincount(level, weights=right) / sizes  # right ones at a level
    top_at = np.diff(among[np.cumsum(sizes)], axis=0, prepend=0.0)  # [levels, n]
    return share @ top_at, 1.0 - among[n - int(right.sum())]


def _curves(verdicts: Verdicts) -> dict[int, np.ndarray]:
    """Index of an item's first record -> its curves by `best_of`: [S, 2, n]."""
    if "curves" not in verdicts.shared:
        scores = np.concatenate(verdicts.votes.scores(), axis=1)  # [S, N]: one response a record
        right = np.asarray([record.labels[0] == 1 for record in verdicts.records])
        verdicts.shared["curves"] = {
            int(members[0]): np.stack([best_of(row[members], right[members]) for row in scores])
            for members in verdicts.items().values()
        }
    return verdicts.shared["curves"]


def _of_curve(value: str, k: int = 0) -> Measure:
    def measure(verdicts: Verdicts) -> np.ndarray:
        values = verdicts.empty()
        for index, curves in _curves(verdicts).items():
            top, has = curves[:, 0], curves[:, 1]  # [S, n]
            if value == "end":
                values[index] = top[:, -1]
            elif value == "loss":
                values[index] = (has - top).mean(axis=1)
            elif k <= top.shape[1]:
                values[index] = top[:, k - 1]
        return values

    return measure


def _scaled(verdicts: Verdicts) -> np.ndarray:
    """Scores scaled to 0..1 within each item; if all are equal, they are 0."""
    values = score(verdicts)
    for members in verdicts.items().values():
        part = values[members]
        finite = np.where(np.isfinite(part), part, np.nan)
        if np.isnan(finite).all():
            continue
        low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
        span = np.where(high > low, high - low, 1.0)
        values[members] = np.where(np.isfinite(part), (part - low) / span, part)
    return values


BENCHMARK = Benchmark(
    name="ppe-correctness",
    about="PPE Correctness: pairs (or single responses) of five verifiable data sets",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={
        "end": _of_curve("end"),
        "loss": _of_curve("loss"),
        "scaled": _scaled,
        **{f"best of {k}": _of_curve("K", k) for k in range(1, 129)},
    },
    authors=Rules(ties="half", unparsed="wrong", form="pairs"),
    paper=Rules(form="pairs"),
    forms=("pairs", "single"),
    rating=True,
    rankings=True,
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
