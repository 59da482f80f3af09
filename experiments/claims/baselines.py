"""Other ways to judge with the same model (Table 2): pairs of responses, and a semi-scalar RM.

    pairwise      the RL model reads two responses at a time, all pairs of a record in turn; the
                  winner of each critique gets a point (LLM-as-a-judge with a majority)
    semi-scalar   a Bradley-Terry head reads a response and the RL model's critique of it alone
                  (CLoud, arXiv:2408.11791); the scores after several critiques are averaged

beside votes of the RL model and the scalar RM. The critiques are what `python -m grm_jax.judge`
writes of rows that are made here; the head is trained by `scalar_rm.py`, from SFT's weights as the
scalar RM is, on responses that end with their critique. The critiques of training are of records
that RL has seen; those of the held-out records are not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road

from grm_jax.data.preferences import Preference, read_preferences
from grm_jax.errors import UserError
from grm_jax.files import written_whole
from grm_jax.scoring.measures import top
from grm_jax.training.setup import SYNTHETIC

STAGE = "rl"
FEW = 8  # critiques of a response that the semi-scalar RM reads


def runs(road: Road) -> None:
    road.pipeline()
    road.judge_rows(STAGE, "pairs", lambda: _pairs(road.records()), road.settings.k)
    road.judge_rows(STAGE, "single", lambda: _single(road.records()), _few(road))
    road.judge_rows(STAGE, "single-train", lambda: _single(_training(road)), 1)
    _semi_scalar(road)


def _few(road: Road) -> int:
    return min(FEW, road.settings.k)


def _semi_scalar(road: Road) -> Path:
    """The run of the head that reads a response and its critique."""
    file = road.settings.runs / f"{road.seed}-semi-scalar" / "critiqued.jsonl"
    if road.runs_commands and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial, partial.open("w", encoding="utf-8") as out:
            texts = _critiques(road, "single-train", 1)
            for record in _training(road):
                out.write(json.dumps(_row(_critiqued(record, texts, 0))) + "\n")
    options = ["--preferences", str(file)]
    if road.settings.embedded:  # other preferences than the world's need a tokenizer
        options += ["--tokenizer", str(road.directory / "sft" / "model")]
    return road.branch("semi-scalar", "scalar_rm", *options)


def _training(road: Road) -> list[Preference]:
    """The records with two responses or more that the scalar RM learns from."""
    config = json.loads((road.directory / "scalar_rm" / "config.json").read_text(encoding="utf-8"))
    file = config["setup"]["preferences"]
    if file == SYNTHETIC:
        file = road.directory / "world" / "train.jsonl"
    return [record for record in read_preferences(file) if len(record.responses) > 1]


def _row(record: Preference, name: str = "", chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """A record as a row; with `chosen`, of these responses alone, without labels, and with `name`
    at the end of its id."""
    shown = range(len(record.responses)) if chosen is None else chosen
    row: dict[str, Any] = {
        "id": record.id + name,
        "turns": list(record.turns),
        "responses": [record.responses[i] for i in shown],
    }
    row |= {"labels": list(record.labels)} if chosen is None else {}
    for field in ("reference", "principles"):
        if (value := getattr(record, field)) is not None:
            row[field] = value
    return row


def _pairs(records: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    """Every pair of each record's responses as a row of its own."""
    for record in records:
        for a, b in itertools.combinations(range(len(record.responses)), 2):
            yield _row(record, f"#{a}#{b}", (a, b))


