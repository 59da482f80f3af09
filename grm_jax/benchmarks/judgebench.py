"""JudgeBench (Tan et al., arXiv:2410.12784): objectively labelled pairs, judged in both orders.

Reads the authors' JSONL files (`dataset=judgebench,response_model=....jsonl`): `pair_id, source,
question, response_A, response_B, label: "A>B" | "B>A"`. The leaderboard uses the GPT-4o file.

Official metric: a game counts +1 if right, -1 if wrong, 0 for a tie or no verdict; a pair is right
if its two games add up to more than 0. Others report the pairs that are right in *both* games,
which is 8 to 18 points less; this is reported too. With one game a pair (order "random") the metric
is plain accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.measures import agreement, both_right, net_vote
from grm_jax.scoring.rules import Form, Rules

CATEGORIES = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
_LABELS = {"A>B": (1.0, 0.0), "B>A": (0.0, 1.0)}
SOURCE = Source(
    "clone github.com/ScalerLab/JudgeBench and give data/dataset=judgebench,response_model="
    "gpt-4o-2024-05-13.jsonl (or the folder, for both response models)",
    folders=("judgebench", "JudgeBench"),
    hub="ScalerLab/JudgeBench",
    patterns=("*.jsonl", "*.parquet"),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All pairs; `domain` is the category."""
    paths = files(path, SOURCE)
    records = collect(rows_of(paths), _parse, path, skip_bad_rows=skip_bad_rows)
    models = {re.sub(r".*response_model=", "", file.stem) for file in paths}
    note = f"pairs of several response models: {', '.join(sorted(models))}"
    return BenchmarkRecords(records, records.skipped, [note] if len(models) > 1 else [])


def _parse(fields: Fields) -> list[Item]:
    source = fields.text("source")
    domain = next((c for c, start in CATEGORIES.items() if source.startswith(start)), None)
    if domain is None:
        sources = ", ".join(CATEGORIES.values())
        raise fields.wrong("source", f"unknown: {source!r}", f"give one that starts with {sources}")
    return [
        Item(
            fields.key("pair_id"),
            user(fields.text("question", empty=True)),
            (fields.text("response_A", empty=True), fields.text("response_B", empty=True)),
            fields.choice("label", _LABELS),
            domain=domain,
            source=fields.where,
        )
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: accuracy; sections: categories; games (with both orders): agreement of the games."""
    games = rules.order == "both"
    name = "net vote" if games else "credit"
    members = group_by(records, lambda record: record.domain)
    everything = np.arange(len(records))
    shown = [mean_figure("overall", "accuracy", everything, name)]
    shown += [mean_figure("sections", c, members[c], name) for c in CATEGORIES if c in members]
    if games:
        shown += [
            mean_figure("games", "right in both", everything, "both right"),
            mean_figure("games", "each game", everything),
            mean_figure("games", "agreement", everything, "agreement"),
        ]
    return tuple(shown)


BENCHMARK = Benchmark(
    name="judgebench",
    about="JudgeBench: 350 (and 270) objectively labelled pairs, two orders",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={"net vote": net_vote, "both right": both_right, "agreement": agreement},
    authors=Rules(ties="wrong", unparsed="wrong", order="both"),
    fixed=("ties", "unparsed", "threshold"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
