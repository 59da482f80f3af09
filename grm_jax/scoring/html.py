"""One HTML file for each run: figures, tables, the bias table, and a browser of critiques.

The page opens from disk and uses no network, which its content policy forbids. Texts of models and
benchmarks are escaped: in tables by the template, in the browser by using text nodes, and in the
embedded data by writing "<" as \\u003c, so that no text can close its script element.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.files import written_whole
from grm_jax.scoring.aggregate import Method
from grm_jax.scoring.benchmark import Benchmark
from grm_jax.scoring.plot import accuracy_canvas, svg
from grm_jax.scoring.report import (
    against_grid,
    bias_grid,
    group_grids,
    methods_grid,
    summary,
)
from grm_jax.scoring.results import Results
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import TOO_FEW

CHARACTERS = 40_000_000  # the maximum size of the records and critiques in one file
_SAMPLE = 150  # characters of a sample besides its text
_RANK = {"wrong": 0, "unjudged": 1, "tie": 2, "rated": 3, "right": 4}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One benchmark in the report. method: its verdicts are shown as right or wrong."""

    benchmark: Benchmark
    results: Results
    records: Sequence[Preference]
    rows: Sequence[Critique]
    method: Method


def write_html(
    path: str | Path, evaluated: Sequence[Evaluated], *, title: str, characters: int = CHARACTERS
) -> Path:
    """Write the report; the file appears whole or not at all.

    Args:
        characters: the maximum size of records and critiques, divided evenly among the benchmarks.
            Wrong verdicts come first; the page says how many of the records it holds.
    """
    folder = resources.files("grm_jax.scoring") / "html_report"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    share = characters // max(len(evaluated), 1)
    data = [
        {"records": _records(one, share), "of": len(one.records), "private": _private(one)}
        for one in evaluated
    ]
    versions = evaluated[0].results.versions if evaluated else {}
    text = template.render(
        title=f"grm_jax: {title}",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        benches=[_bench(one.results, one.benchmark.about) for one in evaluated],
        data=Markup(_embedded(data)),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
    )
    path = Path(path)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _private(one: Evaluated) -> bool:
    return one.benchmark.private


def _embedded(data: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028",
               "\u2029": "\\u2029"}  # fmt: skip
    return text.translate(str.maketrans(escapes))


def _bench(results: Results, about: str) -> dict[str, Any]:
    grids = [("Figures", methods_grid(results), False)]
    grids += [(grid.title, grid, False) for grid in group_grids(results)]
    grids += [("Bias", bias_grid(results), True)] if results.bias else []
    if results.against:
        grid = against_grid(results)
        grids.append((f"Against another run ({grid.title})", grid, True))
    cards = []
    largest = max(method.k for method in results.methods)
    for method in results.methods:
        value = results.figure(method.name)
        chosen = method.kind in ("greedy", "sample", "scalar") or method.k == largest
        if value is not None and chosen:
            shown = TOO_FEW
            if value.bounds is not None:
                shown = "{:.1f} to {:.1f}".format(*(100 * bound for bound in value.bounds))
            cards.append(
                {"name": method.name, "value": f"{100 * value.value:.1f}", "interval": shown}
            )
    drawn = any(method.kind == "vote" for method in results.methods)
    return {
        "name": results.benchmark,
        "about": about,
        "records": f"{results.records:,}",
        "headline": results.headline[1],
        "untrained": results.model.get("trained") is False,
        "cards": cards,
        "figure": Markup(_inline(svg(accuracy_canvas(results)))) if drawn else None,
        "grids": [
            {"heading": heading, "columns": grid.columns, "rows": grid.rows, "left": left}
            for heading, grid, left in grids
        ],
        "notes": summary(results),
    }


def _inline(text: str) -> str:
    """An SVG document as an element of an HTML page; matplotlib has escaped its texts."""
    return text[text.index("<svg") :]


def _records(one: Evaluated, characters: int) -> list[dict[str, Any]]:
    """The records of the browser, wrong verdicts first, up to a number of characters."""
    rules = Rules(**one.results.settings["rules"])
    benchmark = one.benchmark
    by_id: dict[str, list[Critique]] = {record.id: [] for record in one.records}
    for row in one.rows:
        by_id[row.example_id].append(row)
    judged = []
    for record, scores in zip(one.records, one.method.votes.scores(), strict=True):
        seen = scores[~np.isnan(scores[:, 0])]
        mean = seen.mean(axis=0).tolist() if len(seen) else None
        judged.append((record, mean, _verdict(mean, record, rules, benchmark.rating)))
    judged.sort(key=lambda it: _RANK[it[2]])  # stable: in file order otherwise
    shown_records = []
    for record, mean, verdict in judged:
        rows = sorted(by_id[record.id], key=lambda row: row.sample)
        shown = not benchmark.private
        texts = [*(turn["content"] for turn in record.turns), *record.responses]
        characters -= sum(map(len, texts)) * shown + sum(
            _SAMPLE + len(r.text) * shown for r in rows
        )
        if characters < 0:
            break
        shown_records.append(
            {
                "id": record.id,
                "section": record.domain,
                "turns": [[turn["role"], turn["content"]] for turn in record.turns if shown],
                "responses": [text if shown else "" for text in record.responses],
                "best": _best(record),
                "verdict": verdict,
                "used": one.method.name,
                "totals": mean,
                "samples": [_sample(row, record, rules, benchmark) for row in rows],
            }
        )
    return shown_records


def _best(record: Preference) -> list[int]:
    if len(record.responses) == 1:
        return [0] if record.labels[0] == 1 else []
    return [i for i, label in enumerate(record.labels) if label == max(record.labels)]


def _verdict(scores: Sequence[float] | None, record: Preference, rules: Rules, rating: bool) -> str:
    """right, wrong, tie, rated or unjudged."""
    if scores is None:
        return "unjudged"
    if len(scores) == 1:
        if rating:
            return "rated"  # only its rank among the other responses counts
        if scores[0] == rules.threshold:
            return "tie"
        return "right" if (scores[0] > rules.threshold) == (record.labels[0] == 1) else "wrong"
    winners = {i for i, score in enumerate(scores) if score == max(scores)}
    best = set(_best(record))
    if winners <= best:
        return "right"
    return "tie" if winners & best else "wrong"


def _sample(
    row: Critique, record: Preference, rules: Rules, benchmark: Benchmark
) -> dict[str, Any]:
    return {
        "index": row.sample,
        "order": list(row.order),
        "scores": None if row.scores is None else list(row.scores),
        "failure": row.failure,
        "meta": row.meta,
        "verdict": _verdict(row.scores, record, rules, benchmark.rating),
        "text": "" if benchmark.private else row.text,
    }
