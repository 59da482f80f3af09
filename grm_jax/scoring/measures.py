"""Measures: from verdicts to values by record, such as credits, scores and results of games.

Dimensions: N records, S verdicts a record, n responses, R records with as many responses.

A measure may use the other records of an item (`Item.item`), such as the two games of a pair or
the pairs of a list: verdict s of one record then goes with verdict s of the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from grm_jax.data.preferences import Preference, require_unique_best
from grm_jax.scoring.items import group_by, item_of
from grm_jax.scoring.rules import Rules


@dataclasses.dataclass(frozen=True)
class Votes:
    """Mean scores of every verdict of one method.

    Attributes:
        groups: (members [R], scores [R, S, n]) of the records with n responses; NaN where a verdict
            had no parsable critique. Every record is in exactly one group.
        count: S.
    """

    groups: tuple[tuple[np.ndarray, np.ndarray], ...]
    count: int

    @property
    def records(self) -> int:
        return sum(len(members) for members, _ in self.groups)

    def scores(self) -> list[np.ndarray]:
        """The scores [S, n] of every record, in the order of the records."""
        by_record: dict[int, np.ndarray] = {}
        for members, scores in self.groups:
            by_record |= zip(members.tolist(), scores, strict=True)
        return [by_record[index] for index in range(len(by_record))]

    def unjudged(self) -> np.ndarray:
        """Whether a verdict has no parsable critique: [N, S]."""
        missing = np.empty((self.records, self.count), bool)
        for members, scores in self.groups:
            missing[members] = np.isnan(scores[..., 0])
        return missing

    def undecided(self, threshold: float) -> np.ndarray:
        """Whether responses share the top score, or a single one is on the threshold: [N, S]."""
        tied = np.empty((self.records, self.count), bool)
        for members, scores in self.groups:
            if scores.shape[2] == 1:
                tied[members] = scores[..., 0] == threshold
            else:
                tied[members] = top(scores).sum(axis=2) > 1
        return tied


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a measure is computed from: the records, one method's votes on them, and the rules.

    shared: intermediate results that several measures of these verdicts use.
    """

    records: Sequence[Preference]
    votes: Votes
    rules: Rules
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(members [R], scores [R, S, n], labels [R, n]) for each number n of responses."""
        for members, scores in self.votes.groups:
            labels = np.asarray([self.records[i].labels for i in members.tolist()])
            yield members, scores, labels

    def empty(self) -> np.ndarray:
        """An array [N, S] of NaN, in which no record counts yet."""
        return np.full((len(self.records), self.votes.count), np.nan)

    def items(self) -> dict[str, np.ndarray]:
        """Item -> indices of its records."""
        return group_by(self.records, item_of)


Measure = Callable[[Verdicts], np.ndarray]  # -> [N, S]


def top(scores: np.ndarray) -> np.ndarray:
    """Which responses have the largest score: [..., n] -> bool; none where scores are NaN."""
    return scores == scores.max(axis=-1, keepdims=True)


def credit(verdicts: Verdicts) -> np.ndarray:
    """Expected accuracy under the rules, [N, S].

    Raises:
        DataError: several responses share the best label.
    """
    require_unique_best(verdicts.records)
    return credit_where(verdicts, lambda record: True)


def credit_where(verdicts: Verdicts, counts: Callable[[Preference], bool]) -> np.ndarray:
    """Credit [N, S] of the records that count; NaN for the others, which may have tied labels.

    With a threshold of NaN single responses do not count.
    """
    rules, credits = verdicts.rules, verdicts.empty()
    for members, scores, labels in verdicts.groups():
        n = scores.shape[2]
        if n == 1:
            says = scores[..., 0] > rules.threshold
            hit = (says == (labels == 1)).astype(float)
            winners = np.where(scores[..., 0] == rules.threshold, 2, 1)
            hit = np.where(winners > 1, 1.0, hit)  # either answer shares the top
            if math.isnan(rules.threshold):
                hit = np.full_like(hit, np.nan)  # there is nothing to compare with
        else:
            best = labels == labels.max(axis=1, keepdims=True)
            leading = top(scores)
            hit = (leading & best[:, None]).any(axis=2).astype(float)
            winners = leading.sum(axis=2)
        tied = {
            "wrong": 0.0 * hit,
            "half": 0.5 * hit,
            "shared": hit / np.maximum(winners, 1),
            "random": hit / np.maximum(winners, 1),
            "excluded": np.full_like(hit, np.nan),
        }[rules.ties]
        value = np.where(winners > 1, tied, hit)
        value = np.where(np.isnan(scores[..., 0]), unparsed_credit(rules, n), value)
        here = np.asarray([counts(verdicts.records[i]) for i in members.tolist()])
        credits[members] = np.where(here[:, None], value, np.nan)
    return credits


def unparsed_credit(rules: Rules, n: int) -> float:
    """What a verdict without a parsable critique earns; NaN if it does not count."""
    chance = 0.5 if n == 1 else 1.0 / n
    return {"wrong": 0.0, "half": 0.5, "chance": chance, "excluded": np.nan}[rules.unparsed]


def score(verdicts: Verdicts) -> np.ndarray:
    """The mean score of single responses, [N, S], for a ROC-AUC.

    An unjudged response counts as wrong: below all others if its label is 1, above if it is 0.
    """
    ratings = verdicts.empty()
    for members, scores, labels in verdicts.groups():
        if scores.shape[2] == 1:
            failed = np.where(labels == 1, -np.inf, np.inf)
            if verdicts.rules.unparsed == "excluded":
                failed = np.full_like(failed, np.nan)
            ratings[members] = np.where(np.isnan(scores[..., 0]), failed, scores[..., 0])
    return ratings


def outcome(verdicts: Verdicts) -> np.ndarray:
    """1: the best response alone has the top score; 0: it shares it; -1: another response has it;
    NaN: unjudged."""
    outcomes = verdicts.empty()
    for members, scores, labels in verdicts.groups():
        best = labels == labels.max(axis=1, keepdims=True)
        leading = top(scores)
        hit = (leading & best[:, None]).any(axis=2)
        value = np.where(hit, np.where(leading.sum(axis=2) > 1, 0.0, 1.0), -1.0)
        outcomes[members] = np.where(np.isnan(scores[..., 0]), np.nan, value)
    return outcomes


def item_measure(combine: Callable[[np.ndarray], np.ndarray], of: Measure = credit) -> Measure:
    """A measure of whole items: `combine` ([r, S] of an item's records -> [S]).

    The value is given to the item's first record; the others do not count.
    """

    def measure(verdicts: Verdicts) -> np.ndarray:
        each, by_item = of(verdicts), verdicts.empty()
        for members in verdicts.items().values():
            by_item[members[0]] = combine(each[members])
        return by_item

    return measure


all_right = item_measure(lambda credits: credits.prod(axis=0))
"""Credit of items: every pair must be right. Ties of different pairs are independent."""


def _net(outcomes: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(outcomes).sum(axis=0) > 0).astype(float)


def _both(outcomes: np.ndarray) -> np.ndarray:
    return (outcomes == 1).all(axis=0).astype(float)


net_vote = item_measure(_net, outcome)
"""JudgeBench: a right game counts +1, a wrong one -1, a tie or an unjudged one 0; the item is right
if the sum is above 0."""

both_right = item_measure(_both, outcome)
"""The item is right if every game is."""


def _agree(outcomes: np.ndarray) -> np.ndarray:
    return ((outcomes == outcomes[0]) & (outcomes != 0)).all(axis=0).astype(float)


agreement = item_measure(_agree, outcome)
"""Whether the same response wins in every game. As in LLMBar, a tie is not an agreement."""
