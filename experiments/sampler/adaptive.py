"""Samples saved by adaptive k, from the saved samples of a road on the embedded world.

    python experiments/sampler/adaptive.py --run runs/tiny

Takes the RL model's 32 samples a held-out record in the order in which they were drawn, stops each
record where `critique.decided` says so, and compares accuracy with voting over all 32, for a range
of bounds. Writes adaptive.json, adaptive.md and adaptive.png.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from grm_jax.benchmarks import synthetic
from grm_jax.critique import credit, decided, vote
from grm_jax.data.critiques import read_critiques
from grm_jax.data.preferences import Preference
from grm_jax.scoring.statistics import mean_interval

HERE = Path(__file__).resolve().parent
BOUNDS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2)
THRESHOLD = 0.5  # single responses of the embedded world are scored 0 or 1


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path = Path("runs/tiny")
    k: int = 32


def main(args: Arguments) -> None:
    matplotlib.use("Agg")
    records = [r for r in synthetic.BENCHMARK.load(args.run) if r.domain == synthetic.FRESH]
    samples: dict[str, dict[int, tuple[float, ...] | None]] = {r.id: {} for r in records}
    for row in read_critiques(args.run / "evaluation" / "rl.jsonl"):
        if not row.greedy:
            samples[row.example_id][row.sample] = row.scores
    drawn = {id: [found[i] for i in range(args.k)] for id, found in samples.items()}
    full = [earned(record, drawn[record.id]) for record in records]
    rows = []
    for bound in BOUNDS:
        used = [stop(record, drawn[record.id], bound) for record in records]
        credits = [
            earned(record, drawn[record.id][:m]) for record, m in zip(records, used, strict=True)
        ]
        difference = mean_interval([a - b for a, b in zip(credits, full, strict=True)])
        accuracy = mean_interval(credits)
        rows.append(
            {
                "bound": bound,
                "saved": 1.0 - float(np.mean(used)) / args.k,
                "accuracy": vars(accuracy),
                "difference": vars(difference),
            }
        )
    fixed = [
        {"k": k, **vars(mean_interval([earned(r, drawn[r.id][:k]) for r in records]))}
        for k in (1, 2, 4, 8, 16, 24, 32)
    ]
    results = {"run": "a road on the embedded world", "records": len(records)}
    results |= {"adaptive": rows, "fixed": fixed}
    (HERE / "adaptive.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    lines = ["| bound | samples saved | accuracy | against vote@32 |"]
    lines += ["| ---: | ---: | ---: | ---: |"]
    for row in rows:
        a, d = row["accuracy"], row["difference"]
        lines.append(
            f"| {row['bound']} | {100 * row['saved']:.0f}% "
            f"| {100 * a['value']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}] "
            f"| {100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}] |"
        )
    text = "\n".join(lines) + "\n"
    (HERE / "adaptive.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, fixed, args.k)


def as_pairs(record: Preference, scores: list) -> tuple[list, float]:
    """Scores to decide on, and their span: a single response against its threshold."""
    if len(record.responses) > 1:
        return scores, 9.0
    return [None if s is None else (s[0], THRESHOLD) for s in scores], 1.0


def stop(record: Preference, scores: list, bound: float) -> int:
    """After how many samples this record is decided."""
    pairs, span = as_pairs(record, scores)
    for m in range(1, len(scores)):
        if decided(pairs[:m], len(scores) - m, bound, span=span):
            return m
    return len(scores)


def earned(record: Preference, scores: list) -> float:
    return credit(vote(scores), record.labels, THRESHOLD)


def plot(rows: list[dict], fixed: list[dict], k: int) -> None:
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    series = (
        ([f["k"] for f in fixed], fixed, "o-", "fixed k"),
        ([(1 - r["saved"]) * k for r in rows], [r["accuracy"] for r in rows], "s-", "adaptive k"),
    )
    for x, found, style, label in series:
        y = np.asarray([100 * f["value"] for f in found])
        low, high = (np.asarray([100 * f[side] for f in found]) for side in ("low", "high"))
        axes.errorbar(x, y, yerr=[y - low, high - y], fmt=style, label=label, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("samples a record, on average")
    axes.set_ylabel("accuracy, %")
    axes.legend()
    figure.savefig(HERE / "adaptive.png", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
