"""From a judge's critiques of a benchmark to figures with intervals, and differences of judges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from grm_jax.critique.adaptive import BOUND
from grm_jax.critique.template_set import Scales
from grm_jax.critique.voting import SCALAR_WEIGHT
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference, Records
from grm_jax.data.rows import DataError
from grm_jax.scoring import statistics
from grm_jax.scoring.aggregate import Aggregate, Method, aggregate, is_uneven, reported
from grm_jax.scoring.benchmark import Benchmark
from grm_jax.scoring.bias import bias_table
from grm_jax.scoring.figures import Figure, FigureLike, Resampled
from grm_jax.scoring.items import BenchmarkRecords
from grm_jax.scoring.judges import JUDGES
from grm_jax.scoring.measures import credit, credit_where
from grm_jax.scoring.results import (
    Against,
    Comparison,
    MethodResult,
    Results,
    versions,
)
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import Difference, Interval


@dataclasses.dataclass(frozen=True)
class Scored:
    """One judge's verdicts on a benchmark, with the figures to compute from them.

    Attributes:
        values: for each method, the measures that the figures need.
    """

    aggregate: Aggregate
    figures: tuple[FigureLike, ...]
    values: tuple[Mapping[str, np.ndarray], ...]

    @property
    def names(self) -> list[str]:
        """The names of the methods."""
        return [method.name for method in self.aggregate.methods]

    def bound(self, method: str, figure: FigureLike) -> Resampled:
        """A figure of a method, ready to be resampled."""
        return figure.bind(self.values[self.names.index(method)])


def judge_scores(
    benchmark: Benchmark,
    records: Sequence[Preference],
    rows: Sequence[Critique],
    rules: Rules,
    **options: Any,
) -> Scored:
    """Aggregate critiques and measure their verdicts; `options` are those of `aggregate`.

    A figure that is not defined for any method (a ROC-AUC without negatives) is left out.

    Raises:
        DataError: as `aggregate` raises, or if the headline is not defined.
    """
    aggregated = aggregate(records, rows, **options)
    figures = benchmark.figures(records, rules)
    measures = {"credit": credit, **benchmark.measures}
    wanted = {name for figure in figures for name in figure.measures}
    values = []
    for method in aggregated.methods:
        verdicts = method.verdicts(records, rules)
        values.append({name: measures[name](verdicts) for name in sorted(wanted)})
    once = np.ones((1, len(records)))
    defined = tuple(
        figure
        for figure in figures
        if not all(np.isnan(figure.bind(one)(once)[0]) for one in values)
    )
    if figures[0] not in defined:
        raise DataError(
            "",
            f"{figures[0].group} {figures[0].name} of {benchmark.name} is not defined on these "
            f"{len(records)} records",
            "give more of them, or rules that count more of the verdicts",
        )
    return Scored(aggregated, defined, tuple(values))


def assess(
    benchmark: Benchmark,
    records: Sequence[Preference],
    rows: Sequence[Critique],
    *,
    judge: str,
    rules: Rules | None = None,
    ks: Sequence[int] | None = None,
    k_meta: Sequence[int] = (),
    bound: float = BOUND,
    scales: Scales = Scales(),
    adaptive: bool = False,
    scalar: Mapping[str, Sequence[float]] | None = None,
    scalar_weight: float = SCALAR_WEIGHT,
    scalar_threshold: float | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    probes: Sequence[Critique] = (),
    seconds_per_sample: float | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    scored: Scored | None = None,
) -> Results:
    """All figures of a judge, from its critiques.

    Args:
        judge: its name in tables.
        rules: default: those of the benchmark's authors.
        ks, k_meta, bound, scales, scalar, scalar_weight, scalar_threshold: see
            `aggregate.aggregate`.
        adaptive: the `uneven` of `aggregate.aggregate`.
        resamples, seed: of the bootstrap.
        probes: critiques of records with identical responses (`bias.identical`).
        seconds_per_sample: the mean cost of a sample, if it is known.
        settings: stored in the results as `arguments`, beside those above.
        model: stored in the results; `trained` False marks random weights.
        scored: what `judge_scores` found in these critiques with the same rules and options, where
            the caller has it already.

    Raises:
        DataError, ValueError: as `aggregate` raises.
    """
    rules = rules or benchmark.authors
    scored = scored or judge_scores(
        benchmark, records, rows, rules, ks=ks, k_meta=k_meta, bound=bound, scales=scales,
        threshold=rules.threshold, uneven=adaptive,
        scalar=scalar, scalar_weight=scalar_weight, scalar_threshold=scalar_threshold,
    )  # fmt: skip
    aggregated = scored.aggregate
    methods, comparisons = _intervals(benchmark, records, rules, scored, resamples, seed)
    chosen = reported(aggregated)
    shown = next(method for method in methods if method.name == chosen.name)
    credits = _pair_credits(records, chosen, rules)
    used = {
        "ks": None if ks is None else list(ks),
        "k_meta": ["k // 2", *k_meta],
        "rules": dataclasses.asdict(rules),
        "adaptive_bound": bound,
        "scales": {name: list(ends) for name, ends in dataclasses.asdict(scales).items()},
        "resamples": resamples,
        "bootstrap_seed": seed,
        "level": statistics.LEVEL,
    }
    if scalar is not None:
        used |= {"scalar_weight": scalar_weight, "scalar_threshold": scalar_threshold}
    notes = records.notes if isinstance(records, BenchmarkRecords) else ()
    return Results(
        benchmark=benchmark.name,
        judge=judge,
        records=len(records),
        headline=(scored.figures[0].group, scored.figures[0].name),
        methods=methods,
        comparisons=comparisons,
        rates=aggregated.rates,
        unjudged=aggregated.unjudged,
        skipped=records.skipped if isinstance(records, Records) else (),
        notes=(*notes, *_scalar_notes(benchmark, records, aggregated)),
        settings={**used, "arguments": dict(settings or {})},
        versions=versions(),
        model=dict(model or {}),
        bias=bias_table(
            records,
            rows,
            credits,
            shown.figures.get("sections", {}),
            rules,
            probes,
            clusters=benchmark.clusters(records),
            sees_order=judge not in JUDGES,
        ),
        cost=_cost(rows, {} if benchmark.rating else credits, seconds_per_sample, shown),
    )


def _scalar_notes(
    benchmark: Benchmark, records: Sequence[Preference], aggregated: Aggregate
) -> list[str]:
    """What does not count in the row of the scalar RM. Ratings are ranked, without a threshold."""
    singles = sum(len(record.responses) == 1 for record in records)
    if not _uncompared(aggregated) or not singles or benchmark.rating:
        return []
    return [
        f"scalar: {singles:,} single responses do not count in this row, because the scalar RM has "
        "no calibrated threshold (calibration.json of its stage) to compare their scores with"
    ]


def _uncompared(aggregated: Aggregate) -> bool:
    """Whether single responses do not count in the row of the scalar RM."""
    return any(
        method.threshold is not None and math.isnan(method.threshold)
        for method in aggregated.methods
    )


def _intervals(
    benchmark: Benchmark,
    records: Sequence[Preference],
    rules: Rules,
    scored: Scored,
    resamples: int,
    seed: int,
) -> tuple[tuple[MethodResult, ...], tuple[Comparison, ...]]:
    """Every figure of every method with its interval, and the differences between methods."""
    aggregated, figures = scored.aggregate, scored.figures
    clusters = benchmark.clusters(records)
    functions = [figure.bind(values) for values in scored.values for figure in figures]
    point, drawn = statistics.bootstrap(
        functions, len(records), clusters=clusters, resamples=resamples, seed=seed
    )
    shape = (len(aggregated.methods), len(figures))
    point, drawn = point.reshape(shape), drawn.reshape(*shape, -1)
    methods = []
    for m, method in enumerate(aggregated.methods):
        nested: dict[str, dict[str, Interval]] = {}
        for f, figure in enumerate(figures):
            if np.isnan(point[m, f]):
                continue  # this method has nothing that counts
            nested.setdefault(figure.group, {})[figure.name] = _interval(
                figure, scored.values[m], float(point[m, f]), drawn[m, f], clusters
            )
        undecided = method.votes.undecided(method.verdicts(records, rules).rules.threshold)
        methods.append(
            MethodResult(
                method.name,
                method.kind,
                method.k,
                nested,
                undecided.size,
                float(undecided.mean()),
                float(method.votes.unjudged().mean()),
                method.samples,
            )
        )
    index = {method.name: m for m, method in enumerate(aggregated.methods)}
    comparisons = tuple(
        Comparison(
            first,
            second,
            statistics.difference(
                float(point[index[first], 0] - point[index[second], 0]),
                drawn[index[first], 0] - drawn[index[second], 0],
                len(
                    _evidence(figures[0], scored.values[index[first]], clusters)
                    & _evidence(figures[0], scored.values[index[second]], clusters)
                ),
            ),
        )
        for first, second in _pairs(records, aggregated)
        if not np.isnan(point[[index[first], index[second]], 0]).any()
    )
    return tuple(methods), comparisons


def _interval(
    figure: FigureLike,
    values: Mapping[str, np.ndarray],
    value: float,
    drawn: np.ndarray,
    clusters: Sequence[Hashable] | None,
) -> Interval:
    """A percentile interval; for means over records that all have the same value a Wilson one."""
    if not isinstance(figure, Figure) or figure.total:
        return statistics.interval(value, drawn, len(_evidence(figure, values, clusters)))
    members = figure.members
    seen = np.concatenate([values[name][members] for name in figure.measures], axis=1)
    of_members = None if clusters is None else [clusters[i] for i in members.tolist()]
    return statistics.figure_interval(seen, value, drawn, clusters=of_members)


def _evidence(
    figure: FigureLike, values: Mapping[str, np.ndarray], clusters: Sequence[Hashable] | None
) -> set[Hashable]:
    """The clusters of the figure's records that have a value of one of its measures."""
    members = figure.members
    counted = np.any([~np.isnan(values[name][members]).all(axis=1) for name in figure.measures], 0)
    return {i if clusters is None else clusters[i] for i in members[counted].tolist()}


