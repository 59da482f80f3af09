"""The expected score: a critique's score is drawn from a distribution, whose mean says more.

The same critiques vote twice: with the scores that were drawn, and with the mean of the
distribution from which each was drawn (`--expected` of `python -m grm_jax.judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import numpy as np
import paired
from claim import Claim, Found
from evidence import Judged
from roads import Road
from voting import STAGES


def runs(road: Road) -> None:
    road.pipeline()
    for stage in STAGES:
        road.verdicts(road.directory / stage)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    rows, tests, ties = [], {}, []
    credits: dict[str, dict[int, list[np.ndarray]]] = {}
    figures: dict[str, dict[int, paired.Estimate]] = {}
    for stage, label in STAGES.items():
        found = [both(road, road.directory / stage) for road in roads]
        for name, which in (("drawn", 0), ("expected", 1)):
            by_k = evidence.credits([scores[which] for scores in found], ks)
            credits[f"{label}, {name}"] = by_k
            figures[f"{label}, {name}"] = {k: paired.over_seeds(v) for k, v in by_k.items()}
            cells = [figure.cell() for figure in figures[f"{label}, {name}"].values()]
            rows.append([f"{label}, {name}", *cells])
        for k in (1, min(8, most), most):
            tests[f"{label}, k = {k}: expected against drawn"] = paired.difference(
                credits[f"{label}, expected"][k], credits[f"{label}, drawn"][k]
            )
        shares = [[_ties(judged) for judged in scores] for scores in found]
        ties.append(
            [label, *(paired.over_seeds([s[which] for s in shares]).cell() for which in (0, 1))]
        )
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval; both rows of a model count the same critiques.\n",
            paired.table(["model, scores", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
            paired.table(["critiques whose top score is shared", "drawn", "expected"], ties),
        ]
    )  # fmt: skip
    numbers = {
        "accuracy": paired.as_json(figures),
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers)


def both(road: Road, stage: Path) -> tuple[Judged, Judged]:
    """The records of a seed with drawn and with expected scores of a stage's model."""
    return evidence.read_verdicts(road.records(), road.verdicts(stage))


def _ties(judged: Judged) -> float:
    """The share of readable critiques whose top score is shared."""
    tied = sum(int(group.tied.sum()) for group in judged)
    return tied / sum(int(group.usable.sum()) for group in judged)


CLAIM = Claim(
    "expected",
    "Is the mean of a score's distribution a better score than the digit that was drawn?",
    runs,
    read,
    quick=True,
)
