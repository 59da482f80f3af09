"""The embedded world's road in bfloat16 beside the float32 one.

    python experiments/dtypes/road.py

Runs `python -m grm_jax.train --config spct.py --compute-dtype bfloat16` once a seed (resumable), on
one core as `experiments/spct/seeds.py` did in float32, whose `results.json` it compares with.
Writes `experiments/dtypes/road.json` and `road.md`: the difference of each accuracy, paired by
seed, with a 95% t interval over the seeds, and the gap between the log-probabilities of sampler and
trainer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
from scipy.stats import t as student

from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
FLOAT32 = HERE.parent / "spct" / "results.json"
METHODS = ("greedy", "sample@1", "vote@8", "vote@32", "meta@32")


@dataclasses.dataclass(frozen=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/bfloat16")
    """Where the runs go."""


def main(args: Arguments) -> None:
    for seed in args.seeds:
        command = [sys.executable, "-m", "grm_jax.train", "--config", "spct.py"]
        command += ["--run-dir", str(args.runs / str(seed)), "--compute-dtype", "bfloat16"]
        command += ["--seed", str(seed), "--world.seed", str(seed), "--mesh.cpu-devices", "1"]
        subprocess.run(["taskset", "-c", "0", *command], check=True)
    before = json.loads(FLOAT32.read_text())
    found: dict[str, dict[str, list[float]]] = {}
    gaps: list[float] = []
    for seed in args.seeds:
        run = args.runs / str(seed)
        figures = json.loads((run / "evaluation" / "summary.json").read_text())["figures"]
        for model, theirs in before["seeds"][str(seed)]["figures"].items():
            for method in METHODS:
                if theirs.get(method) and figures[model].get(method):
                    change = figures[model][method]["value"] - theirs[method]["value"]
                    found.setdefault(model, {}).setdefault(method, []).append(100 * change)
        lines = (run / "rl" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        gaps.append(statistics.median(row["logprob_gap"] for row in steps if "logprob_gap" in row))
    results: dict[str, Any] = {
        "command": " ".join(["python", "experiments/dtypes/road.py", *sys.argv[1:]]),
        "float32": before["commit"], "versions": versions(), "points": found,
        "median logprob_gap": gaps,
    }  # fmt: skip
    (HERE / "road.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (HERE / "road.md").write_text(table(found, gaps, before["commit"]), encoding="utf-8")


def table(found: dict[str, dict[str, list[float]]], gaps: list[float], commit: str) -> str:
    lines = [f"| model | {' | '.join(METHODS)} |", "|" + "---|" * (len(METHODS) + 1)]
    for model, methods in found.items():
        cells = [_cell(methods[name]) if name in methods else "-" for name in METHODS]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    gap = ", ".join(f"{value:.1e}" for value in gaps)
    return "\n".join(lines) + (
        f"\n\nPoints of accuracy in bfloat16 minus float32 (commit {commit}), mean over "
        f"{len(gaps)} seeds with a 95% t interval, paired by seed. Median gap between the "
        f"log-probabilities of sampler and trainer in RL: {gap}.\n"
    )


def _cell(values: list[float]) -> str:
    mean = statistics.mean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