def _pair_credits(records: Sequence[Preference], method: Method, rules: Rules) -> dict[str, float]:
    """Record id -> credit, for records with one best response and a verdict that counts."""
    values = credit_where(method.verdicts(records, rules), lambda record: record.has_unique_best)
    return {
        record.id: float(np.nanmean(one))
        for record, one in zip(records, values, strict=True)
        if not np.isnan(one).all()
    }


def _cost(
    rows: Sequence[Critique],
    credits: Mapping[str, float],
    seconds: float | None,
    shown: MethodResult,
) -> dict[str, float]:
    """Samples, tokens and (if known) seconds of one verdict by the reported method, and of one
    right verdict."""
    tokens = float(np.mean([row.tokens for row in rows])) * shown.samples
    cost = {"samples": shown.samples, "tokens": tokens}
    if seconds is not None:
        cost["seconds"] = seconds * shown.samples
    right = float(np.mean(list(credits.values()))) if credits else 0.0
    if right > 0:
        cost |= {f"{name} per right verdict": value / right for name, value in cost.items()}
    return cost


def compare_runs(
    benchmark: Benchmark,
    records: Sequence[Preference],
    ours: Scored,
    other: Sequence[Critique],
    run: str,
    *,
    rules: Rules | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    **options: Any,
) -> tuple[Against, ...]:
    """Overall and section figures of the methods that both runs have, minus those of the other run.

    The other run is scored under the same rules, and both are resampled together.

    Args:
        ours: this run's critiques as `judge_scores` scored them with these rules and options.
        other: the critiques of the other run.
        run: the other run's name.
        options: those of `aggregate`.

    Raises:
        DataError: the other run judged other records, or no method is in both.
    """
    rules = rules or benchmark.authors
    try:
        uneven = is_uneven(other)
        theirs = judge_scores(benchmark, records, other, rules, uneven=uneven, **options)
    except DataError as error:
        raise DataError(
            error.field, f"{run} cannot be compared: {error.problem}", error.fix, error.where
        ) from None
    names = [method.name for method in ours.aggregate.methods]
    shared = [m.name for m in theirs.aggregate.methods if m.name in names]
    if not shared:
        raise DataError("", f"{run} has no method in common", f"give a run with {names[0]}")
    figures = [
        figure
        for figure in ours.figures
        if figure.group in ("overall", "sections")
        and any((figure.group, figure.name) == (f.group, f.name) for f in theirs.figures)
    ]
    pairs = [(method, figure) for method in shared for figure in figures]
    functions = [scored.bound(m, f) for scored in (ours, theirs) for m, f in pairs]
    point, drawn = statistics.bootstrap(
        functions, len(records), clusters=benchmark.clusters(records), resamples=resamples,
        seed=seed,
    )  # fmt: skip
    half, clusters = len(pairs), benchmark.clusters(records)

    def independent(method: str, figure: FigureLike) -> int:
        evidence = [
            _evidence(figure, scored.values[scored.names.index(method)], clusters)
            for scored in (ours, theirs)
        ]
        return len(evidence[0] & evidence[1])

    return tuple(
        Against(
            run,
            method,
            figure.group,
            figure.name,
            statistics.difference(
                float(point[i] - point[half + i]),
                drawn[i] - drawn[half + i],
                independent(method, figure),
            ),
        )
        for i, (method, figure) in enumerate(pairs)
        if not np.isnan(point[i] - point[half + i])
    )


