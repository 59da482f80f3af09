"""SIGKILL in the middle of every stage, resume, compare with the uninterrupted road.

    python experiments/spct/kill_and_resume.py

Runs a small road twice with the same seed: once undisturbed; once killed with SIGKILL as soon as a
stage has made part of its way, and started again with the same command, for every stage. Then
compares the parameters of every stage's model bit by bit, and every logged loss.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from grm_jax.model.storage import load_model

SMALL = [
    "--checkpoint-every", "4", "--log-every", "2", "--world.cold-start", "2000",
    "--world.train", "400", "--world.fresh", "40", "--world.shifted", "8",
    "--sft.fitting.steps", "160", "--rft.records", "384", "--rft.chunk", "64",
    "--rft.fitting.steps", "16", "--rl.steps", "12", "--rl.prompts", "8", "--rl.train-groups", "4",
    "--meta-rm.fitting.steps", "16", "--meta-rm.records", "32", "--scalar-rm.fitting.steps", "24",
    "--evaluation.k", "8",
]  # fmt: skip
# Stage -> a sign that it is in the middle: metrics rows (or, for sampling, trajectories) written.
SIGNS = {
    "sft": ("sft/metrics.jsonl", 6),
    "rft sampling": ("rft/trajectories.jsonl.partial", 300),
    "rft": ("rft/metrics.jsonl", 4),
    "rl": ("rl/metrics.jsonl", 6),
    "meta_rm": ("meta_rm/metrics.jsonl", 4),
    "scalar_rm": ("scalar_rm/metrics.jsonl", 6),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: Path = Path("runs/kill")
    """Where the two runs go; must not exist yet."""


def command(run_dir: Path) -> list[str]:
    start = [sys.executable, "-m", "grm_jax.train", "--config", "spct.py"]
    return [*start, "--run-dir", str(run_dir), *SMALL]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def run_with_kills(run_dir: Path) -> dict[str, str]:
    """Kill the road once in each stage; returns where."""
    killed = {}
    for stage, (file, count) in SIGNS.items():
        process = subprocess.Popen(command(run_dir), stdout=subprocess.DEVNULL)
        while lines(run_dir / file) < count:
            if process.poll() is not None:
                raise RuntimeError(f"{stage} ended before it could be killed")
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed[stage] = f"{lines(run_dir / file)} rows of {file}"
        print(f"killed in {stage}: {killed[stage]}", flush=True)
    subprocess.run(command(run_dir), check=True, stdout=subprocess.DEVNULL)
    return killed


def losses(run_dir: Path, stage: str) -> list[tuple[int, float]]:
    rows = (run_dir / stage / "metrics.jsonl").read_text().split("\n")[:-1]
    return [(json.loads(row)["step"], json.loads(row)["loss"]) for row in rows]


def main(args: Arguments) -> int:
    whole, broken = args.runs / "whole", args.runs / "killed"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    run_with_kills(broken)
    same = True
    for stage in ("sft", "rft", "rl", "meta_rm", "scalar_rm"):
        a, b = (load_model(root / stage / "model")[1] for root in (whole, broken))
        equal = all(
            np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        logged = losses(whole, stage) == losses(broken, stage)
        print(f"{stage:10} parameters identical: {equal}   logged losses identical: {logged}")
        same &= equal and logged
    figures = [
        json.loads((root / "evaluation" / "summary.json").read_text())["figures"]
        for root in (whole, broken)
    ]
    print(f"final figures identical: {figures[0] == figures[1]}")
    return 0 if same and figures[0] == figures[1] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
