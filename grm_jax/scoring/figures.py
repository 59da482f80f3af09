"""Figures: numbers computed from the values of records, also on bootstrap resamples.

Dimensions: N records, S verdicts a record (votes over different samples), B bootstrap resamples.

    measures.Measure: verdicts -> values [N, S]      (NaN: the record does not count)
    Figure, RocAuc, ...: values -> a function of counts [B, N] -> figures [B]

A figure is bound to one method's values once, and then computed for all resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

Values = Mapping[str, np.ndarray]  # measure -> [N, S]
Resampled = Callable[[np.ndarray], np.ndarray]  # counts [B, N] -> [B]


class FigureLike(Protocol):
    """What all kinds of figures have in common."""

    @property
    def group(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def members(self) -> np.ndarray:
        """Indices of the records from which it is computed."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the measures from which it is computed."""
        ...

    def bind(self, values: Values) -> Resampled:
        """A function that computes the figure on resampled records: counts [B, N] -> [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Term:
    """A group of records, the measure that is averaged, and the weight of this mean in a figure."""

    weight: float
    members: np.ndarray  # [n] indices of records, n >= 1
    measure: str = "credit"


@dataclasses.dataclass(frozen=True)
class Figure:
    """sum of weight x mean over the term's records / sum of weight.

    Attributes:
        group: "overall", "sections", or a finer level. The first figure of "overall" is the
            headline.
        name: unique in its group.
        terms: never empty. A term is left out of a resample that draws none of its records.
        total: the figure is the weighted sum, not divided by the weights; it needs all its terms.
    """

    group: str
    name: str
    terms: tuple[Term, ...]
    total: bool = False

    @property
    def members(self) -> np.ndarray:
        return np.unique(np.concatenate([term.members for term in self.terms]))

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(term.measure for term in self.terms))

    def bind(self, values: Values) -> Resampled:
        """counts [B, N] -> [B]; NaN where no record of a resample counts."""
        parts = []
        for term in self.terms:
            selected = values[term.measure][term.members]  # [n, S]
            counted = ~np.isnan(selected)
            parts.append((np.where(counted, selected, 0.0).mean(axis=1), counted.mean(axis=1)))

        def resampled(counts: np.ndarray) -> np.ndarray:
            total, weights = np.zeros(len(counts)), np.zeros(len(counts))
            whole = np.ones(len(counts), bool)
            for term, (earned, counted) in zip(self.terms, parts, strict=True):
                drawn = counts[:, term.members]  # [B, n]
                size = drawn @ counted
                weight = np.where(size > 0, term.weight, 0.0)
                total += weight * (drawn @ earned) / np.where(size > 0, size, 1.0)
                weights += weight
                whole &= size > 0
            with np.errstate(invalid="ignore"):
                return np.where(whole, total, np.nan) if self.total else total / weights

        return resampled


@dataclasses.dataclass(frozen=True)
class RocAuc:
    """The share of (positive, negative) pairs in which the positive scores higher; a tie is half.

    positives, negatives: indices of records. The measure is a score: NaN is left out, -inf and inf
    are below and above all others.
    """

    group: str
    name: str
    positives: np.ndarray
    negatives: np.ndarray
    measure: str = "score"

    @property
    def members(self) -> np.ndarray:
        return np.concatenate([self.positives, self.negatives])

    @property
    def measures(self) -> tuple[str, ...]:
        return (self.measure,)

    def bind(self, values: Values) -> Resampled:
        """counts [B, N] -> [B]; NaN where a resample holds no positive or no negative.

        The negatives are sorted once; a resample then costs one cumulative sum.
        """
        scores = values[self.measure]
        ranked = []
        for s in range(scores.shape[1]):
            up = self.positives[~np.isnan(scores[self.positives, s])]
            down = self.negatives[~np.isnan(scores[self.negatives, s])]
            down = down[np.argsort(scores[down, s], kind="stable")]
            low, high = scores[up, s], scores[down, s]
            below = np.searchsorted(high, low, "left")  # [p] negatives below each positive
            ranked.append((up, down, below, np.searchsorted(high, low, "right")))

        def resampled(counts: np.ndarray) -> np.ndarray:
            won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
            for up, down, below, up_to in ranked:
                total = np.cumsum(counts[:, down], axis=1)
                total = np.concatenate([np.zeros((len(counts), 1)), total], axis=1)  # [B, q + 1]
                drawn = counts[:, up]
                won += (drawn * (total[:, below] + total[:, up_to])).sum(axis=1) / 2
                pairs += drawn.sum(axis=1) * total[:, -1]
            with np.errstate(invalid="ignore", divide="ignore"):
                return won / pairs

        return resampled


@dataclasses.dataclass(frozen=True)
class Macro:
    """Precision, recall or F1 of a classification, averaged over its classes.

    classes: name of a class -> indices of the records that truly belong to it. The measure "says
    NAME" is the share of verdicts for this class. A class without verdicts has precision 0, like
    scikit-learn's `zero_division=0`.
    """

    group: str
    name: str
    kind: str  # "precision", "recall", "f1"
    classes: Mapping[str, np.ndarray]

    @property
    def members(self) -> np.ndarray:
        return np.concatenate(list(self.classes.values()))

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(f"says {name}" for name in self.classes)

    def bind(self, values: Values) -> Resampled:
        said = {name: np.nan_to_num(values[f"says {name}"]).mean(axis=1) for name in self.classes}

        def resampled(counts: np.ndarray) -> np.ndarray:
            by_class = []
            for name, members in self.classes.items():
                hits = counts[:, members] @ said[name][members]
                claimed = counts[:, self.members] @ said[name][self.members]
                true = counts[:, members].sum(axis=1)
                precision = hits / np.where(claimed > 0, claimed, 1.0)
                recall = hits / np.where(true > 0, true, 1.0)
                both = precision + recall
                f1 = 2 * precision * recall / np.where(both > 0, both, 1.0)
                by_class.append({"precision": precision, "recall": recall, "f1": f1}[self.kind])
            return np.mean(by_class, axis=0)

        return resampled


@dataclasses.dataclass(frozen=True)
class Combined:
    """The mean or the largest of several figures, over those that are defined in a resample."""

    group: str
    name: str
    figures: tuple[FigureLike, ...]
    how: Literal["mean", "largest"]

    @property
    def members(self) -> np.ndarray:
        return np.unique(np.concatenate([figure.members for figure in self.figures]))

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for figure in self.figures for name in figure.measures))

    def bind(self, values: Values) -> Resampled:
        functions = [figure.bind(values) for figure in self.figures]
        combine = {"mean": np.ma.mean, "largest": np.ma.max}[self.how]

        def resampled(counts: np.ndarray) -> np.ndarray:
            results = np.ma.masked_invalid([function(counts) for function in functions])
            return np.ma.filled(combine(results, axis=0), np.nan)

        return resampled


def mean_figure(group: str, name: str, members: np.ndarray, measure: str = "credit") -> Figure:
    """The plain mean of a measure over a group of records."""
    return Figure(group, name, (Term(1.0, members, measure),))
