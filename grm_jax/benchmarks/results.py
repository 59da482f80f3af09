"""Samples of one judge on one benchmark -> figures with intervals, ready to print and to save."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import grm_jax
from grm_jax.benchmarks import statistics
from grm_jax.benchmarks.aggregate import Aggregate, Rates, TieRule, aggregate
from grm_jax.benchmarks.base import Benchmark, BenchmarkRecords, credit_vector
from grm_jax.benchmarks.samples import SampleRow
from grm_jax.benchmarks.statistics import Difference, Interval
from grm_jax.data.preferences import Preference, Records
from grm_jax.data.rows import DataError

Figures = Mapping[str, Mapping[str, Interval]]  # group -> name -> figure


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """Figures of one method; `ties`, `unjudged` and `votes` as in `aggregate.Method`."""

    name: str
    kind: str
    k: int
    figures: Figures
    votes: int
    ties: float
    unjudged: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The headline figure of `first` less that of `second`, paired on the records."""

    first: str
    second: str
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Results:
    """What results.json holds. Shares and figures are fractions of 1.

    Attributes:
        headline: group and name of the figure that tables and plots show.
        unjudged: ids of records without a usable sample (credit 0).
        skipped: messages of the rows that were left out.
        notes: what a reader must know: a limit, a part of the benchmark.
        model: what is known of the judge; `trained` False means that the figures mean nothing.
    """

    benchmark: str
    judge: str
    records: int
    headline: tuple[str, str]
    methods: tuple[MethodResult, ...]
    comparisons: tuple[Comparison, ...]
    rates: Mapping[str, Rates]
    unjudged: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    model: Mapping[str, Any]

    def figure(self, method: str, figure: tuple[str, str] | None = None) -> Interval | None:
        """A method's figure (default: the headline); None if it has no such method or figure."""
        group, name = figure or self.headline
        for result in self.methods:
            if result.name == method:
                return result.figures.get(group, {}).get(name)
        return None


def assess(
    benchmark: Benchmark,
    records: Sequence[Preference],
    rows: Sequence[SampleRow],
    *,
    judge: str,
    ks: Sequence[int] | None = None,
    k_meta: int | None = None,
    ties: TieRule = "expected",
    threshold: float = 0.5,
    adaptive: bool = False,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Results:
    """All figures of a judge from its samples.

    Args:
        judge: its name in tables.
        ks, k_meta, ties, threshold, adaptive: see `aggregate.aggregate`.
        resamples, seed: of the bootstrap.
        settings: stored in the results, beside those above.
        model: stored in the results; `trained`: whether its weights were.

    Raises:
        DataError, ValueError: as `aggregate` raises.
    """
    found = aggregate(
        records, rows, ks=ks, k_meta=k_meta, ties=ties, threshold=threshold, adaptive=adaptive
    )
    figures = benchmark.figures(records)
    clusters = benchmark.clusters(records)
    values = np.stack([credit_vector(records, method.credits) for method in found.methods])
    point, drawn = statistics.bootstrap(
        figures, values, clusters=clusters, resamples=resamples, seed=seed
    )
    methods = []
    for m, method in enumerate(found.methods):
        nested: dict[str, dict[str, Interval]] = {}
        for f, figure in enumerate(figures):
            nested.setdefault(figure.group, {})[figure.name] = statistics.figure_interval(
                figure, values[m], point[f, m], drawn[f, m], clusters=clusters
            )
        methods.append(
            MethodResult(
                method.name,
                method.kind,
                method.k,
                nested,
                method.votes,
                method.ties,
                method.unjudged,
            )
        )
    index = {method.name: m for m, method in enumerate(found.methods)}
    comparisons = tuple(
        Comparison(
            first,
            second,
            statistics.difference(
                float(point[0, index[first]] - point[0, index[second]]),
                drawn[0, index[first]] - drawn[0, index[second]],
            ),
        )
        for first, second in _pairs(found)
    )
    own = {
        "ks": None if ks is None else list(ks),
        "k_meta": "k // 2" if k_meta is None else k_meta,
        "ties": ties,
        "threshold": threshold,
        "resamples": resamples,
        "bootstrap_seed": seed,
        "level": statistics.LEVEL,
    }
    return Results(
        benchmark=benchmark.name,
        judge=judge,
        records=len(records),
        headline=(figures[0].group, figures[0].name),
        methods=tuple(methods),
        comparisons=comparisons,
        rates=found.rates,
        unjudged=found.unjudged,
        skipped=records.skipped if isinstance(records, Records) else (),
        notes=records.notes if isinstance(records, BenchmarkRecords) else (),
        settings={**own, **(settings or {})},
        versions=versions(),
        model=dict(model or {}),
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
    """The headline of two judges' credits (`aggregate.Method.credits`) on the same records."""
    return statistics.paired_difference(
        credit_vector(records, first),
        credit_vector(records, second),
        figure=benchmark.figures(records)[0],
        clusters=benchmark.clusters(records),
        resamples=resamples,
        seed=seed,
    )


def versions() -> dict[str, str]:
    """Versions of what computed the figures; jax is named without being imported."""
    found = {"grm_jax": grm_jax.__version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "jax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_results(path: str | Path, results: Results) -> None:
    """results.json; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        text = json.dumps(dataclasses.asdict(results), indent=2, allow_nan=False, default=str)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: str | Path) -> Results:
    """A results.json again. `DataError` for a missing file or another kind of file."""
    path = Path(path)
    if not path.is_file():
        raise DataError("", "no such file", "give the results.json of an evaluation", str(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        methods = tuple(
            MethodResult(**{**method, "figures": _read_figures(method["figures"])})
            for method in values["methods"]
        )
        comparisons = tuple(
            Comparison(pair["first"], pair["second"], Difference(**pair["difference"]))
            for pair in values["comparisons"]
        )
        rates = {name: Rates(**rate) for name, rate in values["rates"].items()}
        for name in ("headline", "unjudged", "skipped", "notes"):
            values[name] = tuple(values[name])
        return Results(**{**values, "methods": methods, "comparisons": comparisons, "rates": rates})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            "", f"not a results.json of this version: {error!r}", "evaluate again", str(path)
        ) from None


def _read_figures(nested: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figures:
    return {
        group: {name: Interval(**figure) for name, figure in figures.items()}
        for group, figures in nested.items()
    }


def _pairs(found: Aggregate) -> list[tuple[str, str]]:
    """What a reader asks first: what voting gains, and what guiding it gains."""
    names = [method.name for method in found.methods]
    votes = [method for method in found.methods if method.kind == "vote"]
    pairs = []
    if votes:
        largest = max(votes, key=lambda method: method.k).name
        pairs = [(largest, "sample@1"), (largest, "greedy")]
    pairs += [(f"meta@{vote.k}", vote.name) for vote in votes]
    return [(first, second) for first, second in pairs if first in names and second in names]