def _single(records: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    """Every response as a row of its own."""
    for record in records:
        for i in range(len(record.responses)):
            yield _row(record, f"#{i}", (i,))


def _critiques(road: Road, name: str, k: int) -> dict[str, list[dict[str, Any]]]:
    """The k critiques of each row of `Road.judge_rows`, by the row's id."""
    file = road.rows_file(STAGE, name, k)
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    found = {row["id"]: row["verdict"]["critiques"] for row in rows}
    if few := [id for id, critiques in found.items() if len(critiques) != k]:
        raise UserError(f"{file}: {few[0]!r} has not {k} critiques; delete this file and its .done")
    return found


def _critiqued(
    record: Preference, critiques: dict[str, list[dict[str, Any]]], sample: int
) -> Preference:
    """The record with one critique at the end of each response, and its number in the id."""
    texts = [
        f"{response} {critiques[f'{record.id}#{i}'][sample]['critique']}"
        for i, response in enumerate(record.responses)
    ]
    return dataclasses.replace(record, id=f"{record.id}@{sample}", responses=tuple(texts))


def points(
    records: Sequence[Preference], critiques: dict[str, list[dict[str, Any]]], k: int
) -> dict[str, np.ndarray]:
    """By record id, [k, n]: the pairs that each response has won, critique by critique. A tie gives
    half a point to both, an unreadable critique none; NaN where none of the pairs is readable."""
    found = {}
    for record in records:
        n = len(record.responses)
        won, readable = np.zeros((k, n)), np.zeros(k, bool)
        for a, b in itertools.combinations(range(n), 2):
            for sample, critique in enumerate(critiques[f"{record.id}#{a}#{b}"][:k]):
                if critique["scores"]:
                    readable[sample] = True
                    first, second = critique["scores"]
                    won[sample, a] += float(first > second) + 0.5 * (first == second)
                    won[sample, b] += float(second > first) + 0.5 * (first == second)
        won[~readable] = np.nan
        found[record.id] = won
    return found


def _read_pairs(road: Road) -> Judged:
    records, k = road.records(), road.settings.k
    return evidence.grouped(records, points(records, _critiques(road, "pairs", k), k))


def _read_semi_scalar(road: Road) -> Judged:
    """The head's score after each of a few critiques, as if it were the scores of a critique."""
    records, samples = road.records(), range(_few(road))
    critiques = _critiques(road, "single", len(samples))
    critiqued = [_critiqued(record, critiques, sample) for record in records for sample in samples]
    read = evidence.scalar_scores(_semi_scalar(road), critiqued)
    return evidence.grouped(
        records,
        {r.id: np.asarray([read[f"{r.id}@{sample}"] for sample in samples]) for r in records},
    )


def _majority(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """Each critique gives one vote to its winner, in equal parts to tied ones."""
    leading = top(scores).astype(float)
    return (leading / np.maximum(leading.sum(axis=2, keepdims=True), 1)).sum(axis=1)


def read(roads: Sequence[Road]) -> Found:
    most, few = roads[0].settings.k, _few(roads[0])
    ks = tuple(dict.fromkeys((1, few, most)))
    judged = [voting.read_stage(road, STAGE) for road in roads]
    ways: dict[str, tuple[list[Judged], evidence.Method, tuple[int, ...]]] = {
        "votes: sums of scores (the paper)": (judged, evidence.plain, ks),
        "votes: majority of the critiques": (judged, _majority, ks),
        "pairwise, majority": ([_read_pairs(road) for road in roads], evidence.plain, ks),
        "semi-scalar RM": (
            [_read_semi_scalar(road) for road in roads],
            evidence.plain,
            tuple(k for k in ks if k <= few),
        ),
    }
    credits = {
        name: evidence.credits(found, counts, method)
        for name, (found, method, counts) in ways.items()
    }
    scalar = [evidence.scalar_accuracy(seed) for seed in judged]
    rows = [
        [name, *(paired.over_seeds(by_k[k]).cell() if k in by_k else "" for k in ks)]
        for name, by_k in credits.items()
    ]
    rows.append(["scalar RM", paired.over_seeds(scalar).cell(), *("" for _ in ks[1:])])
    paper, *others = credits
    tests = {
        f"{name}, {k}, against sums of scores": paired.difference(by_k, credits[paper][k])
        for name in others
        for k, by_k in credits[name].items()
    }
    semi = credits["semi-scalar RM"]
    for k in semi:
        tests[f"semi-scalar RM, {k}, against the scalar RM"] = paired.difference(semi[k], scalar)
    pairs = np.mean([math.comb(len(r.responses), 2) for road in roads for r in road.records()])
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval; k critiques of a record, of each of its pairs (pairwise: "
            f"{pairs:.1f} pairs a record), or of each response (semi-scalar).\n",
            paired.table(["judge", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
        ]
    )
    figures = {
        "accuracy": paired.as_json(
            {**paired.estimates(credits), "scalar RM": paired.over_seeds(scalar)}
        ),
        "differences": paired.as_json(tests),
    }
    return Found(text, figures)


CLAIM = Claim(
    "baselines",
    "Do pairs of responses, or a head that reads a critique, judge better than votes?",
    runs,
    read,
)
