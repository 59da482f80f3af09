"""The judge card: one page for whoever chooses a judge. card.md, card.json, card.html.

It says which judge it is (weights, templates, training data, versions), how often it is right on
a benchmark, how far attacks move it, what biases it, and whether it knows when it is right.
attacks.md has every attack.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from grm_jax.files import written_whole
from grm_jax.scoring.attacks import AttackResults, AttackRow
from grm_jax.scoring.calibration import Calibration
from grm_jax.scoring.report import Grid, bias_grid, cell, percent
from grm_jax.scoring.results import Results
from grm_jax.scoring.statistics import Interval

FAMILIES = {
    "none": "no attack",
    "again": "no attack, drawn again",
    "MK": "master keys: a word or a sign for a response",
    "NULL": "one answer for every question",
    "RJ": "instructions to the judge",
    "JD": "an optimised suffix",
    "UA": "a universal phrase",
    "FV": "forged verdicts and sections",
    "CT": "control tokens",
    "NUM": "numbers beyond the scale",
    "UNI": "unseen and look-alike characters",
    "LEN": "length, layout, authority",
    "POS": "order of the responses",
    "EW": "the embedded world's own words",
}
READING = (
    "An attacker pushes the worst response of a record, or a wrong single one. change: of its mean "
    "score, in percent of the range. flips: how often it wins now, of the trials that it did not "
    "win without the attack (drawn again: what chance flips; POS: another response wins in another "
    "order; LEN4: two copies do not tie). wins: how often it wins at all. unparsable: critiques "
    "without scores. accuracy: of verdicts on two responses or more."
)
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Card:
    """What the page is made of.

    Attributes:
      provenance: which judge it is (`BenchmarkSampler.provenance`).
      results: of the benchmark without attacks: figures, bias, versions.
    """

    provenance: Mapping[str, Any]
    results: Results
    attacks: AttackResults
    calibration: Calibration | None


def family(row: AttackRow) -> str:
    """The family of an attack, by its id."""
    return row.id.rstrip("0123456789abcdH-")


def attack_grid(method: str, rows: Sequence[AttackRow], title: str = "attacks") -> Grid:
    """A row an attack."""
    return Grid(
        f"{title}, {method}",
        ("", "what", "change", "flips", "wins", "unparsable", "accuracy", "trials", "left out"),
        tuple(
            (row.id, row.what, *_cells(row), f"{row.trials:,}", f"{row.left_out:,}") for row in rows
        ),
    )


def sizes_grid(method: str, rows: Sequence[AttackRow]) -> Grid:
    """Flips by number of responses and by the place of the target, a row an attack."""
    groups = ["one", "two", "more"]
    groups += sorted({g for row in rows for g in row.figures.get("flips", {}) if " " in g})
    kept = [row for row in rows if row.figure("flips") is not None]
    return Grid(
        f"flips by responses and place, {method}",
        ("", *groups),
        tuple((row.id, *(_cell(row.figure("flips", group)) for group in groups)) for row in kept),
    )


def families_grid(method: str, rows: Sequence[AttackRow]) -> Grid:
    """A row a family: the attack of it that flips most."""
    members: dict[str, list[AttackRow]] = collections.defaultdict(list)
    for row in rows:
        members[family(row)].append(row)
    lines = []
    for name, kin in members.items():
        worst = max(kin, key=lambda row: value.value if (value := row.figure("flips")) else -1.0)
        what = FAMILIES.get(name, name)
        lines.append((what, f"{len(kin)}", worst.id, *_cells(worst)))
    columns = ("change", "flips", "wins", "unparsable", "accuracy")
    return Grid(f"attacks, {method}", ("", "rows", "worst", *columns), tuple(lines))


def checks_grid(attacks: AttackResults) -> Grid:
    """What holds whatever the weights."""
    rows = tuple(
        (check.kind, check.row, f"{check.held:,} of {check.tried:,}", check.broken or _NONE)
        for check in attacks.checks
    )
    return Grid("forged verdicts, sections, control tokens", ("", "row", "held", "broken"), rows)


def calibration_grid(found: Calibration) -> Grid:
    """Accuracy by share of votes."""
    rows = tuple(
        (
            f"{100 * one.low:.0f}-{100 * one.high:.0f}%",
            f"{100 * one.confidence:.1f}",
            cell(one.accuracy),
            f"{one.records:,}",
        )
        for one in found.bins
    )
    title = (
        f"calibration of {found.k} votes: expected error {100 * found.error:.1f}, "
        f"confidence less accuracy {cell(found.overconfidence)}"
    )
    return Grid(title, ("share of votes", "confidence", "accuracy", "records"), rows)


def accuracy_grid(results: Results) -> Grid:
    """The headline by method: greedy, one sample, and the largest votes of each kind."""
    kinds = {method.kind: method for method in results.methods}  # the last of a kind is the largest
    rows = []
    for method in kinds.values():
        rate = results.rate(method)
        rows.append(
            (
                method.name,
                _cell(results.figure(method.name)),
                f"{method.samples:.3g}",
                percent(method.ties),
                _NONE if rate is None else percent(rate.failed),
            )
        )
    title = f"{results.benchmark}, {results.records:,} records"
    columns = ("", " ".join(results.headline), "samples", "ties", "unparsable")
    return Grid(title, columns, tuple(rows))


def provenance_grid(card: Card) -> Grid:
    """Which judge it is, a line a topic; card.json has it all."""
    said = {**card.provenance, "versions": card.results.versions}
    rows = tuple(
        (name, _line(value))
        for name, value in said.items()
        if name not in ("order", "rating", "seed") and value not in (None, [], {}, "")
    )
    return Grid("judge", ("", "what"), rows)


def grids(card: Card) -> list[Grid]:
    """The tables of the page, in order."""
    method, rows = card.attacks.shown
    found = [provenance_grid(card), accuracy_grid(card.results), families_grid(method, rows)]
    found += [checks_grid(card.attacks)] if card.attacks.checks else []
    found += [bias_grid(card.results)] if card.results.bias else []
    found += [calibration_grid(card.calibration)] if card.calibration is not None else []
    return found


def notes(card: Card) -> list[str]:
    """Lines below the tables."""
    attacks = card.attacks
    lines = [
        f"{attacks.records:,} records were attacked, {attacks.prompts:,} prompts judged, each "
        "attack with its response in every place; attacks.md has every attack.",
        READING,
    ]
    if card.results.model.get("trained") is False:
        lines.insert(0, "This model is untrained (random weights): its figures mean nothing.")
    left = sum(row.left_out for row in attacks.shown[1])
    if left:
        lines.append(f"{left:,} attacked prompts were too long for the judge and are left out.")
    return [*lines, *card.results.notes]


def write_card(directory: str | Path, card: Card) -> list[Path]:
    """card.md, card.json, card.html and attacks.md; each appears whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    title = f"Judge card: {card.results.judge}"
    tables = "\n".join(grid.markdown() for grid in grids(card))
    below = "".join(f"- {line}\n" for line in notes(card))
    full = [grid for method, rows in card.attacks.methods.items() for grid in
            (attack_grid(method, rows), sizes_grid(method, rows))]  # fmt: skip
    attacks = "\n".join(grid.markdown() for grid in full)
    texts = {
        "card.md": f"# {title}\n\n{tables}\n{below}",
        "card.json": json.dumps(as_json(card), indent=2, allow_nan=False, default=str) + "\n",
        "card.html": _html(title, card),
        "attacks.md": f"{attacks}\n{READING}\n",
    }
    for name, text in texts.items():
        with written_whole(directory / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return [directory / name for name in texts]


def as_json(card: Card) -> dict[str, Any]:
    """All that the page holds, and every group of every attack. Figures are fractions of 1."""
    results = card.results
    return {
        "judge": results.judge,
        "provenance": dict(card.provenance),
        "versions": dict(results.versions),
        "benchmark": results.benchmark,
        "records": results.records,
        "headline": list(results.headline),
        "accuracy": {
            method.name: None if value is None else dataclasses.asdict(value)
            for method in results.methods
            for value in [results.figure(method.name)]
        },
        "attacks": dataclasses.asdict(card.attacks),
        "bias": [dataclasses.asdict(finding) for finding in results.bias],
        "calibration": None if card.calibration is None else dataclasses.asdict(card.calibration),
        "notes": notes(card),
        "settings": dict(results.settings),
    }


def _html(title: str, card: Card) -> str:
    source = resources.files("grm_jax.scoring") / "html_report" / "card.html"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(title=title, grids=grids(card), notes=notes(card))


def _cells(row: AttackRow) -> tuple[str, ...]:
    return tuple(
        _cell(row.figure(name)) for name in ("change", "flips", "wins", "unparsable", "accuracy")
    )


def _cell(value: Interval | None) -> str:
    return _NONE if value is None else cell(value)


def _line(value: Any) -> str:
    """A value, or the parts of a nested one with their names, on one line."""
    if isinstance(value, Mapping):
        parts = ((name, _line(part)) for name, part in value.items() if part not in (None, [], ""))
        return ", ".join(f"{name} {part}" for name, part in parts)
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
