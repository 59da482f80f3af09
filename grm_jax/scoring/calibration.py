"""Whether a judge knows when it is right: the share of its votes against its accuracy.

A record's confidence is the share of its sampled critiques that vote for the response that wins
(one of s that share the top counts 1/s); of a single response, the share that is on the winning
side of the threshold. In a calibrated judge the verdicts with confidence 0.8 are right in 80% of
the cases. The expected calibration error (Naeini et al., AAAI 2015) is the mean distance between
the two over bins of confidence, weighted by the number of records in them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from grm_jax.critique import vote
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.scoring import statistics
from grm_jax.scoring.statistics import Interval, mean_interval

BINS = 10


@dataclasses.dataclass(frozen=True)
class Bin:
    """The records with a confidence in low..high (without `low`, but for 0).

    confidence: their mean. accuracy: of their verdicts.
    """

    low: float
    high: float
    records: int
    confidence: float
    accuracy: Interval


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence and accuracy of one vote a record.

    Attributes:
      k: samples a record. records: those that have a verdict. bins: those that hold any record.
      error: the expected calibration error, in 0..1.
      overconfidence: mean confidence less accuracy.
    """

    k: int
    records: int
    bins: tuple[Bin, ...]
    error: float
    overconfidence: Interval


def calibration(
    records: Sequence[Preference],
    rows: Sequence[Critique],
    *,
    threshold: float,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    bins: int = BINS,
) -> Calibration | None:
    """From the sampled critiques of every record; None where no record has two that can be read.

    Records without a single best response have no right verdict and do not count.

    Args:
        threshold: a single response is called right above it.
        clusters: of the records; those of one are drawn together in intervals.
    """
    drawn: dict[str, list[Critique]] = collections.defaultdict(list)
    for row in rows:
        if not row.greedy:
            drawn[row.example_id].append(row)
    labels = clusters or [record.id for record in records]
    found, own = [], []
    for record, label in zip(records, labels, strict=True):
        scores = [row.scores for row in drawn[record.id] if row.scores is not None]
        if len(scores) > 1 and record.has_unique_best:
            found.append(_confidence(record, scores, threshold))
            own.append(label)
    if not found:
        return None
    confidence, right = np.asarray(found).T
    place = np.maximum(np.ceil(confidence * bins - 1e-9).astype(int) - 1, 0)
    kept = []
    for index in sorted(set(place.tolist())):
        inside = np.flatnonzero(place == index)
        accuracy = mean_interval(
            right[inside], clusters=[own[i] for i in inside], resamples=resamples, seed=seed
        )
        mean = float(confidence[inside].mean())
        kept.append(Bin(index / bins, (index + 1) / bins, len(inside), mean, accuracy))
    error = sum(one.records * abs(one.confidence - one.accuracy.value) for one in kept)
    return Calibration(
        max(map(len, drawn.values())),
        len(found),
        tuple(kept),
        error / len(found),
        mean_interval(confidence - right, clusters=own, resamples=resamples, seed=seed),
    )


def _confidence(
    record: Preference, scores: Sequence[tuple[float, ...]], threshold: float
) -> tuple[float, float]:
    """The share of critiques for the verdict, and how right the verdict is."""
    if len(record.responses) == 1:
        says = [0.5 if s[0] == threshold else float(s[0] > threshold) for s in scores]
        mean = vote(scores).mean[0]
        yes = float(np.mean(says))
        if mean == threshold:
            return 0.5, 0.5
        right = float((mean > threshold) == (record.labels[0] == 1))
        return (yes if mean > threshold else 1 - yes), right
    winners = vote(scores).best
    shares = [np.mean([_share(s, winner) for s in scores]) for winner in winners]
    return float(np.mean(shares)), (record.best in winners) / len(winners)


def _share(scores: tuple[float, ...], winner: int) -> float:
    top = [place for place, score in enumerate(scores) if score == max(scores)]
    return (winner in top) / len(top)
