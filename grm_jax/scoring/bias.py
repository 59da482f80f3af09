"""What influences a judge besides quality: position, length, identical responses, domains.

Each finding is a number with its interval and the number that an unbiased judge would have.

    position   first shown wins        share of verdicts won by the response shown first, minus 1/n
               flips, other order      two samples of a record with different orders disagree
               flips, same order       two samples with the same order disagree, from sampling alone
    length     best is longest         accuracy on these records
               best is not longest     accuracy on these; an unbiased judge has the same in both
    identical  tie                     two identical responses get the same score
               first shown wins        where they do not: how often the first wins, minus 1/2
    domains    spread                  the best section minus the worst
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.scoring.items import SWAPPED
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import Interval, mean_interval

PROBE = "#identical"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the bias table; figures are fractions of 1.

    unbiased: the value of a judge without this bias; None: to be compared with the row before.
    records: the number of records from which it is computed.
    """

    kind: str
    name: str
    value: Interval
    unbiased: float | None
    records: int


def bias_table(
    records: Sequence[Preference],
    rows: Sequence[Critique],
    credits: Mapping[str, float],
    sections: Mapping[str, Interval],
    rules: Rules,
    probes: Sequence[Critique] = (),
    *,
    clusters: Sequence[Hashable] | None = None,
    sees_order: bool = True,
) -> tuple[Finding, ...]:
    """All findings that the samples allow.

    Args:
        credits: record id -> credit by the method that is reported.
        sections: the figures of this method by section.
        probes: critiques of records with identical responses (`identical`).
        clusters: the cluster of each record; the records of one are drawn together.
        sees_order: whether the judge depends on the order in which responses are shown.
    """
    labels = clusters or [record.id for record in records]
    cluster = {record.id: label for record, label in zip(records, labels, strict=True)}
    findings = [
        *(_position(records, rows, cluster) if sees_order and rules.order != "fixed" else ()),
        *_length(records, credits, cluster),
        *_identical(probes),
    ]
    values = [figure.value for figure in sections.values()]
    if len(values) > 1:
        low = min(sections.values(), key=lambda figure: figure.value)
        high = max(sections.values(), key=lambda figure: figure.value)
        spread = Interval(high.value - low.value, None, None)
        if high.bounds is not None and low.bounds is not None:
            (a, b), (c, d) = low.bounds, high.bounds
            spread = Interval(spread.value, max(0.0, c - b), d - a)
        findings.append(
            Finding("domains", "spread: best less worst section", spread, 0.0, len(records))
        )
    return tuple(findings)


def identical(records: Sequence[Preference], count: int) -> list[Preference]:
    """Probe records: the best response, twice, of evenly spread records with several responses."""
    several = [record for record in records if len(record.responses) > 1]
    step = max(1, len(several) // max(count, 1))
    probes = []
    for record in several[::step][:count]:
        best = record.responses[record.labels.index(max(record.labels))]
        plain = Preference(
            f"{record.id}{PROBE}", record.turns, (best, best), (1.0, 0.0), source=record.source
        )
        probes.append(plain)
    return probes


def _winners(scores: Sequence[float]) -> frozenset[int]:
    top = max(scores)
    return frozenset(i for i, score in enumerate(scores) if score == top)


def _mean(values: Mapping[str, float], cluster: Mapping[str, Hashable]) -> Interval:
    """The mean of values by record id, with its interval."""
    return mean_interval(list(values.values()), clusters=[cluster[name] for name in values])


def _position(
    records: Sequence[Preference], rows: Sequence[Critique], cluster: Mapping[str, Hashable]
) -> list[Finding]:
    sizes = {record.id: len(record.responses) for record in records}
    # Record id -> (order shown, winners), as indices in the file; the games of a pair together.
    seen: dict[str, list[tuple[tuple[int, ...], frozenset[int]]]] = collections.defaultdict(list)
    first: dict[str, list[float]] = collections.defaultdict(list)
    for row in rows:
        if row.scores is None or sizes[row.example_id] < 2:
            continue
        name, order, winners = row.example_id, row.order, _winners(row.scores)
        if name.endswith(SWAPPED):
            name = name.removesuffix(SWAPPED)
            order = tuple(1 - i for i in order)
            winners = frozenset(1 - i for i in winners)
        seen[name].append((order, winners))
        first[name].append((order[0] in winners) / len(winners) - 1.0 / len(order))
    if not first:
        return []
    findings = [
        Finding(
            "position",
            "first shown wins, above chance",
            _mean({name: float(np.mean(values)) for name, values in first.items()}, cluster),
            0.0,
            len(first),
        )
    ]
    other: dict[str, float] = {}
    same: dict[str, float] = {}
    for name, verdicts in seen.items():
        alike = _pairs(collections.Counter(order for order, _ in verdicts))
        every = len(verdicts) * (len(verdicts) - 1) // 2
        agree = _pairs(collections.Counter(winners for _, winners in verdicts))
        both = _pairs(collections.Counter(verdicts))
        if every > alike:
            other[name] = 1.0 - (agree - both) / (every - alike)
        if alike:
            same[name] = 1.0 - both / alike
    for shares, title, unbiased in (
        (other, "flips: other order", 0.0), (same, "flips: same order (sampling)", None)
    ):  # fmt: skip
        if shares:
            findings.append(
                Finding("position", title, _mean(shares, cluster), unbiased, len(shares))
            )
    return findings


def _pairs(counts: Mapping[Hashable, int]) -> int:
    """The number of pairs of equal elements, from the count of each element."""
    return sum(n * (n - 1) // 2 for n in counts.values())


def _length(
    records: Sequence[Preference], credits: Mapping[str, float], cluster: Mapping[str, Hashable]
) -> list[Finding]:
    longest: dict[str, float] = {}
    others: dict[str, float] = {}
    for record in records:
        if len(record.responses) < 2 or not record.has_unique_best or record.id not in credits:
            continue
        lengths = [len(response) for response in record.responses]
        top = max(lengths)
        group = longest if lengths[record.best] == top and lengths.count(top) == 1 else others
        group[record.id] = credits[record.id]
    if not longest or not others:
        return []
    first, second = _mean(longest, cluster), _mean(others, cluster)
    return [
        Finding("length", "accuracy where the best is longest", first, None, len(longest)),
        Finding("length", "accuracy where it is not", second, first.value, len(others)),
    ]


def _identical(probes: Sequence[Critique]) -> list[Finding]:
    ties: dict[str, list[float]] = collections.defaultdict(list)
    first: dict[str, list[float]] = collections.defaultdict(list)
    for row in probes:
        if row.scores is None:
            continue
        a, b = row.scores[row.order[0]], row.scores[row.order[1]]
        ties[row.example_id].append(float(a == b))
        if a != b:
            first[row.example_id].append(float(a > b) - 0.5)
    findings = []
    if ties:
        value = mean_interval([float(np.mean(values)) for values in ties.values()])
        findings.append(Finding("identical", "identical responses tie", value, 1.0, len(ties)))
    if first:
        value = mean_interval([float(np.mean(values)) for values in first.values()])
        findings.append(
            Finding(
                "identical", "where not, first shown wins, above chance", value, 0.0, len(first)
            )
        )
    return findings
