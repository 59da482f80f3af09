"""The embedded world's road with several seeds: `python experiments/spct/seeds.py --seeds 0 1 2`.

Runs `python -m grm_jax.train --config spct.py` once a seed (resumable), then writes
`experiments/spct/results.json` (figures of each seed, mean, spread, commit, versions, machine),
`table.md`, and copies the first seed's plot. Takes as long as that many roads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
METHODS = (
    "greedy", "sample@1", "vote@4", "vote@8", "vote@16", "vote@32", "meta@8", "meta@16", "meta@32",
    "hybrid@8", "hybrid@32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/seeds")
    """Where the runs go."""
    jobs: int = 1
    """Roads at once; each gets one virtual device and one core if there is more than one."""
    only_collect: bool = False
    """Do not run; collect what is there."""


def main(args: Arguments) -> None:
    if not args.only_collect:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: run(args, seed), args.seeds))
    per_seed: dict[str, Any] = {}
    for seed in args.seeds:
        run_dir = args.runs / str(seed)
        summary = json.loads((run_dir / "evaluation" / "summary.json").read_text())
        summary["seconds"] = json.loads((run_dir / "seconds.json").read_text())
        summary["meta_rm"] = json.loads((run_dir / "meta_rm" / "heldout.json").read_text())
        log = (args.runs / f"{seed}.log").read_text(encoding="utf-8")
        devices = [line for line in log.splitlines() if line.startswith("devices ")]
        summary["devices"] = devices[-1].split(maxsplit=1)[1]
        per_seed[str(seed)] = summary
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    results = {
        "command": f"python experiments/spct/seeds.py --seeds {' '.join(map(str, args.seeds))}"
        f" --jobs {args.jobs}",
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "seeds": per_seed,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (HERE / "table.md").write_text(table(per_seed), encoding="utf-8")
    first = args.runs / str(args.seeds[0]) / "evaluation"
    shutil.copy(first / "accuracy.png", HERE / "accuracy.png")
    print(table(per_seed))


def run(args: Arguments, seed: int) -> None:
    """One road, unless it is finished; its output goes to a log beside it."""
    runs = args.runs
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "grm_jax.train", "--config", "spct.py"]
    command += ["--run-dir", str(runs / str(seed))]
    command += ["--seed", str(seed), "--world.seed", str(seed)]
    if args.jobs > 1:
        command += ["--mesh.cpu-devices", "1"]
        core = args.seeds.index(seed) % (os.cpu_count() or 1)
        command = ["taskset", "-c", str(core), *command]
    with (runs / f"{seed}.log").open("a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log)


def table(per_seed: dict[str, Any]) -> str:
    """Mean over seeds (lowest-highest), in percent, and the paired differences.

    A cell is "-" where a seed does not have the figure, such as one of an earlier version.
    """
    labels = list(next(iter(per_seed.values()))["figures"])
    lines = [f"| model | {' | '.join(METHODS)} |", "|" + "---|" * (len(METHODS) + 1)]
    for label in labels:
        cells = []
        for method in METHODS:
            cells.append(shown([s["figures"][label].get(method) for s in per_seed.values()]))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| paired difference, points | mean over seeds (lowest-highest) |", "|---|---|"]
    for name in dict.fromkeys(name for s in per_seed.values() for name in s["differences"]):
        found = [s["differences"].get(name) for s in per_seed.values()]
        lines.append(f"| {name} | {shown(found)} |")
    for name in ("auc", "auc_within_item", "auc_ties", "auc_decisive"):
        found = [s["meta_rm"].get(name) for s in per_seed.values()]
        cell = "-" if None in found else spread(found)
        lines.append(f"| meta RM, held-out {name} (x100) | {cell} |")
    for stage in ("sft", "rft", "rl"):
        found = [s["audit"][stage]["false_alarm_rate"] for s in per_seed.values()]
        lines.append(f"| false alarms of {stage} | {spread(found)} |")
    for domain in ("combinations", "operands"):
        for judge, method in (("RL, vote@32", "vote@32"), ("RL, hybrid@32", "hybrid@32"),
                              ("the scalar RM", "scalar")):  # fmt: skip
            found = [s["shifted"][domain].get(method) for s in per_seed.values()]
            lines.append(f"| {judge} on unseen {domain} | {shown(found)} |")
    lines += ["", "With 95% intervals:", ""]
    for seed, summary in per_seed.items():
        rl = summary["figures"]["RL"]
        cells = [f"{method} {interval(rl[method])}" for method in METHODS if method in rl]
        lines.append(f"- seed {seed}, RL: {', '.join(cells)}")
        cells = [f"{name} {interval(d, signed=True)}" for name, d in summary["differences"].items()]
        lines.append(f"- seed {seed}, paired: {'; '.join(cells)}")
    return "\n".join(lines) + "\n"


def shown(figures: list[dict[str, float] | None]) -> str:
    """The spread of one figure of all seeds; "-" where one of them does not have it."""
    there = [figure["value"] for figure in figures if figure is not None]
    return spread(there) if len(there) == len(figures) else "-"


def interval(figure: dict[str, float], *, signed: bool = False) -> str:
    """`value [low, high]`, in percent."""
    sign = "+" if signed else ""
    value, low, high = (format(100 * figure[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def spread(values: list[float]) -> str:
    """`mean (low-high)` of fractions, in percent."""
    scaled = [100 * value for value in values]
    return f"{statistics.mean(scaled):.1f} ({min(scaled):.1f} to {max(scaled):.1f})"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
