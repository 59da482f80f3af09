"""Tests paired by seed, and the tables that show them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student


@dataclasses.dataclass(frozen=True)
class Figure:
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


def over_seeds(per_seed: Sequence[np.ndarray | float]) -> Figure:
    """The mean over seeds of each seed's mean credit, times 100."""
    values = [100.0 * float(np.mean(each)) for each in per_seed]
    mean = statistics.mean(values)
    if len(values) < 2:
        return Figure(mean, math.nan, math.nan, math.nan, tuple(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    freedom = len(values) - 1
    half = float(student.ppf(0.975, freedom)) * error
    p = 2.0 * float(student.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Figure(mean, mean - half, mean + half, p, tuple(values))


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Figure:
    """a - b in points, paired by seed (and by record: both have the same ones)."""
    return over_seeds([float(np.mean(x) - np.mean(y)) for x, y in zip(a, b, strict=True)])


def tests_table(tests: Mapping[str, Figure]) -> str:
    """Paired differences in points, with interval and p-value."""
    return table(["paired difference, points", ""], [[n, f.signed()] for n, f in tests.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
