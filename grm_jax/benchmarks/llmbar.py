"""LLMBar (Zeng et al., arXiv:2310.07641): does a judge follow the instruction, or the surface?

Reads the repository's folders, `Natural/dataset.json` and `Adversarial/{Neighbor, GPTInst, GPTOut,
Manual}/dataset.json`: rows of `input, output_1, output_2, label: 1 | 2`, without ids.

Official metric: the mean accuracy over both orders (`correct_average`), and how often the two agree
(`equal`). For judges that rate, a tie and an unparsable rating earn one half.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark, Source, missing_note
from grm_jax.scoring.figures import Figure, Term, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.measures import agreement, both_right
from grm_jax.scoring.rules import Form, Rules

SUBSETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")
_LABELS = {1: (1.0, 0.0), 2: (0.0, 1.0)}
SOURCE = Source(
    "clone github.com/princeton-nlp/LLMBar and give its Dataset/LLMBar folder",
    folders=("LLMBar", "llmbar"),
    patterns=("*/dataset.json",),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All pairs of the five subsets; `domain` is the subset, the id its place in the file."""
    records: list[Preference] = []
    skipped: list[str] = []
    for file in files(path, SOURCE):
        subset = next((part for part in reversed(file.parts) if part in SUBSETS), None)
        if subset is None:
            if path.is_dir():
                continue  # the repository holds other data sets beside these five
            raise DataError(
                "", "its path names no subset", f"keep it in a folder {', '.join(SUBSETS)}",
                str(file),
            )  # fmt: skip
        parse = functools.partial(_parse, subset=subset)
        part = collect(rows_of([file]), parse, file, skip_bad_rows=skip_bad_rows)
        records += part
        skipped += part.skipped
    if not records:
        raise DataError("", f"none of {', '.join(SUBSETS)}", SOURCE.get, str(path))
    return BenchmarkRecords(records, skipped, missing_note(records, SUBSETS))


def _parse(fields: Fields, *, subset: str) -> list[Item]:
    row = fields.where.rpartition("row ")[2]
    return [
        Item(
            f"{subset}/{row}",
            user(fields.text("input", empty=True)),
            (fields.text("output_1", empty=True), fields.text("output_2", empty=True)),
            fields.choice("label", _LABELS),
            domain=subset,
            source=fields.where,
        )
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: mean of the subsets; sections: the subsets, and Adversarial, the mean of its four.

    games (with both orders): how often both games agree, and how often both are right.
    """
    members = group_by(records, lambda record: record.domain)
    subsets = [name for name in SUBSETS if name in members]
    hard = [name for name in subsets if name != "Natural"]

    def mean(group: str, name: str, names: Sequence[str]) -> Figure:
        return Figure(group, name, tuple(Term(1.0, members[n]) for n in names))

    shown = [mean("overall", "mean", subsets)]
    shown += [mean("sections", name, [name]) for name in subsets]
    if len(hard) > 1:
        shown.append(mean("sections", "Adversarial", hard))
    if rules.order == "both":
        for title, measure in (("agreement", "agreement"), ("right in both", "both right")):
            shown.append(mean_figure("games", title, np.arange(len(records)), measure))
            shown += [
                mean_figure("games", f"{title}, {name}", members[name], measure) for name in subsets
            ]
    return tuple(shown)


BENCHMARK = Benchmark(
    name="llmbar",
    about="LLMBar: 419 pairs, natural and adversarial, two orders",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={"agreement": agreement, "both right": both_right},
    authors=Rules(ties="half", unparsed="half", order="both"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
