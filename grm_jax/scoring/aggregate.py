"""From the critiques of a judge to the verdicts of each method, and the rates of failures.

    greedy      the greedy sample
    sample@1    every single sample is a verdict
    vote@k      Eq. (14): k samples vote
    meta@k      guided votes: of k samples, the k // 2 that the meta RM ranks highest vote;
                meta@k/m: the m that it ranks highest
    hybrid@k    the mean scores of k samples plus `scalar_weight` times the scores of a scalar RM,
                both centred over the responses; a single response is judged by the vote alone
    adaptive@k  samples vote in turn until further ones, up to k, would hardly change the verdict
    scalar      the scalar RM alone: one verdict a record

Votes are over subsets of the samples drawn (`subsets`): disjoint blocks of k, then blocks of
reshuffled samples, so that vote@8 of 32 samples is a mean over sixteen votes or more. Samples are
only exchanged with others that saw the same order of the responses, so that a vote of k keeps the
balance of orders that k samples drawn alone have.

A failed sample, one without scores, is left out of its vote and counted. A vote without any sample
that has scores is counted as unjudged; what it earns is a rule of the benchmark
(`rules.UnparsedRule`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from grm_jax.critique.adaptive import BOUND
from grm_jax.critique.parse import commonest_boxes
from grm_jax.critique.template_set import Scales
from grm_jax.critique.voting import SCALAR_WEIGHT
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.items import by_responses
from grm_jax.scoring.measures import Verdicts, Votes, credit
from grm_jax.scoring.replay import decided_after
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.scalar_scores import add_scalar, scalar_votes

Kind = Literal["greedy", "sample", "vote", "meta", "hybrid", "adaptive", "scalar"]
_Grouped = dict[str, list[Critique]]  # rows by record id
_VOTES = 16  # verdicts a record, where the samples allow it


@dataclasses.dataclass(frozen=True)
class Method:
    """The verdicts of one method.

    Attributes:
        name: "greedy", "sample@1", "vote@8", "meta@8", "meta@8/2", "hybrid@8", "adaptive@8",
            "scalar".
        k: the number of samples in a verdict; for adaptive votes the maximum.
        votes: the verdicts.
        samples: the mean number of samples that a verdict took.
        threshold: what scores of single responses are compared with; None: the rules' threshold;
            NaN: nothing, so that single responses do not count.
    """

    name: str
    kind: Kind
    k: int
    votes: Votes
    samples: float
    threshold: float | None = None

    def verdicts(self, records: Sequence[Preference], rules: Rules) -> Verdicts:
        """What measures are computed from: the votes, and the rules with its own threshold."""
        if self.threshold is not None:
            rules = dataclasses.replace(rules, threshold=self.threshold)
        return Verdicts(records, self.votes, rules)

    def credits(self, records: Sequence[Preference], rules: Rules = Rules()) -> dict[str, float]:
        """Record id -> mean credit over its verdicts that count; NaN if none counts."""
        values = credit(self.verdicts(records, rules))
        counted = (~np.isnan(values)).sum(axis=1)
        mean = np.nansum(values, axis=1) / np.where(counted > 0, counted, np.nan)
        return dict(zip((record.id for record in records), mean.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Rates:
    """The failures among single samples.

    Attributes:
        samples: the number of samples.
        failed: the share without scores.
        failures: the same share by kind of failure.
        boxes: by kind of failure, the most frequent last box of such critiques and its count.
        truncated: the share stopped by the length limit, with or without scores.
        tokens: the mean number of generated tokens.
    """

    samples: int
    failed: float
    failures: Mapping[str, float]
    truncated: float
    tokens: float
    boxes: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """All methods that the samples allow, in the order of the table above.

    Attributes:
        rates: the failures of "greedy" and of "sampled" critiques, if there are any critiques.
        unjudged: ids of the records without a single parsable critique.
    """

    methods: tuple[Method, ...]
    rates: Mapping[str, Rates]
    unjudged: tuple[str, ...]

    def method(self, name: str) -> Method:
        """The method of that name. Raises KeyError with the names that exist."""
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method {name!r}; there are {', '.join(m.name for m in self.methods)}")


def default_ks(samples: int) -> tuple[int, ...]:
    """2, 4, 8, ... and the number of samples itself; empty for a single sample."""
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return (*ks, samples) if samples > 1 else ()


def reported(aggregated: Aggregate) -> Method:
    """The method to report on: the largest vote, else the adaptive one, else greedy."""
    rank = {"vote": 3, "adaptive": 2, "greedy": 1}
    return max(aggregated.methods, key=lambda m: (rank.get(m.kind, 0), m.k))


def is_uneven(rows: Sequence[Critique]) -> bool:
    """Whether records have different numbers of samples, as adaptive sampling leaves them."""
    counts = collections.Counter(row.example_id for row in rows if not row.greedy)
    return len(set(counts.values())) > 1


def subsets(samples: int, k: int, n: int) -> np.ndarray:
    """The samples that vote together: [S, k], ascending in each vote. S does not depend on n.

    The first votes are the disjoint blocks (0..k-1), (k..2k-1), ...; a remainder smaller than k is
    not used. The others are blocks after shuffling samples i among those with the same i mod n,
    which saw the n responses in the same order (`critique.orders`).
    """
    blocks = samples // k
    rounds = 1 if k in (1, samples) else math.ceil(_VOTES / blocks)
    rng = np.random.default_rng([samples, k, n])
    chosen = []
    for turn in range(rounds):
        places = np.arange(samples)
        if turn:
            for shift in range(n):
                places[shift::n] = rng.permutation(places[shift::n])
        chosen.append(places[: blocks * k].reshape(blocks, k))
    return np.sort(np.concatenate(chosen), axis=1)


def aggregate(
    records: Sequence[Preference],
    rows: Sequence[Critique],
    *,
    ks: Sequence[int] | None = None,
    k_meta: Sequence[int] = (),
    bound: float = BOUND,
    scales: Scales = Scales(),
    threshold: float | None = None,
    uneven: bool = False,
    scalar: Mapping[str, Sequence[float]] | None = None,
    scalar_weight: float = SCALAR_WEIGHT,
    scalar_threshold: float | None = None,
) -> Aggregate:
    """The verdicts of every method on every record.

    Args:
        records: what was judged.
        rows: for each record a greedy critique, or samples 0..k-1 (the same k for all records), or
            both. Critiques of other records are refused.
        ks: sizes of the votes; default: `default_ks`.
        k_meta: the numbers of samples that guided votes keep, besides half of k.
        bound: for adaptive votes: the accepted probability of another verdict.
        scales: the ranges of scores, which bound what further samples could change.
        threshold: for adaptive votes on single responses; default: the middle of their range.
        uneven: records have as many samples as it took to decide them. The only vote, "adaptive@k",
            is over all samples of a record; "sample@1" uses the samples that every record has.
        scalar: record id -> a scalar RM's score of each response. Those of other records are not
            read.
        scalar_weight: of these scores in "hybrid@k".
        scalar_threshold: what the row "scalar" compares the score of a single response with; None:
            single responses do not count in it.

    Raises:
        DataError: no records, a repeated id, a record without critiques, gaps in the samples, meta
            scores for only a part of the samples, another number of scores than responses, a record
            without scalar scores, or with other than one finite number a response.
        ValueError: a `ks` or `k_meta` that the samples do not allow.
    """
    greedy, sampled = _group(records, rows, uneven=uneven)
    count = max(map(len, sampled.values())) if sampled else 0
    chosen = tuple(dict.fromkeys(default_ks(count) if ks is None else ks))
    for k in chosen:
        if not 1 <= k <= count:
            raise ValueError(f"vote@{k} needs {k} samples a record, there are {count}")
    for m in k_meta:
        if m < 1:
            raise ValueError(f"k_meta is {m}; a guided vote keeps 1 sample or more")
    beside = None if scalar is None else scalar_votes(records, scalar)
    methods: list[Method] = []
    if greedy:
        methods.append(Method("greedy", "greedy", 1, Tables(records, greedy).singles(1), 1.0))
    if uneven and sampled:
        table, least = Tables(records, sampled), min(map(len, sampled.values()))
        mean = float(np.mean([len(found) for found in sampled.values()]))
        methods.append(Method("sample@1", "sample", 1, table.singles(least), 1.0))
        methods.append(Method(f"adaptive@{count}", "adaptive", count, table.vote(None), mean))
    elif sampled:
        methods += _sampled(
            Tables(records, sampled), count, chosen, k_meta, bound, scales, threshold,
            beside, scalar_weight,
        )  # fmt: skip
    if beside is not None:
        compared = math.nan if scalar_threshold is None else scalar_threshold
        methods.append(Method("scalar", "scalar", 1, beside, 0.0, threshold=compared))
    rates = {
        name: _rates([row for part in grouped.values() for row in part])
        for name, grouped in (("greedy", greedy), ("sampled", sampled))
        if grouped
    }
    unjudged = tuple(
        record.id
        for record in records
        if all(
            row.scores is None for row in (*greedy.get(record.id, ()), *sampled.get(record.id, ()))
        )
    )
    return Aggregate(tuple(methods), rates, unjudged)


def _sampled(
    table: Tables,
    count: int,
    ks: Sequence[int],
    k_meta: Sequence[int],
    bound: float,
    scales: Scales,
    threshold: float | None,
    scalar: Votes | None,
    scalar_weight: float,
) -> list[Method]:
    methods = [Method("sample@1", "sample", 1, table.singles(count), 1.0)]
    votes = {k: table.vote(k) for k in ks}
    methods += [Method(f"vote@{k}", "vote", k, vote, k) for k, vote in votes.items()]
    if table.guided:
        for k in ks:
            kept = {f"meta@{k}": max(1, k // 2)}
            kept |= {f"meta@{k}/{m}": m for m in k_meta if m <= k}
            for name, m in kept.items():
                methods.append(Method(name, "meta", k, table.guided_vote(k, m), k))
    if scalar is not None:
        for k, vote in votes.items():
            added = add_scalar(vote, scalar, scalar_weight)
            methods.append(Method(f"hybrid@{k}", "hybrid", k, added, k))
    if count > 4:
        decided, mean = table.adaptive(bound, scales, threshold)
        methods.append(Method(f"adaptive@{count}", "adaptive", count, decided, mean))
    return methods


class Tables:
    """The scores of all samples as arrays, by number of responses.

    Dimensions: R records with n responses, K samples, S votes.
    """

    def __init__(self, records: Sequence[Preference], grouped: _Grouped):
        self.guided = _has_meta(grouped)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        count = max(map(len, grouped.values()))
        for n, members in by_responses(records):
            scores = np.full((len(members), count, n), np.nan)
            meta = np.full((len(members), count), -np.inf)
            for r, index in enumerate(members.tolist()):
                for place, row in enumerate(grouped[records[index].id]):
                    if row.scores is not None:
                        scores[r, place] = row.scores
                        meta[r, place] = 0.0 if row.meta is None else row.meta
            self._parts.append((members, scores, meta))

    def singles(self, count: int) -> Votes:
        """Each of the first `count` samples is a verdict."""
        return Votes(tuple((members, s[:, :count]) for members, s, _ in self._parts), count)

    def vote(self, k: int | None) -> Votes:
        """Votes of k samples; None: one vote of all samples."""
        votes, count = [], 1
        for members, scores, _ in self._parts:
            samples = scores.shape[1]
            plan = np.arange(samples)[None] if k is None else subsets(samples, k, scores.shape[2])
            chosen = np.zeros((len(plan), samples))
            np.put_along_axis(chosen, plan, 1.0, axis=1)
            usable = ~np.isnan(scores[..., 0])
            totals = chosen @ np.nan_to_num(scores)  # [R, S, n]
            votes.append((members, _mean(totals, usable @ chosen.T)))
            count = len(plan)
        return Votes(tuple(votes), count)

    def guided_vote(self, k: int, keep: int) -> Votes:
        """Votes of the `keep` samples of k that the meta RM ranks highest.

        Of samples with equal meta scores, earlier ones are kept.
        """
        votes, count = [], 1
        for members, scores, meta in self._parts:
            plan = subsets(scores.shape[1], k, scores.shape[2])
            means = np.empty((len(members), len(plan), scores.shape[2]))
            for s, block in enumerate(plan):
                ranked = np.argsort(-meta[:, block], axis=1, kind="stable")[:, :keep]
                kept = np.take_along_axis(scores[:, block], ranked[..., None], axis=1)
                used = (~np.isnan(kept[..., 0])).sum(axis=1)
                means[:, s] = _mean(np.nan_to_num(kept).sum(axis=1), used)
            votes.append((members, means))
            count = len(plan)
        return Votes(tuple(votes), count)

    def adaptive(
        self, bound: float, scales: Scales, threshold: float | None = None
    ) -> tuple[Votes, float]:
        """Votes of each record's samples until it is decided, and their mean number."""
        votes, taken = [], []
        for members, scores, _ in self._parts:
            low, high = scales.single if scores.shape[2] == 1 else scales.many
            stop = decided_after(scores, bound, low, high, threshold)  # [R]
            used = np.arange(scores.shape[1]) < stop[:, None]
            usable = used & ~np.isnan(scores[..., 0])
            totals = np.where(usable[..., None], np.nan_to_num(scores), 0.0).sum(axis=1)
            votes.append((members, _mean(totals, usable.sum(axis=1))[:, None]))
            taken.append(stop)
        return Votes(tuple(votes), 1), float(np.concatenate(taken).mean())


