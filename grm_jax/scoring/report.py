"""Results as tables, for the terminal and in Markdown, and as files."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from grm_jax.critique.parse import one_line
from grm_jax.errors import UserError
from grm_jax.scoring.plot import plot_accuracy
from grm_jax.scoring.results import Results, write_results
from grm_jax.scoring.statistics import LEAST, TOO_FEW, Difference, Interval

COMPARED = (
    "greedy",
    "sample@1",
    "vote@4",
    "vote@8",
    "vote@16",
    "vote@32",
    "meta@8",
    "meta@16",
    "meta@32",
    "hybrid@8",
    "hybrid@16",
    "hybrid@32",
    "scalar",
)
MAIN = ("overall", "levels", "sections", "classes", "games")  # groups of the first table
FINE = ("subsets", "responses", "sections by level")  # in files, not on the terminal
_NONE = "-"
_SHOWN = 5  # ids and messages listed at most


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of texts whose first column has the names of the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self, *, stacked: bool = False) -> Table:
        """The table for the terminal. stacked: intervals are below their figures."""
        # `Text`, so that brackets in a name are not read as rich's markup.
        table = Table(title=Text(self.title), title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if index else "left", no_wrap=not index)
        for row in self.rows:
            cells = (cell.replace(" [", "\n[") if stacked else cell for cell in row)
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def markdown(self) -> str:
        """A Markdown table with the title as a line above."""
        lines = [
            self.columns,
            tuple("---:" if index else ":---" for index in range(len(self.columns))),
            *self.rows,
        ]
        body = "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)
        return f"{_escaped(self.title)}\n\n{body}\n"


def methods_grid(results: Results) -> Grid:
    """One judge: a row for each method.

    The columns are the overall and section figures with [low, high], the samples in a verdict, the
    shares of tied and of unjudged verdicts, and the shares of samples that were unparsable and that
    were cut off at the length limit.
    """
    keys = [(group, name) for group in MAIN for name in _names(results, group)]
    # If there is a single section, its figure repeats the headline.
    names = [name for _, name in keys]
    keys = [key for i, key in enumerate(keys) if names.index(key[1]) == i]
    rows = []
    for method in results.methods:
        rate = results.rate(method)
        rows.append(
            (
                method.name,
                *(_cell(method.figures.get(group, {}).get(name)) for group, name in keys),
                f"{method.samples:.3g}",
                percent(method.ties),
                percent(method.unjudged),
                _NONE if rate is None else percent(rate.failed),
                _NONE if rate is None else percent(rate.truncated),
            )
        )
    columns = ("samples", "ties", "unjudged", "unparsed", "cut off")
    return Grid(title_of(results), ("method", *(name for _, name in keys), *columns), tuple(rows))


def group_grids(results: Results) -> list[Grid]:
    """The finer figures: a table per group, with a row per figure and a column per method."""
    groups = dict.fromkeys(g for method in results.methods for g in method.figures)
    grids = []
    for group in (group for group in groups if group not in MAIN):
        rows = tuple(
            (name, *(_cell(m.figures.get(group, {}).get(name)) for m in results.methods))
            for name in _names(results, group)
        )
        grids.append(Grid(group, ("", *(m.name for m in results.methods)), rows))
    return grids


def _names(results: Results, group: str) -> list[str]:
    """The names of a group's figures, over all methods."""
    return list(dict.fromkeys(n for m in results.methods for n in m.figures.get(group, {})))


def _cell(value: Interval | None) -> str:
    return _NONE if value is None else cell(value)


def bias_grid(results: Results) -> Grid:
    """What influences the judge besides quality."""
    rows = []
    for finding in results.bias:
        unbiased = _NONE if finding.unbiased is None else f"{100 * finding.unbiased:.1f}"
        rows.append(
            (finding.kind, finding.name, cell(finding.value), unbiased, f"{finding.records:,}")
        )
    return Grid("bias", ("", "what", "found", "unbiased", "records"), tuple(rows))


def against_grid(results: Results) -> Grid:
    """Differences to another run, by method and figure."""
    rows = tuple((one.method, one.figure, signed(one.difference)) for one in results.against)
    run = results.against[0].run if results.against else ""
    return Grid(f"less {run}", ("method", "figure", "difference"), rows)


def comparison_grid(
    results: Mapping[str, Results],
    *,
    methods: Sequence[str] = COMPARED,
    figure: tuple[str, str] | None = None,
    title: str | None = None,
) -> Grid:
    """Several judges on one benchmark: a row per judge, a column per method.

    Args:
        results: by row name, e.g. SFT, RFT, RL, scalar baseline (which has `greedy` alone).
        methods: the columns; methods that no judge has are left out, missing cells are "-".
        figure: group and name; default: the headline.

    Raises:
        ValueError: no results, or results of different benchmarks or numbers of records: such
            figures do not compare.
    """
    if not results:
        raise ValueError("no results to compare")
    kinds = {(one.benchmark, one.records) for one in results.values()}
    if len(kinds) > 1:
        shown = ", ".join(
            f"{benchmark} ({records} records)" for benchmark, records in sorted(kinds)
        )
        raise UserError(f"results of {shown} do not compare; evaluate on the same records")
    figures = {
        label: {method: one.figure(method, figure) for method in methods}
        for label, one in results.items()
    }
    columns = [method for method in methods if any(row[method] for row in figures.values())]
    if title is None:
        first = next(iter(results.values()))
        title = (
            f"{first.benchmark}, {' '.join(figure or first.headline)}, {first.records:,} records"
        )
    return Grid(
        title,
        ("model", *columns),
        tuple(
            (
                label,
                *(_NONE if (value := row[method]) is None else cell(value) for method in columns),
            )
            for label, row in figures.items()
        ),
    )


