"""Accuracy against the number of samples, drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from grm_jax.scoring.results import Results
from grm_jax.scoring.statistics import TOO_FEW, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours can be distinguished with any common colour blindness. The
# markers and dashes distinguish the lines in print.
_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
)
_LINES = {
    "vote": (_BLUE, "o", "-"),
    "meta": (_VERMILLION, "s", "--"),
    "hybrid": ("#000000", "D", "-."),
}
_LABELS = {
    "vote": "voting",
    "meta": "voting, guided by the meta RM",
    "hybrid": "voting plus the scalar RM",
}
_LEVELS = ((_GREEN, "-."), (_PURPLE, ":"), (_ORANGE, (0, (6, 1.5))), ("#555555", (0, (1, 3))))


def plot_accuracy(
    results: Results,
    path: str | Path,
    *,
    baselines: Mapping[str, Interval] | None = None,
    figure: tuple[str, str] | None = None,
) -> list[Path]:
    """`accuracy_canvas` as PNG and SVG.

    Args:
        path: without suffix.

    Returns:
        The two files.
    """
    canvas = accuracy_canvas(results, baselines=baselines, figure=figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    canvas.savefig(files[0])
    files[1].write_text(svg(canvas), encoding="utf-8")
    return files


def svg(canvas: Figure) -> str:
    """A canvas as SVG. The same results give the same text, without a date or random ids."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "grm_jax", "svg.fonttype": "none"}):
        canvas.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def accuracy_canvas(
    results: Results,
    *,
    baselines: Mapping[str, Interval] | None = None,
    figure: tuple[str, str] | None = None,
) -> Figure:
    """Accuracy against k, with a line for each kind of vote and horizontal lines for the greedy
    critique, the scalar RM and baselines.

    Args:
        baselines: further horizontal lines by name, e.g. the scalar baseline.
        figure: group and name; default: the headline.

    Raises:
        ValueError: no method with samples: there is no k to plot against.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    lines = _lines(results, figure)
    if not lines:
        raise ValueError("no sampled method in the results: nothing to plot against k")
    levels = dict(baselines or {})
    for name, method in (("scalar RM", "scalar"), ("greedy", "greedy")):
        if (value := results.figure(method, figure)) is not None:
            levels = {name: value, **levels}
    canvas = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes: Axes = canvas.add_subplot()
    for (name, value), (colour, dashes) in zip(levels.items(), _cycle(len(levels)), strict=True):
        axes.axhline(100 * value.value, color=colour, linestyle=dashes, linewidth=1.6, label=name)
        if value.bounds is not None:
            low, high = value.bounds
            axes.axhspan(100 * low, 100 * high, color=colour, alpha=0.10, linewidth=0)
    for kind, points in lines.items():
        colour, marker, dashes = _LINES[kind]
        ks = [k for k, _ in points]
        bounds = [value.bounds or (value.value, value.value) for _, value in points]
        axes.fill_between(
            ks,
            [100 * low for low, _ in bounds],
            [100 * high for _, high in bounds],
            color=colour,
            alpha=0.16,
            linewidth=0,
        )
        axes.plot(
            ks,
            [100 * value.value for _, value in points],
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=2,
            markersize=5,
            label=_LABELS[kind],
        )
    ticks = sorted({k for points in lines.values() for k, _ in points})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(k) for k in ticks])
    axes.set_xlabel("k, samples per verdict (log scale)")
    name = (figure or results.headline)[1]
    axes.set_ylabel("accuracy, %" if name == "accuracy" else f"accuracy ({name}), %")
    level = f"bands: {100 * results.settings.get('level', 0.95):g}% intervals"
    if all(value.bounds is None for points in lines.values() for _, value in points):
        level = f"no intervals: {TOO_FEW}"
    axes.set_title(
        f"{results.benchmark}: {results.judge}, {results.records:,} records; {level}",
        fontsize=9,
        loc="left",
    )
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    # Below the axes, since inside it could cover a line.
    canvas.legend(
        handles[::-1],
        labels[::-1],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return canvas


def _lines(
    results: Results, figure: tuple[str, str] | None
) -> dict[str, list[tuple[int, Interval]]]:
    """Points (k, figure) of the vote line, which starts with a single sample, and of the others."""
    lines: dict[str, list[tuple[int, Interval]]] = {}
    for method in results.methods:
        if "/" in method.name:  # another k_meta than half of k
            continue
        value = results.figure(method.name, figure)
        kind = "vote" if method.kind == "sample" else method.kind
        if value is not None and kind in _LINES:
            lines.setdefault(kind, []).append((method.k, value))
    return {kind: sorted(points, key=lambda point: point[0]) for kind, points in lines.items()}


def _cycle(count: int):
    return [_LEVELS[index % len(_LEVELS)] for index in range(count)]