def compare(
    benchmark: Benchmark,
    records: Sequence[Preference],
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of the headline between two judges' credits (`aggregate.Method.credits`)."""
    headline = benchmark.figures(records, benchmark.authors)[0]
    ours, theirs = (
        headline.bind({"credit": np.asarray([[credits[record.id]] for record in records])})
        for credits in (first, second)
    )
    return statistics.paired_difference(
        ours,
        theirs,
        records=len(records),
        clusters=benchmark.clusters(records),
        resamples=resamples,
        seed=seed,
    )


def _pairs(records: Sequence[Preference], aggregated: Aggregate) -> list[tuple[str, str]]:
    """The pairs of methods to compare: what voting, guiding the vote and a scalar RM gain.

    Methods are not compared with a scalar RM whose row leaves out single responses that they judge.
    """
    names = [method.name for method in aggregated.methods]
    votes = [method for method in aggregated.methods if method.kind == "vote"]
    pairs = []
    if votes:
        largest = max(votes, key=lambda method: method.k).name
        pairs = [(largest, "sample@1"), (largest, "greedy")]
        pairs += [(f"adaptive@{vote.k}", vote.name) for vote in votes]
    pairs += [(f"meta@{vote.k}", vote.name) for vote in votes]
    pairs += [(f"hybrid@{vote.k}", vote.name) for vote in votes]
    single = any(len(record.responses) == 1 for record in records)
    if votes and not (single and _uncompared(aggregated)):
        pairs.append((f"hybrid@{max(vote.k for vote in votes)}", "scalar"))
    return [(first, second) for first, second in pairs if first in names and second in names]
