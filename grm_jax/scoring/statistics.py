"""The uncertainty of benchmark figures, and ROC-AUC.

Dimensions: N records, M methods, B bootstrap resamples.

Intervals are percentile intervals of a bootstrap over records. Where prompts repeat, whole clusters
of records are drawn, since the records of one prompt are not independent. All methods are computed
on the same resamples, so their differences are paired.

With fewer than `LEAST` clusters there is neither an interval nor a p-value: in the extreme, all
resamples of a single prompt are equal and the interval would have width 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from grm_jax.errors import UserError
from grm_jax.scoring.figures import Resampled

RESAMPLES = 2000
LEVEL = 0.95
LEAST = 5  # the number of clusters below which no interval and no p-value is given
TOO_FEW = f"fewer than {LEAST} independent prompts"
_CHUNK = 2_000_000  # the number of drawn indices in memory at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its interval, as fractions (0.86, not 86).

    low, high: None if it is based on too few clusters (`LEAST`).
    """

    value: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference on the same records.

    low, high, p_value: None if it is based on too few clusters (`LEAST`).
    p_value: two-sided, by inverting the percentile interval; never below 1 / (resamples + 1).
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def bootstrap(
    functions: Sequence[Resampled],
    records: int,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Figures and their bootstrap distributions, all on the same resamples.

    Args:
        functions: F bound figures (`figures.Figure.bind`).
        records: N.
        clusters: N labels; records with the same label are drawn together. None: each its own.

    Returns:
        Figures [F] and resampled figures [F, B].

    Raises:
        ValueError: no records, another number of clusters, or resamples < 1.
    """
    if records < 1:
        raise ValueError("there are no records to draw from")
    if resamples < 1:
        raise UserError(f"resamples is {resamples}; give 1 or more, {RESAMPLES} is usual")
    once = np.ones((1, records))
    point = np.asarray([function(once)[0] for function in functions])
    drawn = np.empty((len(functions), resamples))
    start = 0
    for counts in _resample_counts(records, clusters, resamples, seed):
        part = slice(start, start := start + len(counts))
        for index, function in enumerate(functions):
            drawn[index, part] = function(counts)
    return point, drawn


def interval(value: float, drawn: np.ndarray, independent: int, level: float = LEVEL) -> Interval:
    """Percentile interval of a figure from its resampled values [B]; NaN ones are left out.

    independent: the number of clusters on which the figure is based.
    """
    if independent < LEAST:
        return Interval(float(value), None, None)
    tail = (1 - level) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def proportion_interval(value: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson interval of a proportion of n independent trials.

    A bootstrap fails at the extremes: 20 right answers of 20 always resample to 20 of 20, although
    a true accuracy of 84% is possible.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an interval needs one trial or more")
    from scipy.special import ndtri  # takes a while to load, and few commands need it

    z2 = float(ndtri((1 + level) / 2)) ** 2
    middle = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and 1 one end is exact; rounding must not push it past the value.
    low = 0.0 if value == 0 else max(0.0, middle - half)
    high = 1.0 if value == 1 else min(1.0, middle + half)
    return Interval(float(value), low, high)


def figure_interval(
    seen: np.ndarray,
    value: float,
    drawn: np.ndarray,
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Interval:
    """`interval`, or `proportion_interval` where all records of the figure have the same value.

    Args:
        seen: one or more values of each of the figure's records: [n, ...]; NaN does not count.
        drawn: the resampled figure, [B].
        clusters: the labels of the same n records.
    """
    counted: np.ndarray = np.any(~np.isnan(seen.reshape(len(seen), -1)), axis=1)
    n = int(np.count_nonzero(counted))
    if clusters is not None:
        n = len({label for label, here in zip(clusters, counted.tolist(), strict=True) if here})
    flat = seen[~np.isnan(seen)]
    if n >= LEAST and np.all(flat == flat[0]) and 0 <= flat[0] <= 1:
        return proportion_interval(value, n, level)
    return interval(value, drawn, n, level)


def difference(
    value: float, drawn: np.ndarray, independent: int, level: float = LEVEL
) -> Difference:
    """A paired difference from its resampled values [B] (of both methods on the same resamples).

    independent: the number of clusters on which it is based.
    """
    drawn = drawn[~np.isnan(drawn)]
    bounds = interval(value, drawn, independent, level)
    if bounds.bounds is None:
        return Difference(float(value), None, None, None)
    # Adding 1 to both counts: a finite number of resamples cannot show that p = 0.
    side = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)) + 1
    p = min(1.0, 2 * side / (len(drawn) + 1))
    return Difference(bounds.value, bounds.low, bounds.high, p)


def _mean(values: np.ndarray) -> Resampled:
    if not np.isfinite(values).all():
        raise ValueError("values hold a NaN or an infinity; give a finite number a record")
    return lambda counts: counts @ values / counts.sum(axis=1)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The mean of N values with its interval; see `bootstrap` and `figure_interval`."""
    array = np.asarray(values, np.float64)
    point, drawn = bootstrap(
        [_mean(array)], len(array), clusters=clusters, resamples=resamples, seed=seed
    )
    return figure_interval(array, float(point[0]), drawn[0], clusters=clusters, level=level)


def paired_difference(
    a: Resampled | Sequence[float] | np.ndarray,
    b: Resampled | Sequence[float] | np.ndarray,
    *,
    records: int | None = None,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Difference:
    """The figure of a minus that of b on the same N records, with interval and p-value.

    Args:
        a, b: bound figures (give `records`, their N), or N values each, whose means are compared.

    Raises:
        ValueError: a and b of different lengths, or what `bootstrap` raises.
    """
    if callable(a) and callable(b):
        if records is None:
            raise ValueError("give the number of records of the bound figures")
        both = [a, b]
    elif callable(a) or callable(b):
        raise ValueError("give two bound figures, or two lists of values")
    else:
        if len(a) != len(b):
            raise ValueError(
                f"{len(a)} and {len(b)} values; a paired difference needs the same records"
            )
        records = len(a)
        both = [_mean(np.asarray(one, np.float64)) for one in (a, b)]
    point, drawn = bootstrap(both, records, clusters=clusters, resamples=resamples, seed=seed)
    independent = records if clusters is None else len(set(clusters))
    return difference(float(point[0] - point[1]), drawn[0] - drawn[1], independent, level)


def roc_auc(scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive scores higher; a tie is half.

    Args:
        scores: [N], finite. labels: [N], 1 (or True) for positive, 0 for negative.

    Returns:
        In 0..1; NaN if there is no positive or no negative, where it is not defined.

    Raises:
        ValueError: different lengths, a score that is not finite, a label other than 0 and 1.
    """
    scores, positive = _check_binary(scores, labels)
    return _auc(scores, positive)


def mean_auc_within(
    scores: Sequence[float] | np.ndarray,
    labels: Sequence[float] | np.ndarray,
    items: Sequence[Hashable],
) -> float:
    """The mean ROC-AUC of the items that have both labels; each item counts once.

    It measures whether right and wrong critiques of the same item are told apart; differences
    between easy and hard items have no influence. NaN if no item has both labels.

    Raises:
        ValueError: as `roc_auc`.
    """
    scores, positive = _check_binary(scores, labels)
    if len(items) != len(scores):
        raise ValueError(f"{len(items)} items for {len(scores)} scores; give one a score")
    places: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(item, []).append(index)
    aucs = [_auc(scores[rows], positive[rows]) for rows in places.values()]
    defined = [auc for auc in aucs if not math.isnan(auc)]
    return float(np.mean(defined)) if defined else math.nan


def _check_binary(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(
            f"scores have shape {scores.shape}, labels {labels.shape}; give one label a score"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold a NaN or an infinity; leave failed samples out")
    if not np.isin(labels, (0.0, 1.0)).all():
        raise ValueError("labels hold something else than 0 and 1")
    return scores, labels == 1


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return math.nan
    from scipy.stats import rankdata  # takes a while to load, and few commands need it

    # Mann-Whitney U: mean ranks give a tied pair one half.
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def _resample_counts(
    records: int, clusters: Sequence[Hashable] | None, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Counts [b, N] of each record in b resamples, until there were `resamples` of them."""
    member = np.arange(records)
    if clusters is not None:
        if len(clusters) != records:
            raise ValueError(f"{len(clusters)} clusters for {records} records; give one a record")
        number: dict[Hashable, int] = {}
        member = np.asarray([number.setdefault(label, len(number)) for label in clusters])
    groups = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // max(groups, records))
    for start in range(0, resamples, size):
        b = min(size, resamples - start)
        drawn = rng.integers(0, groups, (b, groups)) + groups * np.arange(b)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=b * groups).reshape(b, groups)
        yield counts[:, member].astype(np.float64)
