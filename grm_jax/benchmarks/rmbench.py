"""RM-Bench (Liu et al., arXiv:2410.16184): small errors against three styles of writing.

Reads the authors' files, `total_dataset.json` or one a domain (`chat_filtered.json`, ...): `id,
prompt, chosen: [3], rejected: [3]`, each concise, detailed as plain text, and in markdown. Ids
repeat between files.

    M[i][j] = share of rows whose chosen response in style i wins against the rejected one in j
    hard = mean of i < j (the chosen one is plainer), normal = diagonal, easy = i > j

These are computed for each domain (the two safety files are one domain). A domain's figure is the
mean of the three, the headline is the mean of the domains. A tie loses. Without all four domains
there is no official headline.

    form "pairs"  nine questions a row      form "list"  its six responses in one question
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, Term
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, place_of, prompt_key
from grm_jax.scoring.measures import Measure, Verdicts, unparsed_credit
from grm_jax.scoring.rules import Form, Rules

DOMAINS = ("chat", "math", "code", "safety")
STYLES = ("concise", "plain", "markdown")
CELLS = tuple(itertools.product(range(3), range(3)))  # (style of the chosen, of the rejected)
_LEVEL = {cell: "hard" if cell[0] < cell[1] else "easy" for cell in CELLS}
_LEVEL |= {(i, i): "normal" for i in range(3)}
LEVELS = ("easy", "normal", "hard")
_GET = (
    "clone github.com/THU-KEG/RM-Bench and give its data folder (or download THU-KEG/RM-Bench from "
    "the Hugging Face hub)"
)
SOURCE = Source(
    _GET,
    folders=("rmbench", "rm-bench", "RM-Bench"),
    hub="THU-KEG/RM-Bench",
    patterns=("*.json", "*.jsonl", "*.parquet"),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All rows; `domain` is chat, math, code or safety."""
    records: list[Preference] = []
    skipped: list[str] = []
    paths = files(path, SOURCE)
    total = [file for file in paths if "total" in file.name.lower()]
    for file in total or paths:
        parse = functools.partial(_parse, stem=_stem(file), form=form)
        part = collect(rows_of([file]), parse, file, skip_bad_rows=skip_bad_rows)
        records += part
        skipped += part.skipped
    missing = [name for name in DOMAINS if all(r.domain != name for r in records)]
    note = f"no rows of {', '.join(missing)}: the mean is over the other domains, not the official"
    return BenchmarkRecords(records, skipped, [note] if missing else [])


def _stem(file: Path) -> str:
    return re.sub(r"[-_]?filtered$", "", file.name.split(".")[0].lower())


def _parse(fields: Fields, *, stem: str, form: Form) -> list[Item]:
    said = fields.text("domain") if "domain" in fields else stem
    domain = next((name for name in DOMAINS if said.lower().startswith(name)), None)
    if domain is None:
        raise DataError(
            "domain", f"{said!r}",
            f"name the file after one of {', '.join(DOMAINS)}, or give the field", fields.where,
        )  # fmt: skip
    item = f"{said}/{fields.key('id')}"
    turns = user(fields.text("prompt", empty=True))
    chosen, rejected = (fields.texts(n, 3, empty=True) for n in ("chosen", "rejected"))
    if form == "list":
        labels = (1.0,) * 3 + (0.0,) * 3
        return [Item(item, turns, (*chosen, *rejected), labels, domain=domain, source=fields.where)]
    return [
        Item(
            f"{item}/{i}{j}", turns, (chosen[i], rejected[j]), (1.0, 0.0), domain=domain,
            source=fields.where, item=item, place=f"{i}{j}",
        )
        for i, j in CELLS
    ]  # fmt: skip


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: mean of the domains; levels: easy, normal, hard; sections: domains; matrix: M."""
    members = group_by(records, lambda record: record.domain)
    domains = [name for name in DOMAINS if name in members]
    terms: dict[tuple[str, tuple[int, int]], Term] = {}
    for name in domains:
        for i, j in CELLS:
            place = f"{i}{j}"
            if rules.form == "list":
                here, measure = members[name], f"cell {place}"
            else:
                here = [m for m in members[name] if place_of(records[m]) == place]
                measure = "credit"
            if len(here):
                terms[name, (i, j)] = Term(1.0, np.asarray(here), measure)

    def mean(group: str, name: str, keep) -> Figure:
        """Each domain and level counts once, whatever its number of cells."""
        kept = {key: term for key, term in terms.items() if keep(*key)}
        sizes = {(d, _LEVEL[c]): 0 for d, c in kept}
        for d, c in kept:
            sizes[d, _LEVEL[c]] += 1
        return Figure(
            group,
            name,
            tuple(
                Term(1.0 / sizes[d, _LEVEL[c]], term.members, term.measure)
                for (d, c), term in kept.items()
            ),
        )

    shown = [mean("overall", "mean", lambda d, c: True)]
    shown += [mean("levels", level, lambda d, c, x=level: _LEVEL[c] == x) for level in LEVELS]
    for name in domains:
        shown.append(mean("sections", name, lambda d, c, x=name: d == x))
        for level in LEVELS:
            shown.append(
                mean(
                    "sections by level",
                    f"{name} {level}",
                    lambda d, c, x=name, y=level: d == x and _LEVEL[c] == y,
                )
            )
    for i, j in CELLS:
        title = f"{STYLES[i]} > {STYLES[j]}"
        shown.append(mean("matrix", title, lambda d, c, x=(i, j): c == x))
    return tuple(shown)


def _cell(i: int, j: int) -> Measure:
    """For lists of six: the credit of chosen style i against rejected style j."""

    def measure(verdicts: Verdicts) -> np.ndarray:
        values, rules = verdicts.empty(), verdicts.rules
        tied = {"wrong": 0.0, "excluded": np.nan}.get(rules.ties, 0.5)
        for members, scores, _ in verdicts.groups():
            good, bad = scores[..., i], scores[..., 3 + j]
            value = np.where(good == bad, tied, good > bad)
            values[members] = np.where(np.isnan(good), unparsed_credit(rules, 2), value)
        return values

    return measure


BENCHMARK = Benchmark(
    name="rm-bench",
    about="RM-Bench: 1,327 rows in three styles each; chat, math, code, safety",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={f"cell {i}{j}": _cell(i, j) for i, j in CELLS},
    authors=Rules(ties="wrong", unparsed="wrong", form="pairs"),
    paper=Rules(form="pairs"),
    forms=("pairs", "list"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
