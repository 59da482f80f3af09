"""A task and a kind of defect that no training record has.

SFT, RFT, RL and a scalar RM learn from a world in which no query asks for one of the five tasks,
and no response violates one of the seven criteria. They judge fresh records of this world, records
of the task, and records in which a response has the defect. The teacher's errors remain: now and
then it calls the criterion violated that is always met.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import generalisation
import numpy as np
import paired
from claim import Claim, Found
from evidence import Judged
from roads import Road

from grm_jax.benchmarks import synthetic

TASK, DEFECT = "smaller", "ending"
KINDS = {"task": f"the unseen task, {TASK}", "defect": f"with the unseen defect, {DEFECT}"}


def runs(road: Road) -> None:
    if road.settings.embedded:
        _samples(road)


def _run(road: Road) -> Path:
    return road.other_world("unseen", "--world.unseen-task", TASK, "--world.unseen-defect", DEFECT)


def _samples(road: Road) -> Path:
    run = _run(road)
    return road.judged(run / "rl", world=run)


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world: it is known there what a record contains.", {})
    whole = {synthetic.FRESH: [_judged(road, shifted=False) for road in roads]}
    shifted = [_judged(road, shifted=True) for road in roads]
    for kind in KINDS:
        whole[kind] = [evidence.of_domain(judged, kind) for judged in shifted]
    methods = generalisation.judges(roads[0].settings.k)
    found = {
        kind: {name: [method(judged) for judged in seeds] for name, method in methods.items()}
        for kind, seeds in whole.items()
    }
    labels = {synthetic.FRESH: "fresh"} | KINDS
    figures = {
        labels[kind]: {name: paired.over_seeds(values) for name, values in by_name.items()}
        for kind, by_name in found.items()
    }
    tests = {
        f"{labels[kind]}, against fresh records, {name}": paired.difference(
            found[kind][name], found[synthetic.FRESH][name]
        )
        for kind in KINDS
        for name in methods
    }
    rows = [
        [
            labels[kind], f"{np.mean([evidence.chance(judged) for judged in seeds]):.1f}",
            *(figures[labels[kind]][name].cell() for name in methods),
        ]
        for kind, seeds in whole.items()
    ]  # fmt: skip
    text = "\n".join(
        [
            f"Accuracy in percent: the mean of {len(roads)} seeds with a 95% t interval. Votes are "
            "of the RL model. Chance guesses among the responses.\n",
            paired.table(["held-out records", "chance", *methods], rows),
            "By seed, but of other records:\n",
            paired.tests_table(tests),
        ]
    )
    numbers = {"accuracy": paired.as_json(figures), "differences": paired.as_json(tests)}
    return Found(text, numbers)


def _judged(road: Road, *, shifted: bool) -> Judged:
    run = _run(road)
    records = road.records(shifted=shifted, world=run)
    scalar = evidence.scalar_scores(run, records)
    return evidence.read_samples(records, _samples(road), scalar, road.settings.k)


CLAIM = Claim(
    "unseen",
    "Does the judge hold on a task, and on a kind of defect, that no training record has?",
    runs,
    read,
)