def summary(results: Results) -> list[str]:
    """The lines below the table: notes, failures, rows that were left out, differences."""
    lines = [f"note: {note}" for note in results.notes]
    if results.model.get("trained") is False:
        lines.append("note: this model is untrained (random weights); its figures mean nothing")
    if any(value.bounds is None for value in _figures(results)):
        lines.append(
            f"note: some figures have no interval, because they are based on {TOO_FEW}; the "
            "records of one prompt are not independent"
        )
    for name, rate in results.rates.items():
        kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in rate.failures.items())
        lines.append(
            f"{name}: {rate.samples:,} samples, {percent(rate.failed)} without scores"
            f"{f' ({kinds})' if kinds else ''}, {percent(rate.truncated)} cut off at the length "
            f"limit, {rate.tokens:.1f} tokens each"
        )
        if rate.truncated > 0.5:
            lines.append(f"note: {_waited(results)}")
        for kind, (box, count) in rate.boxes.items():
            lines.append(f"{name}: {kind}, the commonest box ({count:,} times): {one_line(box)}")
    if results.unjudged:
        lines.append(
            f"unjudged: {len(results.unjudged)} of {results.records:,} records have no usable "
            f"sample: {_listed(results.unjudged)}"
        )
    if results.skipped:
        lines.append(f"left out: {len(results.skipped)} rows; the first: {results.skipped[0]}")
    lines.append(_rules(results))
    if results.cost:
        lines.append("cost of a verdict: " + _cost(results.cost))
    lines += [
        f"{pair.first} - {pair.second}: {signed(pair.difference)}" for pair in results.comparisons
    ]
    return lines


def _waited(results: Results) -> str:
    """A note about critiques of which most did not end before the length limit."""
    stops = results.model.get("stops") or {}
    named = ", ".join(f"{piece} (id {id})" for piece, id in stops.items())
    return (
        f"most samples did not end: none of {named or 'its end tokens'} came within the length "
        "limit; raise --max-new-tokens, or correct eos_token_id in the model's "
        "generation_config.json"
    )


def _figures(results: Results) -> Iterator[Interval]:
    """All figures that tables show with an interval."""
    for method in results.methods:
        for group in method.figures.values():
            yield from group.values()
    for finding in results.bias:
        yield finding.value


def print_results(results: Results, *, console: Console | None = None) -> None:
    """The table and the summary, to stdout by default."""
    console = console or _console()
    print_grid(methods_grid(results), console=console)
    for grid in group_grids(results):
        if grid.title not in FINE:
            print_grid(grid, console=console)
    if results.bias:
        print_grid(bias_grid(results), console=console)
    if results.against:
        print_grid(against_grid(results), console=console)
    for line in summary(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_grid(grid: Grid, *, console: Console | None = None) -> None:
    """A table, to stdout by default; stacked where it is wider than the console."""
    console = console or _console()
    wide = grid.rich()
    fits = (
        Measurement.get(console, console.options.update(max_width=10_000), wide).maximum
        <= console.width
    )
    console.print(wide if fits else grid.rich(stacked=True))


def write_report(
    directory: str | Path,
    results: Results,
    *,
    baselines: Mapping[str, Interval] | None = None,
) -> list[Path]:
    """results.json, table.md, accuracy.png and .svg (if k > 1).

    Returns:
        The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / "results.json", directory / "table.md"]
    write_results(files[0], results)
    below = "".join(f"- {_escaped(line)}\n" for line in summary(results))
    grids = [methods_grid(results), *group_grids(results)]
    grids += [bias_grid(results)] if results.bias else []
    grids += [against_grid(results)] if results.against else []
    tables = "\n".join(grid.markdown() for grid in grids)
    files[1].write_text(tables + "\n" + below, encoding="utf-8")
    if any(method.kind == "vote" for method in results.methods):
        files += plot_accuracy(results, directory / "accuracy", baselines=baselines)
    return files


def _escaped(text: str) -> str:
    """Text from outside as one line of Markdown, without any markup."""
    text = " ".join(text.split())
    for mark in "\\|`*":
        text = text.replace(mark, "\\" + mark)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def percent(share: float) -> str:
    """0.1234 -> "12.3%"; a small share other than zero is "<0.1%"."""
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def cell(value: Interval) -> str:
    """A figure in percent: "86.0 [84.7, 87.2]"; without an interval "86.0 [< 5 prompts]"."""
    if value.bounds is None:
        return f"{100 * value.value:.1f} [< {LEAST} prompts]"
    low, high = value.bounds
    return f"{100 * value.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def signed(value: Difference) -> str:
    """A paired difference in points: "+3.2 [+2.2, +4.1], p = 0.001"."""
    if value.bounds is None or value.p_value is None:
        return f"{100 * value.value:+.1f} (no interval, no p-value: {TOO_FEW})"
    (low, high), p = value.bounds, value.p_value
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{100 * value.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {shown}"


def _rules(results: Results) -> str:
    """The rules under which the figures were computed."""
    rules = results.settings["rules"]
    shown = ", ".join(f"{name} {value}" for name, value in rules.items())
    return f"rules: {shown}"


def _cost(cost: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.3g} {name}" for name, value in cost.items())


def title_of(results: Results) -> str:
    return f"{results.benchmark}: {results.judge}, {results.records:,} records"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _console() -> Console:
    # Piped output has no width; a table must not be folded to 80 columns in a log file.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
