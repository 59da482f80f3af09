"""The results of an evaluation: figures with intervals, and results.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grm_jax
from grm_jax import files
from grm_jax.data.rows import DataError
from grm_jax.files import written_whole
from grm_jax.scoring.aggregate import Rates
from grm_jax.scoring.bias import Finding
from grm_jax.scoring.statistics import Difference, Interval

Figures = Mapping[str, Mapping[str, Interval]]  # group -> name -> figure


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """The figures of one method.

    Attributes:
        votes: the number of verdicts over all records.
        ties: the share of undecided verdicts: several responses share the top score, or a single
            response is exactly on the threshold.
        unjudged: the share of verdicts without any parsable critique.
        samples: the mean number of samples in a verdict.
    """

    name: str
    kind: str
    k: int
    figures: Figures
    votes: int
    ties: float
    unjudged: float
    samples: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The headline figure of method `first` minus that of `second`, paired on the records."""

    first: str
    second: str
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Against:
    """A figure of a method minus the same figure of another run, paired on the records."""

    run: str
    method: str
    group: str
    figure: str
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Results:
    """The contents of results.json. Shares and figures are fractions of 1.

    Attributes:
        headline: group and name of the figure that tables and plots show.
        unjudged: ids of the records without any parsable critique.
        skipped: the messages of the rows that were left out.
        notes: what a reader must know, such as a limit or a missing part of the benchmark.
        model: what is known of the judge; with `trained` False the figures mean nothing.
        bias: the rows of the bias table.
        cost: the samples, tokens and (if known) seconds of a verdict.
        against: paired differences to another run (`compare_runs`), by method and figure.
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
    bias: tuple[Finding, ...] = ()
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    against: tuple[Against, ...] = ()

    def rate(self, method: MethodResult) -> Rates | None:
        """The failures among the critiques of a method; None for a scalar RM, which has none."""
        if method.kind == "scalar":
            return None
        return self.rates["greedy" if method.kind == "greedy" else "sampled"]

    def figure(self, method: str, figure: tuple[str, str] | None = None) -> Interval | None:
        """A method's figure (default: the headline); None if there is no such method or figure."""
        group, name = figure or self.headline
        for result in self.methods:
            if result.name == method:
                return result.figures.get(group, {}).get(name)
        return None


def versions() -> dict[str, str]:
    """The versions of the packages that computed the figures; jax is not imported for this."""
    installed = {"grm_jax": grm_jax.__version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "jax"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def write_results(path: str | Path, results: Results) -> None:
    """Write results.json, whole or not at all."""
    path = Path(path)
    text = json.dumps(dataclasses.asdict(results), indent=2, allow_nan=False, default=str)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_results(path: str | Path) -> Results:
    """Read a results.json. Raises DataError if it is missing or another kind of file."""
    path = Path(path)
    if not path.is_file():
        raise DataError("", "no such file", "give the results.json of an evaluation", str(path))
    try:
        values = json.loads(files.read_text(path))
        methods = tuple(
            MethodResult(**{**method, "figures": _read_figures(method["figures"])})
            for method in values["methods"]
        )
        comparisons = tuple(
            Comparison(pair["first"], pair["second"], Difference(**pair["difference"]))
            for pair in values["comparisons"]
        )
        rates = {
            name: Rates(
                **{**rate, "boxes": {key: tuple(box) for key, box in rate.get("boxes", {}).items()}}
            )
            for name, rate in values["rates"].items()
        }
        for name in ("headline", "unjudged", "skipped", "notes"):
            values[name] = tuple(values[name])
        bias = tuple(
            Finding(**{**one, "value": Interval(**one["value"])}) for one in values["bias"]
        )
        against = tuple(
            Against(**{**one, "difference": Difference(**one["difference"])})
            for one in values["against"]
        )
        parsed = {"methods": methods, "comparisons": comparisons, "rates": rates}
        return Results(**{**values, **parsed, "bias": bias, "against": against})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            "", f"not a results.json of this version: {error!r}", "evaluate again", str(path)
        ) from None


def _read_figures(nested: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figures:
    return {
        group: {name: Interval(**figure) for name, figure in figures.items()}
        for group, figures in nested.items()
    }
