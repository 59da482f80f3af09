"""A small road, undisturbed; copies of it to break; what is the same afterwards."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import table

from grm_jax.checkpoint import damage
from grm_jax.model.storage import load_model

STAGES = ("sft", "rft", "rl", "meta_rm", "scalar_rm")
SETUP = [
    "--log-every", "2", "--world.cold-start", "400", "--world.train", "560", "--world.fresh", "40",
    "--world.shifted", "8", "--mesh.cpu-devices", "1",
]  # fmt: skip
OF_STAGE = {
    "sft": ["--sft.fitting.steps", "120", "--sft.fitting.batch-size", "16"],
    "rft": [
        "--rft.records", "160", "--rft.chunk", "32", "--rft.fitting.steps", "24",
        "--rft.fitting.batch-size", "8",
    ],
    "rl": ["--rl.steps", "12", "--rl.prompts", "8", "--rl.train-groups", "8"],
    "meta_rm": [  # three chunks: 256 records are sampled between two writes
        "--meta-rm.records", "520", "--meta-rm.fitting.steps", "24",
        "--meta-rm.fitting.batch-size", "8",
    ],
    "scalar_rm": ["--scalar-rm.fitting.steps", "24", "--scalar-rm.fitting.batch-size", "8"],
}  # fmt: skip
LAST = "24.files.json"  # the last checkpoint's list, of the meta RM and the scalar RM
# Files that sampling appends to -> (rows of a chunk, the file that they become).
CHUNKED = {
    "rft/trajectories.jsonl.partial": (32 * 4, "rft/trajectories.jsonl"),
    "meta_rm/samples.jsonl.partial": (256 * 3, "meta_rm/samples.jsonl"),
}
PHASES = (
    "sft", "rft sampling", "rft", "rl", "meta_rm sampling", "meta_rm", "meta_rm validation",
    "scalar_rm", "scalar_rm calibration", "evaluation",
)  # fmt: skip


def command(stage: str, run_dir: Path, *more: str) -> list[str]:
    """Of one stage, or of the whole road: "spct"."""
    every = "8" if stage in ("sft", "spct") else "2"
    start = [sys.executable, "-m", "grm_jax.train", "--config", f"{stage}.py"]
    whole = [*itertools.chain.from_iterable(OF_STAGE.values()), "--evaluation.k", "4"]
    own = OF_STAGE.get(stage, whole)
    return [
        *start, "--run-dir", str(run_dir), "--checkpoint-every", every, *SETUP, *own, *more,
    ]  # fmt: skip


def start(stage: str, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(stage, run_dir, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for its end. A process that hangs is killed; its exit code says so (-9)."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(
    stage: str, run_dir: Path, *more: str, under: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Args: under: words before the command, such as `prlimit` with a limit."""
    return subprocess.run(
        [*under, *command(stage, run_dir, *more)], capture_output=True, text=True, check=False
    )


def phase(run_dir: Path, since: float = 0.0) -> str:
    """What a road is doing, by its files; "starting" until a process that was started at `since`
    (of the clock of files) has begun with it.
    """
    stage = next((s for s in STAGES if not (run_dir / s / "model").is_dir()), "")
    if not stage:
        begun = _newest((run_dir / "evaluation").glob("cache/*/about.json"))
        ended = _newest([run_dir / "evaluation" / "summary.json"])
        return "done" if ended > since else "evaluation" if begun > since else "starting"
    if _newest([run_dir / stage / "config.json"]) <= since:
        return "starting"
    sampled = {"rft": "trajectories.jsonl", "meta_rm": "samples.jsonl"}.get(stage)
    if sampled and not (run_dir / stage / sampled).exists():
        return f"{stage} sampling"
    trained = (run_dir / stage / "checkpoints" / LAST).exists()
    after = {"meta_rm": "validation", "scalar_rm": "calibration"}.get(stage)
    return f"{stage} {after}" if trained and after else stage


def _newest(files: Any) -> float:
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> bool:
    """Wait until something is so; False when the process ends before."""
    while process.poll() is None:
        if ready():
            return True
        time.sleep(0.005)
    return False


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether it has set a handler for SIGTERM; Python needs a moment to come so far (Linux)."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command says; with two exclamation marks, what else it says."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.stdout:
        return lines[0]
    return "!! " + " / ".join(lines)[:400]


def leaves(model: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_model(model)[1])]


def whole_checkpoints(stage: Path) -> set[str]:
    """Steps of the checkpoints that are listed and as their lists say."""
    folder = stage / "checkpoints"
    lists = [path for path in folder.glob("*.files.json") if path.name[0].isdigit()]
    steps = {path.name.split(".")[0]: path for path in lists}
    return {step for step, path in steps.items() if not damage(folder / step, path)}


