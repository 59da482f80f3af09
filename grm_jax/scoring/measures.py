"""Verdicts -> one value a record: credit, score, what a pair of games or an item of pairs earns.

Dimensions: N records, S verdicts a record, n responses, R records with as many responses.

A measure may look at the other records of an item (`Item.item`): the two games of a pair, the
pairs of a list. Verdict s of one record then stands beside verdict s of the others.
"""

from __future__ import annotations

import dataclasses
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
            had no readable critique. Every record is in one group.
        count: S.
    """

    groups: tuple[tuple[np.ndarray, np.ndarray], ...]
    count: int

    @property
    def records(self) -> int:
        return sum(len(members) for members, _ in self.groups)

    def scores(self) -> list[np.ndarray]:
        """[S, n] of every record, in their order."""
        by_record: dict[int, np.ndarray] = {}
        for members, scores in self.groups:
            by_record |= zip(members.tolist(), scores, strict=True)
        return [by_record[index] for index in range(len(by_record))]

    def unjudged(self) -> np.ndarray:
        """Whether a verdict has no readable critique, [N, S]."""
        missing = np.empty((self.records, self.count), bool)
        for members, scores in self.groups:
            missing[members] = np.isnan(scores[..., 0])
        return missing

    def undecided(self, threshold: float) -> np.ndarray:
        """Whether the top is shared, or a single response is on the threshold, [N, S]."""
        tied = np.empty((self.records, self.count), bool)
        for members, scores in self.groups:
            if scores.shape[2] == 1:
                tied[members] = scores[..., 0] == threshold
            else:
                tied[members] = top(scores).sum(axis=2) > 1
        return tied


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a measure sees: the records, one method's votes on them, and the rules.

    shared: what several measures of these verdicts compute once.
    """

    records: Sequence[Preference]
    votes: Votes
    rules: Rules
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(members [R], scores [R, S, n], labels [R, n]) by number of responses."""
        for members, scores in self.votes.groups:
            labels = np.asarray([self.records[i].labels for i in members.tolist()])
            yield members, scores, labels

    def empty(self) -> np.ndarray:
        """[N, S] of NaN: no record counts."""
        return np.full((len(self.records), self.votes.count), np.nan)

    def items(self) -> dict[str, np.ndarray]:
        """The records of every item."""
        return group_by(self.records, item_of)


Measure = Callable[[Verdicts], np.ndarray]  # -> [N, S]


def top(scores: np.ndarray) -> np.ndarray:
    """Which responses share the largest score: [..., n] -> bool; none where there are no scores."""
    return scores == scores.max(axis=-1, keepdims=True)


def credit(verdicts: Verdicts) -> np.ndarray:
    """Expected accuracy under the rules, [N, S].

    Raises:
        DataError: several responses share the best label.
    """
    require_unique_best(verdicts.records)
    return credit_where(verdicts, lambda record: True)


def credit_where(verdicts: Verdicts, counts: Callable[[Preference], bool]) -> np.ndarray:
    """Credit of the records that count, [N, S]; NaN for others, whose labels may be shared."""
    rules, credits = verdicts.rules, verdicts.empty()
    for members, scores, labels in verdicts.groups():
        n = scores.shape[2]
        if n == 1:
            says = scores[..., 0] > rules.threshold
            hit = (says == (labels == 1)).astype(float)
            winners = np.where(scores[..., 0] == rules.threshold, 2, 1)
            hit = np.where(winners > 1, 1.0, hit)  # either answer shares the top
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
    """What a verdict without a readable critique earns; NaN: it does not count."""
    chance = 0.5 if n == 1 else 1.0 / n
    return {"wrong": 0.0, "half": 0.5, "chance": chance, "excluded": np.nan}[rules.unparsed]


def score(verdicts: Verdicts) -> np.ndarray:
    """The mean score of single responses, [N, S], for a ROC-AUC.

    An unreadable one counts as wrong: below every other if the label is 1, above if it is 0.
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
    """1: the best response alone has the top; -1: another; 0: it shares it; NaN: unreadable."""
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

    It stands at the item's first record; the others do not count.
    """

    def measure(verdicts: Verdicts) -> np.ndarray:
        each, by_item = of(verdicts), verdicts.empty()
        for members in verdicts.items().values():
            by_item[members[0]] = combine(each[members])
        return by_item

    return measure


all_right = item_measure(lambda credits: credits.prod(axis=0))
"""Credit for items of which every pair is right; ties are independent."""


def _net(outcomes: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(outcomes).sum(axis=0) > 0).astype(float)


def _both(outcomes: np.ndarray) -> np.ndarray:
    return (outcomes == 1).all(axis=0).astype(float)


net_vote = item_measure(_net, outcome)
"""JudgeBench: +1 for a right game, -1 for a wrong one, 0 for a tie or none; right if above 0."""

both_right = item_measure(_both, outcome)
"""Right in every game."""


def _agree(outcomes: np.ndarray) -> np.ndarray:
    return ((outcomes == outcomes[0]) & (outcomes != 0)).all(axis=0).astype(float)


agreement = item_measure(_agree, outcome)
"""The same response wins in every game. A tie is none, as LLMBar counts it: read as a winner, it
would be another one in each order."""
