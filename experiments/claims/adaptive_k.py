"""Adaptive k: critiques where they change the verdict, at the same number of critiques in all.

    fixed          every record gets k critiques
    within         a record stops when further ones would hardly change its verdict
                   (`critique.adaptive`), at the bound at which the mean is nearest to k, and not
                   above it
    across         every record gets four; each further one goes to the record whose leader is least
                   certain, until the mean is k

Replayed on the critiques that were drawn, in their order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road
from voting import STAGES

from grm_jax.critique.adaptive import AT_LEAST, variance_floor
from grm_jax.scoring.replay import decided_after

LOW, HIGH = 1.0, 10.0  # of a score


def runs(road: Road) -> None:
    road.pipeline()


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = [k for k in (6, 8, 12, 16) if AT_LEAST < k < most]
    rows, tests = [], {}
    figures: dict[str, paired.Estimate] = {}
    for stage, label in STAGES.items():
        found = [voting.read_stage(road, stage) for road in roads]
        all_of_them = [_credits(judged, [np.full(_count(j), most) for j in judged])
                       for judged in found]  # fmt: skip
        for k in ks:
            credits = {
                name: [_credits(judged, stops(judged, k)) for judged in found]
                for name, stops in RULES.items()
            }
            means = {name: paired.over_seeds(values) for name, values in credits.items()}
            rows.append([f"{label}, {k} on average", *(mean.cell() for mean in means.values())])
            figures |= {f"{label}, {k}, {name}": mean for name, mean in means.items()}
            for name in ("within", "across"):
                tests[f"{label}, {k}: {name} against fixed"] = paired.difference(
                    credits[name], credits["fixed"]
                )
            tests[f"{label}, {k}: across against all {most}"] = paired.difference(
                credits["across"], all_of_them
            )
        cell = paired.over_seeds(all_of_them).cell()
        rows.append([f"{label}, all {most}", cell, "", ""])
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval; in a row no rule draws more critiques in all than `fixed`.\n",
            paired.table(["critiques of a record", *RULES], rows),
            paired.tests_table(tests),
        ]
    )
    numbers = {
        "accuracy": paired.as_json(figures),
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers)


def _count(group: evidence.Group) -> int:
    return len(group.records)


def _credits(judged: Judged, stops: Sequence[np.ndarray]) -> np.ndarray:
    """The credit of each record's vote over its first `stops` critiques, group after group."""
    found = []
    for group, stop in zip(judged, stops, strict=True):
        used = np.arange(group.scores.shape[1]) < stop[:, None]
        totals = np.nansum(np.where(used[..., None], group.scores, 0.0), axis=1)
        some = (group.usable & used).any(axis=1)
        found.append(np.where(some, evidence.credit(totals, group.best), 0.0))
    return np.concatenate(found)


def fixed(judged: Judged, k: int) -> list[np.ndarray]:
    """k critiques of each record: [R] for each group."""
    return [np.full(_count(group), k) for group in judged]


def within(judged: Judged, k: int) -> list[np.ndarray]:
    """Each record until it is decided, at the smallest bound whose mean is not above k."""

    def stops(bound: float) -> list[np.ndarray]:
        return [decided_after(group.scores, bound, LOW, HIGH) for group in judged]

    low, high = 1e-9, 0.9
    best = stops(high)
    for _ in range(24):
        middle = math.sqrt(low * high)
        found = stops(middle)
        if np.concatenate(found).mean() > k:
            low = middle
        else:
            high, best = middle, found
    return best


def across(judged: Judged, k: int) -> list[np.ndarray]:
    """Four of each record, and each further critique to the record that is least certain."""
    certainty = [_certainty(group.scores) for group in judged]
    stops = [np.full(_count(group), AT_LEAST) for group in judged]
    heap = [
        (certainty[g][r, AT_LEAST - 1], g, r)
        for g, group in enumerate(judged)
        for r in range(_count(group))
    ]
    heapq.heapify(heap)
    left = (k - AT_LEAST) * len(heap)
    while left > 0 and heap:
        _, g, r = heapq.heappop(heap)
        stops[g][r] += 1
        left -= 1
        if stops[g][r] < certainty[g].shape[1]:
            heapq.heappush(heap, (certainty[g][r, stops[g][r] - 1], g, r))
    return stops


def _certainty(scores: np.ndarray) -> np.ndarray:
    """[R, K] after each number of critiques: the margin between the two leading sums in standard
    errors."""
    usable = ~np.isnan(scores[..., 0])
    filled = np.where(usable[..., None], scores, 0.0)
    totals, counts = np.cumsum(filled, axis=1), np.cumsum(usable, axis=1)
    found = np.zeros(usable.shape)
    for m in range(usable.shape[1]):
        ranked = np.argsort(-totals[:, m], axis=1)[:, :2]  # [R, 2]
        pair = np.take_along_axis(filled[:, : m + 1], ranked[:, None], axis=2)  # [R, m + 1, 2]
        margins = np.where(usable[:, : m + 1], pair[..., 0] - pair[..., 1], 0.0)
        used = np.maximum(counts[:, m], 1)
        mean = margins.sum(axis=1) / used
        square = (margins**2).sum(axis=1) / used - mean**2
        error = np.sqrt((np.maximum(square, 0.0) + variance_floor(HIGH - LOW)) / used)
        found[:, m] = mean / error
    return found


RULES = {"fixed": fixed, "within": within, "across": across}

CLAIM = Claim(
    "adaptive_k",
    "Do critiques help more where the verdict is uncertain, at the same number in all?",
    runs,
    read,
    quick=True,
)