def kept(run_dir: Path) -> dict[str, bytes]:
    """What sampling has on disk: whole chunks of its files, whole lines of the evaluation's."""
    found = {}
    for name, (rows, _) in CHUNKED.items():
        if (run_dir / name).exists():
            lines = (run_dir / name).read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            found[name] = b"".join(whole[: len(whole) // rows * rows])
    for file in run_dir.glob("evaluation/cache/*/samples.jsonl"):
        blob = file.read_bytes()
        found[str(file.relative_to(run_dir))] = blob[: blob.rfind(b"\n") + 1]
    return found


def lost(run_dir: Path, before: Sequence[dict[str, bytes]]) -> list[str]:
    """Files of a finished road that do not begin with what was kept of them at some moment, and
    caches that hold a sample twice.
    """
    wrong = []
    for held in before:
        for name, blob in held.items():
            file = run_dir / CHUNKED.get(name, (0, name))[1]
            if not file.read_bytes().startswith(blob):
                wrong.append(f"{name} was sampled again")
    for file in run_dir.glob("evaluation/cache/*/samples.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if len({(row["record"], row["sample"]) for row in rows}) < len(rows):
            wrong.append(f"{file.parent.name} holds samples twice")
    return wrong


class Faults:
    """The undisturbed road, and copies of it to break.

    Attributes:
      seconds: of each phase of it, and of "starting".
      kills: how often each stage is killed.
    """

    def __init__(self, runs: Path, kills: int, seed: int):
        self.runs, self.kills = runs.absolute(), kills
        self.clean = self.runs / "clean"
        self.random = random.Random(seed)
        self.commit = table.commit()
        note = self.runs / "seconds.json"
        if note.exists():
            about = json.loads(note.read_text())
            if about["commit"] != self.commit:
                raise SystemExit(f"{runs} has a road of {about['commit']}; give another --runs")
            self.seconds: dict[str, float] = about["seconds"]
        else:
            for _ in range(2):  # the second time with compiled programs, as in what follows
                shutil.rmtree(self.clean, ignore_errors=True)
                self.seconds = self._undisturbed()
            note.write_text(json.dumps({"commit": self.commit, "seconds": self.seconds}))
        shown = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        print(f"undisturbed: {shown}", flush=True)
        self._expected = {stage: leaves(self.clean / stage / "model") for stage in STAGES}

    def _undisturbed(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        # To files: nobody reads pipes here.
        with (self.runs / "clean.log").open("w") as log:
            process = subprocess.Popen(command("spct", self.clean), stdout=log, stderr=log)
            now, since = "starting", time.perf_counter()
            while process.poll() is None:
                if (after := phase(self.clean)) != now:
                    seconds[now] = time.perf_counter() - since
                    now, since = after, time.perf_counter()
                time.sleep(0.005)
        if process.returncode:
            raise SystemExit((self.runs / "clean.log").read_text())
        return seconds

    def of_stage(self, stage: str) -> float:
        """Seconds that a stage's own command takes."""
        parts = [value for name, value in self.seconds.items() if name.split()[0] == stage]
        return self.seconds["starting"] + sum(parts)

    def fresh(self, stage: str, run_dir: Path | None = None) -> Path:
        """A run directory in which all stages before this one are done; `run_dir`: an empty one."""
        if run_dir is None:
            run_dir = self.runs / "broken"
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir(parents=True)
        for name in ("world", *STAGES[: STAGES.index(stage)]):
            shutil.copytree(self.clean / name, run_dir / name)
        return run_dir

    def begun(self, stage: str, run_dir: Path | None = None) -> Path:
        """The same with a stage that was stopped in the middle of its steps: it has checkpoints."""
        run_dir = self.fresh(stage, run_dir)
        process = start(stage, run_dir)
        if until(process, lambda: len(whole_checkpoints(run_dir / stage)) > 1):
            process.terminate()
        done = finish(process)
        assert done.returncode == 0 and whole_checkpoints(run_dir / stage), done.stderr
        return run_dir

    def same(self, stage: str, run_dir: Path) -> bool:
        """Whether the stage's model has the undisturbed run's bits."""
        if not (run_dir / stage / "model").is_dir():
            return False
        found = leaves(run_dir / stage / "model")
        return all(
            a.dtype == b.dtype and np.array_equal(a, b)
            for a, b in zip(found, self._expected[stage], strict=True)
        )

    def differs(self, run_dir: Path) -> list[str]:
        """What of a whole road is not as in the undisturbed one."""
        wrong = [f"the model of {stage}" for stage in STAGES if not self.same(stage, run_dir)]
        for name in ("sft.jsonl", "rft.jsonl", "rl.jsonl", "rl_shifted.jsonl", "summary.json"):
            one, other = (root / "evaluation" / name for root in (self.clean, run_dir))
            if not other.exists() or one.read_bytes() != other.read_bytes():
                wrong.append(f"evaluation/{name}")
        return wrong

    def add(self, fault: str, stage: str, outcome: str, good: bool) -> None:
        outcome = outcome.replace(str(self.runs), "RUNS").replace(os.getcwd(), ".")
        print(f"{'ok  ' if good else 'BAD '} {fault}, {stage}: {outcome}", flush=True)
        table.add({
            "fault": fault, "stage": stage, "outcome": outcome, "good": good,
            "commit": self.commit,
        })  # fmt: skip
