"""How long commands take before they do what they were started for.

    python experiments/startup.py --judge runs/tiny/rl/model --rewardbench DATA

    COMMAND --help                        until it ends
    evaluate --judge longer               until it ends, on RewardBench's 2,985 records; "reading
                                          the file" is this process without the interpreter
    train --config sft.py, rl.py          until the first step is in metrics.jsonl
    judge, one query                      until it ends

Training and judging are started with an empty folder of compiled programs, and then the same
command again: training is stopped after some steps, which have compiled its programs, by SIGTERM,
and resumed. Seconds, medians of `--repeats`. Writes startup.md beside this file.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
STEPS = 20  # of a first start, so that a batch of each length has been seen
COMMANDS = ("train", "evaluate", "judge", "serve", "convert", "plan")


@dataclasses.dataclass(frozen=True)
class Arguments:
    judge: Path
    """A trained model of the embedded world. RL starts from it, too."""
    rewardbench: Path | None = None
    """The folder of benchmark files, as of `evaluate --data`."""
    repeats: int = 5


def main(args: Arguments) -> None:
    rows: list[tuple[str, list[float]]] = []
    for name in COMMANDS:
        command = ["-m", f"grm_jax.{name}", "--help"]
        rows.append((f"`{name} --help`", [ended(command) for _ in range(args.repeats)]))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.rewardbench is not None:
            command = ["-m", "grm_jax.evaluate", "--bench", "rewardbench", "--judge", "longer"]
            command += ["--data", str(args.rewardbench), "--output"]
            seconds = [ended([*command, str(scratch / f"e{i}")]) for i in range(args.repeats)]
            rows.append(("`evaluate --judge longer`, RewardBench", seconds))
            code = (
                "import sys, time; from grm_jax.benchmarks import BENCHMARKS; "
                "from grm_jax.benchmarks.sources import locate; from pathlib import Path; "
                "b = BENCHMARKS['rewardbench']; started = time.perf_counter(); "
                "list(b.load(locate(b, Path(sys.argv[1]), None, strict=False))); "
                "print(time.perf_counter() - started)"
            )
            read = [float(output(["-c", code, str(args.rewardbench)])) for _ in range(args.repeats)]
            rows.append(("of it, reading the file", read))
        for name in ("sft", "rl"):
            found = [started(args, name, scratch / f"{name}{i}") for i in range(args.repeats)]
            for which, seconds in zip(("first", "second"), zip(*found, strict=True), strict=True):
                rows.append((f"`train --config {name}.py`, first step, {which} start",
                             list(seconds)))  # fmt: skip
        query = ["--query", " larger 1 2 in kg greet anna", "--response", " anna 2 kg"]
        command = ["-m", "grm_jax.judge", "--model", str(args.judge), *query]
        command += ["--response", " anna 1 kg", "-k", "8"]
        both = [[ended(command, scratch / f"j{i}") for _ in (0, 1)] for i in range(args.repeats)]
        for which, seconds in zip(("first", "second"), zip(*both, strict=True), strict=True):
            rows.append((f"`judge`, one query, {which} start", list(seconds)))
    lines = ["| | seconds |", "| :--- | ---: |"]
    lines += [f"| {name} | {statistics.median(seconds):.1f} |" for name, seconds in rows]
    (HERE / "startup.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def environment(programs: Path | None = None) -> dict[str, str]:
    found = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return found | ({} if programs is None else {"JAX_COMPILATION_CACHE_DIR": str(programs)})


def ended(command: Sequence[str], programs: Path | None = None) -> float:
    """Seconds until `python COMMAND` has ended."""
    before = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, env=environment(programs)
    )
    return time.perf_counter() - before


def output(command: Sequence[str]) -> str:
    return subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=environment()
    ).stdout


def started(args: Arguments, name: str, folder: Path) -> list[float]:
    """Seconds until the first step of a new training, and of the same command again."""
    command = [sys.executable, "-m", "grm_jax.train", "--config", f"{name}.py"]
    command += ["--run-dir", str(folder / "run"), "--log-every", "1"]
    command += ["--init", str(args.judge)] if name != "sft" else []
    return [
        first_step(command, folder / "run" / name, folder / "programs", steps)
        for steps in (STEPS, 1)
    ]


def first_step(command: Sequence[str], stage: Path, programs: Path, steps: int) -> float:
    """Seconds until the first step's metrics are written; training goes on until `steps` are."""
    metrics, before = stage / "metrics.jsonl", time.perf_counter()
    rows = count(metrics)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(programs)
    )
    try:
        for wanted in (1, steps):
            while count(metrics) < rows + wanted:
                if process.poll() is not None:
                    raise SystemExit(f"error: this ended with {process.returncode}: {command}")
                time.sleep(0.02)
            if wanted == 1:
                seconds = time.perf_counter() - before
        return seconds
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def count(metrics: Path) -> int:
    """How many rows the file has; 0 where there is none."""
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
