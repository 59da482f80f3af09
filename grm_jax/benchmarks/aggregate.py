"""Samples of a judge -> the expected credit of each record, by method; rates of what went wrong.

    greedy      the greedy sample
    sample@1    the mean credit of all single samples: what one sample earns on average
    vote@k      Eq. (14): k samples vote; the mean over disjoint blocks of k sample indices
                (0..k-1, k..2k-1, ...; a rest smaller than k is not used)
    meta@k      the same blocks, guided: the k_meta samples that the meta RM ranks highest vote

    adaptive    all samples of a record, which has as many as it took to decide it

Example: 32 samples, k = 8: four votes a record, the record's credit is their mean. With k = 32
there is one vote. Blocks share no sample, so they estimate what a fresh vote of k would earn.

A failed sample is left out of its vote and counted. A vote without any usable sample earns 0 and is
counted as unjudged: what failed is neither a number nor a coin toss.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from grm_jax.benchmarks.samples import GREEDY, SampleRow, read_samples, write_samples
from grm_jax.critique.voting import Verdict, credit, single_credit, vote
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError

__all__ = [
    "GREEDY",
    "Aggregate",
    "Method",
    "Rates",
    "SampleRow",
    "TieRule",
    "aggregate",
    "default_ks",
    "read_samples",
    "write_samples",
]

TieRule = Literal["expected", "wrong"]
Kind = Literal["greedy", "sample", "vote", "meta", "adaptive"]
_Grouped = dict[str, list[SampleRow]]  # rows by record id


@dataclasses.dataclass(frozen=True)
class Method:
    """What one way of judging earns on each record.

    Attributes:
        name: "greedy", "sample@1", "vote@8", "meta@8".
        k: samples a verdict; of adaptive votes, the most.
        credits: record id -> expected credit in 0..1, for every record.
        votes: number of verdicts, over all records.
        ties: share of the verdicts that are undecided: the top shared by several responses, or a
            single response exactly on the threshold.
        unjudged: share of the verdicts without any usable sample; their credit is 0.
    """

    name: str
    kind: Kind
    k: int
    credits: Mapping[str, float]
    votes: int
    ties: float
    unjudged: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """What went wrong among single samples; shares of `samples`.

    Attributes:
        samples: their number. failed: share without scores. failures: the same, by kind.
        truncated: share stopped by the length limit, with or without scores.
        tokens: mean number of generated tokens.
    """

    samples: int
    failed: float
    failures: Mapping[str, float]
    truncated: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """All methods that the samples allow, in the order of the table above.

    Attributes:
        rates: by "greedy" and "sampled", of those that are there.
        unjudged: ids of the records without a single usable sample.
    """

    methods: tuple[Method, ...]
    rates: Mapping[str, Rates]
    unjudged: tuple[str, ...]

    def method(self, name: str) -> Method:
        """The method of that name; KeyError names those that there are."""
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method {name!r}; there are {', '.join(m.name for m in self.methods)}")


def default_ks(samples: int) -> tuple[int, ...]:
    """2, 4, 8, ... up to the number of samples, which is itself always among them (if above 1)."""
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return (*ks, samples) if samples > 1 else ()


def aggregate(
    records: Sequence[Preference],
    rows: Sequence[SampleRow],
    *,
    ks: Sequence[int] | None = None,
    k_meta: int | None = None,
    ties: TieRule = "expected",
    threshold: float = 0.5,
    adaptive: bool = False,
) -> Aggregate:
    """Every method's credit of every record.

    Args:
        records: with a unique best label each; a single response has label 1 or 0.
        rows: for each record a greedy row, or samples 0..k-1 (the same k for all), or both. Rows of
            other records are refused.
        ks: sizes of the votes; default `default_ks`. Those of meta@k are the same ones.
        k_meta: samples that a guided vote keeps; default max(1, k // 2) for each k. Votes with
            k < k_meta are left out.
        ties: "expected" gives a tie its expectation when it is broken by a shuffle, 1 / (number
            tied) if the best response is among them, as the paper evaluates; "wrong" gives it 0,
            as the paper's training rule does (strict accuracy).
        threshold: for single responses: a mean score above it says correct. 0.5 fits the 0/1 scores
            of the `single` template; a scalar model's logit wants 0.

        adaptive: records have as many samples as it took to decide them; the one vote, "adaptive",
            is over all of a record's.

    Raises:
        DataError: no records, an id twice, a record without rows, gaps in the samples, meta scores
            for a part of the samples only, another number of scores than responses.
        ValueError: a `ks` that the samples do not allow, or an unknown tie rule.
    """
    if ties not in ("expected", "wrong"):
        raise ValueError(f"ties={ties!r}; it is 'expected' or 'wrong'")
    greedy, sampled = _group(records, rows, uneven=adaptive)
    count = max(map(len, sampled.values())) if sampled else 0
    usual = () if adaptive else default_ks(count)
    chosen = tuple(dict.fromkeys(usual if ks is None else ks))
    for k in chosen:
        if not 1 <= k <= count:
            raise ValueError(f"vote@{k} needs {k} samples a record, there are {count}")
    plans: list[tuple[str, Kind, int, _Grouped]] = []
    if greedy:
        plans.append(("greedy", "greedy", 1, greedy))
    if sampled:
        plans.append(("sample@1", "sample", 1, sampled))
        if adaptive:
            plans.append(("adaptive", "adaptive", count, sampled))
        for k in chosen:
            plans.append((f"vote@{k}", "vote", k, sampled))
        if _has_meta(sampled):
            for k in chosen:
                if k >= (k_meta or 1):
                    plans.append((f"meta@{k}", "meta", k, sampled))
    methods = tuple(
        _judge(records, name, kind, k, grouped, k_meta, ties, threshold)
        for name, kind, k, grouped in plans
    )
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
    return Aggregate(methods, rates, unjudged)


def _judge(
    records: Sequence[Preference],
    name: str,
    kind: Kind,
    k: int,
    grouped: _Grouped,
    k_meta: int | None,
    ties: TieRule,
    threshold: float,
) -> Method:
    credits: dict[str, float] = {}
    votes = tied = unjudged = 0
    for record in records:
        rows = grouped[record.id]
        earned = []
        size = len(rows) if kind == "adaptive" else k
        for start in range(0, len(rows) - size + 1, size):
            block = rows[start : start + size]
            scores = [row.scores for row in block]
            if kind == "meta":
                keep = max(1, k // 2) if k_meta is None else k_meta
                verdict = vote(scores, meta=[row.meta for row in block], k_meta=keep)
            else:
                verdict = vote(scores)
            undecided = verdict.tie or verdict.mean == (threshold,)
            tied += undecided
            unjudged += not verdict.used
            wrong = undecided and ties == "wrong"
            earned.append(0.0 if wrong else _credit(verdict, record, threshold))
        votes += len(earned)
        credits[record.id] = float(np.mean(earned))
    return Method(name, kind, k, credits, votes, tied / votes, unjudged / votes)


def _credit(verdict: Verdict, record: Preference, threshold: float) -> float:
    if len(record.labels) == 1:
        return single_credit(verdict, record.labels[0], threshold)
    return credit(verdict, record.labels)


def _group(
    records: Sequence[Preference], rows: Sequence[SampleRow], *, uneven: bool
) -> tuple[_Grouped, _Grouped]:
    """Greedy rows and sampled rows (ascending) by record; each empty, or whole."""
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
    for id, found in greedy.items():
        if len(found) > 1:
            raise DataError("sample", f"{len(found)} greedy ones of {id!r}", "keep one of them")
    wanted = list(range(max((len(found) for found in sampled.values()), default=0)))
    for id, found in sampled.items():
        found.sort(key=lambda row: row.sample)
        indices = [row.sample for row in found]
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


def _rates(rows: Sequence[SampleRow]) -> Rates:
    kinds = collections.Counter(row.failure for row in rows if row.failure is not None)
    total = len(rows)
    return Rates(
        samples=total,
        failed=kinds.total() / total,
        failures={kind: count / total for kind, count in sorted(kinds.items())},
        truncated=sum(row.truncated for row in rows) / total,
        tokens=sum(row.tokens for row in rows) / total,
    )


def _ranges(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{len(indices)} samples ({shown}{', ...' if len(indices) > 8 else ''})"
