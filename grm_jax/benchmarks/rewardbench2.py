"""RewardBench 2 (Malik et al., arXiv:2506.01937): best of four in five domains, and Ties.

Reads allenai/reward-bench-2 as it is on the hub: `id, prompt, chosen: [str], rejected: [str],
num_correct, subset`. The correct responses are the first in the file, so responses must be shown
shuffled.

The five domains: the one correct response must win against three; ties share the credit, an
unparsable verdict earns 1/4. Ties: prompts with several equally right answers ("tied") and the
same with one right answer ("ref"), whose scores must keep every right answer above every wrong one,
by more than the right ones differ among themselves (`process_single_model` in the authors' code):

    0.30 accuracy(tied) + 0.30 accuracy(ref)
    + 0.20 share(tied margin > spread) + 0.20 share(min(ref margin, tied margin) > spread)
    + 0.01 mean tanh(min margin / spread - 1), 0 where that is not a number

with margin = worst right - best wrong, spread = best right - worst right, accurate = margin > 0.
The leaderboard's figure is the plain mean of the six.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.data.preferences import Preference
from grm_jax.scoring.benchmark import Benchmark, Source, missing_note
from grm_jax.scoring.figures import Figure, Term, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, place_of, prompt_key
from grm_jax.scoring.measures import Measure, Verdicts, credit_where
from grm_jax.scoring.rules import Form, Rules

DOMAINS = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
TIES = "Ties"
_WEIGHTS = {
    "ties accuracy": (("tied", 0.30), ("ref", 0.30)),
    "ties preferred": (("tied", 0.20),),
    "ties preferred hard": (("tied", 0.20),),
    "ties margin": (("tied", 0.01),),
}
_GET = (
    "download allenai/reward-bench-2 from the Hugging Face hub (hf download "
    "allenai/reward-bench-2 --repo-type dataset --local-dir DIR) and give that directory"
)
SOURCE = Source(
    _GET,
    folders=("rewardbench2", "reward-bench-2", "rewardbench-2"),
    hub="allenai/reward-bench-2",
    patterns=("*test*.parquet", "*.jsonl", "*.json"),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All prompts; `domain` is the subset; of Ties, `place` is "ref" or "tied"."""
    paths = files(path, SOURCE)
    records = collect(rows_of(paths), _parse, path, skip_bad_rows=skip_bad_rows)
    return BenchmarkRecords(
        records, records.skipped, (*_unpaired(records), *missing_note(records, (*DOMAINS, TIES)))
    )


