"""Tests paired by seed, and the tables that show them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds in percent, with its 95% t interval: another training and other records.

    Attributes:
      low, high: the interval; NaN for a single seed, which has none.
      p: two-sided p-value of a mean of zero, which says something of differences only; NaN for a
        single seed.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: tuple[float, ...]

    def cell(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def signed(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}], p = {self.p:.2g}"

    def as_json(self) -> dict[str, Any]:
        """JSON has no NaN: the interval of a single seed is null."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high, "p": self.p}
        return {name: None if math.isnan(v) else round(v, 4) for name, v in numbers.items()} | {
            "seeds": [round(value, 2) for value in self.seeds]
        }


def over_seeds(per_seed: Sequence[np.ndarray | float]) -> Estimate:
    """The mean over seeds of each seed's mean credit, times 100."""
    values = [100.0 * float(np.mean(each)) for each in per_seed]
    mean = statistics.mean(values)
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, tuple(values))
    if len(set(values)) == 1:  # no spread, of which SciPy makes nothing
        return Estimate(mean, mean, mean, float(mean == 0), tuple(values))
    test: Any = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Estimate(mean, float(low), float(high), float(test.pvalue), tuple(values))


def estimates(
    by_name: Mapping[str, Mapping[int, Sequence[np.ndarray | float]]],
) -> dict[str, dict[int, Estimate]]:
    """`over_seeds` of each name's values at each k."""
    return {name: {k: over_seeds(v) for k, v in by_k.items()} for name, by_k in by_name.items()}


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Estimate:
    """a - b in points, paired by seed (and by record: both have the same ones)."""
    return over_seeds([float(np.mean(x) - np.mean(y)) for x, y in zip(a, b, strict=True)])


def smooth(values: Sequence[float] | np.ndarray, width: int = 10) -> np.ndarray:
    """The means of `width` values in a row."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def as_json(estimates: Mapping[Any, Any]) -> dict[str, Any]:
    """Estimates by name, or by several names one inside the other, as JSON."""
    return {
        str(name): value.as_json() if isinstance(value, Estimate) else as_json(value)
        for name, value in estimates.items()
    }


def tests_table(tests: Mapping[str, Estimate]) -> str:
    """Paired differences in points, with interval and p-value."""
    return table(["paired difference, points", ""], [[n, f.signed()] for n, f in tests.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
