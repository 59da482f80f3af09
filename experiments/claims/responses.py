"""One response, and eight: the first are rare in training, the second are never in it.

A single response is called acceptable or not; what the pipeline's evaluation says of them is shown.
Eight responses are more than a critique of this world can read. They are judged in groups: in every
round they are dealt anew into groups of four, or of two, each group gets critiques of its own, and
a response's scores in all critiques are added up (Eq. 14). Scores are pointwise, so that those of
different groups can be compared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import baselines
import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road

from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic import make_item

STAGE = "rl"
MANY = 8
SIZES = (4, 2)  # responses that a critique reads
ROUNDS = 8
RECORDS = 300
SINGLE = "n=1"  # as the evaluation calls it

Dealt = list[list[tuple[int, ...]]]


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # records of eight responses are made by the embedded world
    road.pipeline()
    for size in SIZES:
        road.judge_rows(STAGE, _name(size), lambda size=size: _rows(road, size), _each(road))


def _name(size: int) -> str:
    return f"eight-by-{size}"


def _each(road: Road) -> int:
    """The critiques of a group in a round."""
    return max(1, road.settings.k // ROUNDS)


def records(seed: int) -> list[Preference]:
    """Records of eight responses, of the training distribution but for their number."""
    rng = random.Random(f"{seed} eight")
    items = [make_item(rng, MANY) for _ in range(RECORDS)]
    return [
        Preference(
            id=f"eight-{index}",
            turns=({"role": "user", "content": item.query},),
            responses=tuple(item.response_texts),
            labels=tuple(item.labels),
        )
        for index, item in enumerate(items)
    ]


def deal(record: Preference, size: int) -> Dealt:
    """The groups of each round, in which every response is once. No group comes twice in the same
    order, since the judge would write the same critiques of it."""
    rng = random.Random(f"{record.id} in groups of {size}")
    rounds: Dealt = []
    seen: set[tuple[int, ...]] = set()
    while len(rounds) < ROUNDS:
        order = rng.sample(range(MANY), MANY)
        groups = [tuple(order[start : start + size]) for start in range(0, MANY, size)]
        if seen.isdisjoint(groups):
            seen.update(groups)
            rounds.append(groups)
    return rounds


def _rows(road: Road, size: int) -> Iterator[dict[str, Any]]:
    for record in records(road.seed):
        for turn, groups in enumerate(deal(record, size)):
            for place, chosen in enumerate(groups):
                yield baselines.row_of(record, f"#{turn}#{place}", chosen)


def together(
    record: Preference, size: int, critiques: dict[str, list[dict[str, Any]]], each: int
) -> np.ndarray:
    """[rounds * each, n] the scores of all responses, one row of them for one critique of every
    group of a round; NaN where one of these critiques is unreadable. Rounds come in turn."""
    scores = np.full((each, ROUNDS, MANY), np.nan)
    for turn, groups in enumerate(deal(record, size)):
        for place, chosen in enumerate(groups):
            for sample, critique in enumerate(critiques[f"{record.id}#{turn}#{place}"]):
                scores[sample, turn, list(chosen)] = critique["scores"] or np.nan
    scores[np.isnan(scores).any(axis=2)] = np.nan
    return scores.reshape(-1, MANY)


def _read_eight(road: Road, size: int) -> Judged:
    each, found = _each(road), records(road.seed)
    critiques = baselines.critiques_of(road, _name(size), each)
    scalar = evidence.scalar_scores(road.directory, found)
    scores = {record.id: together(record, size, critiques, each) for record in found}
    return evidence.grouped(found, scores, scalar=scalar)


def _single(road: Road) -> dict[str, float]:
    """Accuracy of single responses, by the name of the method."""
    file = road.directory / "evaluation" / "results.json"
    methods = json.loads(file.read_text(encoding="utf-8"))["methods"]
    return {m["name"]: m["figures"]["responses"][SINGLE]["value"] for m in methods}


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world, which makes records of eight responses.", {})
    most = ROUNDS * _each(roads[0])
    ks = tuple(dict.fromkeys((1, ROUNDS, most)))
    eight = {size: [_read_eight(road, size) for road in roads] for size in SIZES}
    credits = {
        f"8 responses in groups of {size}": evidence.credits(found, ks)
        for size, found in eight.items()
    }
    scalar = [evidence.scalar_accuracy(found) for found in eight[SIZES[0]]]
    usual = evidence.credits([voting.read_stage(road, STAGE) for road in roads], ks)
    names = ("sample@1", *(f"vote@{k}" for k in ks[1:]), "scalar")
    single = {name: paired.over_seeds([_single(road)[name] for road in roads]) for name in names}
    rows = [["1 response, acceptable or not", *(single[name].cell() for name in names)]]
    for name, by_k in {"2 to 4 responses": usual, **credits}.items():
        rows.append([name, *(paired.over_seeds(by_k[k]).cell() for k in ks)])
    seen = [evidence.scalar_accuracy(voting.read_stage(road, STAGE)) for road in roads]
    rows[1].append(paired.over_seeds(seen).cell())
    for row in rows[2:]:
        row.append(paired.over_seeds(scalar).cell())
    fours, twos = credits.values()
    tests = {f"groups of 4 against 2, {k}": paired.difference(fours[k], twos[k]) for k in ks}
    for name, by_k in credits.items():
        tests[f"{name}, {most}, against the scalar RM"] = paired.difference(by_k[most], scalar)
    text = "\n".join(
        [
            f"Accuracy in percent, mean of {len(roads)} seeds with a 95% t interval; the RL model, "
            "of whose critiques k read each response. Chance is 12.5 with 8 responses.\n",
            paired.table(["records", *(f"k = {k}" for k in ks), "scalar RM"], rows),
            paired.tests_table(tests),
        ]
    )
    figures = {
        "single": paired.as_json(single),
        "accuracy": paired.as_json(paired.estimates({"2 to 4 responses": usual, **credits})),
        "scalar, 8 responses": paired.over_seeds(scalar).as_json(),
        "differences": paired.as_json(tests),
    }
    return Found(text, figures)


CLAIM = Claim(
    "responses",
    "Does the judge hold on a single response, and on eight, which no critique in training read?",
    runs,
    read,
)