def _mean(totals: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Totals [..., n] divided by the number `used` [...] of samples; NaN where it is 0.

    Totals are rounded to nine digits, so that the order of float additions does not break ties.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.round(totals, 9) / np.where(used > 0, used, np.nan)[..., None]


def _group(
    records: Sequence[Preference], rows: Sequence[Critique], *, uneven: bool
) -> tuple[_Grouped, _Grouped]:
    """Greedy and sampled critiques (ascending) by record. Each is empty or has all records."""
    by_id = {record.id: record for record in records}
    if not records or len(by_id) != len(records):
        what = "no records" if not records else "records with the same id"
        raise DataError("id", what, "give each record once, with an id of its own")
    greedy: _Grouped = {}
    sampled: _Grouped = {}
    for row in rows:
        record = by_id.get(row.example_id)
        if record is None:
            raise DataError(
                "example_id",
                f"{row.example_id!r} is none of the {len(by_id)} records",
                "give samples of the same data (and --limit and --seed)",
            )
        if len(row.order) != len(record.responses):
            raise DataError(
                "order",
                f"sample {row.sample} of {row.example_id!r} saw {len(row.order)} responses, the "
                f"record has {len(record.responses)}",
                "give samples of the same data",
            )
        (greedy if row.greedy else sampled).setdefault(row.example_id, []).append(row)
    if not rows:
        raise DataError("", "no samples", "judge the records first")
    for what, grouped in (("greedy sample", greedy), ("sample", sampled)):
        missing = [id for id in by_id if id not in grouped]
        if grouped and missing:
            raise DataError(
                "example_id",
                f"{len(missing)} of {len(by_id)} records have no {what}, the first is "
                f"{missing[0]!r}",
                "judge all records, or give only those that were judged",
            )
    for id, samples in greedy.items():
        if len(samples) > 1:
            raise DataError("sample", f"{len(samples)} greedy ones of {id!r}", "keep one of them")
    wanted = list(range(max((len(samples) for samples in sampled.values()), default=0)))
    for id, samples in sampled.items():
        samples.sort(key=lambda row: row.sample)
        indices = [row.sample for row in samples]
        if len(set(indices)) < len(indices) if uneven else indices != wanted:
            raise DataError(
                "sample",
                f"{id!r} has {_ranges(indices)}, others have {_ranges(wanted)}",
                "draw the same samples of every record, each once",
            )
    return greedy, sampled


def _has_meta(sampled: _Grouped) -> bool:
    usable = [row for rows in sampled.values() for row in rows if row.scores is not None]
    without = [row for row in usable if row.meta is None]
    if without and len(without) < len(usable):
        row = without[0]
        raise DataError(
            "meta",
            f"{len(without)} of {len(usable)} usable samples have no meta score, the first is "
            f"sample {row.sample} of {row.example_id!r}",
            "score every usable sample, or none",
        )
    return bool(usable) and not without


def _rates(rows: Sequence[Critique]) -> Rates:
    kinds = collections.Counter(row.failure for row in rows if row.failure is not None)
    total = len(rows)
    return Rates(
        samples=total,
        failed=kinds.total() / total,
        failures={kind: count / total for kind, count in sorted(kinds.items())},
        boxes=commonest_boxes((row.failure, row.text) for row in rows),
        truncated=sum(row.truncated for row in rows) / total,
        tokens=sum(row.tokens for row in rows) / total,
    )


def _ranges(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{len(indices)} samples ({shown}{', ...' if len(indices) > 8 else ''})"