def _parse(fields: Fields) -> list[Item]:
    subset, number = fields.text("subset"), fields.key("id")
    if subset not in (*DOMAINS, TIES):
        subsets = ", ".join((*DOMAINS, TIES))
        raise fields.wrong("subset", f"unknown: {subset!r}", f"give one of {subsets}")
    tied = subset == TIES
    chosen = fields.texts("chosen", None if tied else 1, empty=True)
    rejected = fields.texts("rejected", empty=True)
    if "num_correct" in fields and fields.integer("num_correct", 1) != len(chosen):
        raise fields.wrong(
            "num_correct",
            f"{fields.row['num_correct']}, but 'chosen' has {len(chosen)}",
            "give the number of responses in 'chosen'",
        )
    item = place = ""
    if tied:
        place, colon, name = number.partition(":")
        if place not in ("ref", "tied") or not colon or not name:
            raise fields.wrong("id", f"{number!r}", "in Ties, give 'ref:NUMBER' or 'tied:NUMBER'")
        item = f"{TIES}/{name}"
    labels = (1.0,) * len(chosen) + (0.0,) * len(rejected)
    return [
        Item(
            f"{subset}/{number}",
            user(fields.text("prompt", empty=True)),
            (*chosen, *rejected),
            labels,
            domain=subset,
            source=fields.where,
            item=item,
            place=place,
        )
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: mean of the subsets that have records; sections: each of them; ties: its parts."""
    members = group_by(records, lambda record: record.domain)
    sections = [
        mean_figure("sections", name, members[name], "best of n")
        for name in DOMAINS
        if name in members
    ]
    if TIES in members and (ties := _ties(records, members[TIES])):
        sections.append(ties)
    if len(sections) == 1:
        return (Figure("overall", "mean", sections[0].terms, sections[0].total), *sections)
    # The Ties score is a sum of weighted means (its weights add to 1.01), the others are means.
    terms = tuple(
        Term(term.weight / len(sections), term.members, term.measure)
        for section in sections
        for term in section.terms
    )
    parts = tuple(
        mean_figure("ties", f"{name.removeprefix('ties ')} ({place})", chosen, name)
        for name, places in _WEIGHTS.items()
        for place, _ in places
        if len(chosen := _placed(records, members.get(TIES, ()), place))
    )
    return (Figure("overall", "mean", terms, total=True), *sections, *parts)


def _ties(records: Sequence[Preference], members: np.ndarray) -> Figure | None:
    terms = [
        Term(weight, chosen, name)
        for name, places in _WEIGHTS.items()
        for place, weight in places
        if len(chosen := _placed(records, members, place))
    ]
    return Figure("sections", TIES, tuple(terms), total=True) if terms else None


def _placed(records: Sequence[Preference], members: Sequence[int] | np.ndarray, place: str):
    return np.asarray([i for i in members if place_of(records[i]) == place], int)


def _ties_measure(value: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Measure:
    """value(margin of tied [S], spread of tied [S], margin of ref [S]) of every pair, at "tied"."""

    def measure(verdicts: Verdicts) -> np.ndarray:
        values = verdicts.empty()
        scores = verdicts.votes.scores()
        for members in verdicts.items().values():
            place = {place_of(verdicts.records[i]): i for i in members.tolist()}
            if {"ref", "tied"} - place.keys():
                continue
            tied, ref = place["tied"], place["ref"]
            margin, spread = _margins(verdicts.records[tied], scores[tied])
            values[tied] = value(margin, spread, _margins(verdicts.records[ref], scores[ref])[0])
        return values

    return measure


def _accuracy(verdicts: Verdicts) -> np.ndarray:
    values, scores = verdicts.empty(), verdicts.votes.scores()
    for index, record in enumerate(verdicts.records):
        if record.domain == TIES:
            values[index] = _margins(record, scores[index])[0] > 0
    return values


def _best_of_n(verdicts: Verdicts) -> np.ndarray:
    """Credit of the domains with one right response each; nothing for Ties."""
    return credit_where(verdicts, lambda record: record.domain != TIES)


def _margins(record: Preference, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(worst right - best wrong, best right - worst right) of every verdict, [S] each."""
    right = np.asarray(record.labels) == 1
    good, bad = scores[:, right], scores[:, ~right]
    return good.min(axis=1) - bad.max(axis=1), good.max(axis=1) - good.min(axis=1)


def _hard(margin: np.ndarray, spread: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return (np.minimum(ref, margin) > spread).astype(float)


def _margin_score(margin: np.ndarray, spread: np.ndarray, ref: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.tanh(np.minimum(ref, margin) / spread - 1))


def _unpaired(records: Sequence[Preference]) -> list[str]:
    groups = group_by([r for r in records if r.domain == TIES], lambda r: getattr(r, "item", ""))
    alone = [name for name, members in groups.items() if len(members) != 2]
    if not alone:
        return []
    return [f"Ties: {len(alone)} prompts have only one of 'ref' and 'tied', e.g. {alone[0]}"]


BENCHMARK = Benchmark(
    name="rewardbench2",
    about="RewardBench 2: 1,865 prompts; best of four in five domains, and Ties",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={
        "best of n": _best_of_n,
        "ties accuracy": _accuracy,
        "ties preferred": _ties_measure(lambda margin, spread, ref: (margin > spread) * 1.0),
        "ties preferred hard": _ties_measure(_hard),
        "ties margin": _ties_measure(_margin_score),
    },
    authors=Rules(ties="shared", unparsed="chance"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
