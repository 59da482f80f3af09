"""Generalisation: records that training has not seen the like of, and more responses.

Of the RL model and of the scalar RM: fresh records of the training distribution beside those with
operand pairs, and with pairs of a task and a wish, that are in no training record; and fresh
records by their number of responses. Records with one response have no winner to choose and are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road


def runs(road: Road) -> None:
    road.pipeline()


def judges(most: int) -> dict[str, Callable[[Judged], np.ndarray]]:
    """What is compared on each kind of records: one critique, the most votes, the scalar RM."""
    return {
        "one critique": lambda judged: evidence.accuracy(judged, 1, evidence.plain),
        f"votes of {most}": lambda judged: evidence.accuracy(judged, most, evidence.plain),
        "scalar RM": evidence.scalar_accuracy,
    }


def read(roads: Sequence[Road]) -> Found:
    fresh = [voting.read_stage(road, "rl") for road in roads]
    kinds: dict[str, list[Judged]] = {"fresh": fresh}
    if all(road.records(shifted=True) for road in roads):
        unseen = [voting.read_stage(road, "rl", shifted=True) for road in roads]
        for domain in ("operands", "combinations"):
            kinds[f"unseen {domain}"] = [evidence.of_domain(judged, domain) for judged in unseen]
    sizes: dict[str, list[Judged]] = {}
    for n in sorted({group.responses for judged in fresh for group in judged}):
        sizes[f"{n} responses"] = [
            [group for group in judged if group.responses == n] for judged in fresh
        ]
    methods = judges(roads[0].settings.k)
    found = {
        name: {method: [read(judged) for judged in seeds] for method, read in methods.items()}
        for name, seeds in (kinds | sizes).items()
    }
    figures = {
        name: {method: paired.over_seeds(values) for method, values in by_method.items()}
        for name, by_method in found.items()
    }
    tests = {
        f"{name} against fresh records, {method}": paired.difference(
            found[name][method], found["fresh"][method]
        )
        for name in kinds
        if name != "fresh"
        for method in methods
    }
    rows = [
        [name, f"{np.mean([evidence.chance(judged) for judged in (kinds | sizes)[name]]):.1f}"]
        + [figures[name][method].cell() for method in methods]
        for name in found
    ]
    parts = [
        f"Accuracy in percent: the mean of {len(roads)} seeds with a 95% t interval. Votes are of "
        "the RL model. Chance guesses among the responses.\n",
        paired.table(["held-out records", "chance", *methods], rows),
    ]
    if tests:
        parts += ["By seed, but of other records:\n", paired.tests_table(tests)]
    numbers = {"accuracy": paired.as_json(figures), "differences": paired.as_json(tests)}
    return Found("\n".join(parts), numbers)


CLAIM = Claim(
    "generalisation",
    "Does the judge hold on records that training has not seen the like of, and on more responses?",
    runs,
    read,
)
