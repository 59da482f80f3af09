"""The whole SPCT pipeline: SFT, RFT, RL, meta RM, the scalar baseline, and votes of the results.

A stage that is done is skipped, and one that was stopped is resumed, so the same command finishes
an interrupted run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grm_jax import files, stopping
from grm_jax.metrics import clock
from grm_jax.model import storage
from grm_jax.training import meta_rm, rft, rl, scalar_rm, sft
from grm_jax.training.final_evaluation import evaluate_pipeline
from grm_jax.training.heldout import critique_records
from grm_jax.training.options import Pipeline
from grm_jax.training.run import Run
from grm_jax.training.setup import ConfigError

log = logging.getLogger("grm_jax")


def run_spct(run: Run, recipe: Pipeline) -> None:
    """All stages in order, then the evaluation."""
    stages: list[tuple[str, Callable[[], object]]] = [
        ("sft", lambda: sft.run_sft(run, recipe.sft)),
        ("rft", lambda: rft.run_rft(run, recipe.rft)),
        ("rl", lambda: rl.run_rl(run, recipe.rl)),
        ("meta_rm", lambda: meta_rm.run_meta_rm(run, recipe.meta_rm)),
        ("scalar_rm", lambda: scalar_rm.run_scalar_rm(run, recipe.scalar_rm)),
    ]
    check_records(run, recipe)
    times = StageTimes(run.directory / "seconds.json")
    for name, stage in stages:
        done = storage.is_model_dir(run.directory / name / "model")
        with contextlib.nullcontext() if done else times.measure(name):
            stage()
    if run.synthetic:
        with times.measure("evaluation"):
            evaluate_pipeline(run, recipe.evaluation, recipe.scalar_rm.fitting.batch_size)
    else:
        folder = run.directory
        log.info(
            "judge benchmarks with\n    python -m grm_jax.evaluate --bench rewardbench --data DIR "
            "--model %s --meta %s",
            folder,
            folder,
        )
    log.info("time             %s", times)


def check_records(run: Run, recipe: Pipeline) -> None:
    """Before the first stage begins, raise a UserError for what a stage that is not done yet could
    not use: options, or records that it could not learn from or be measured on."""
    checks: list[tuple[str, Callable[[], object]]] = [
        ("rl", lambda: rl.check_options(recipe.rl)),
        ("meta_rm", lambda: _check_start(run, recipe)),
        ("sft", lambda: sft.check_records(run, recipe.sft)),
        ("rft", lambda: rft.usable_records(run, recipe.rft)),
        ("rft", lambda: critique_records(run, "rft", run.records)),
        ("rl", lambda: rl.usable_records(run, recipe.rl)),
        ("rl", lambda: critique_records(run, "rl", run.records)),
        ("meta_rm", lambda: meta_rm.usable_records(run, recipe.meta_rm)),
        ("scalar_rm", lambda: scalar_rm.usable_records(run, recipe.scalar_rm)),
        ("scalar_rm", lambda: scalar_rm.measured_records(run, recipe.scalar_rm)),
    ]
    for name, check in checks:
        if not storage.is_model_dir(run.directory / name / "model"):
            check()


def _check_start(run: Run, recipe: Pipeline) -> None:
    there = storage.is_model_dir(run.directory / "scalar_rm" / "model")
    if recipe.meta_rm.start == "scalar_rm" and not there:
        raise ConfigError(
            "--meta-rm.start scalar_rm: the pipeline trains the meta RM before the scalar RM. Give "
            "another start, or train the scalar RM first, with --config scalar_rm.py and the same "
            "--run-dir"
        )


class StageTimes:
    """Seconds spent on each stage, over all of its starts that did not end with an error. After an
    error nothing is written: the disk may be full, or another command may use the directory.
    """

    def __init__(self, path: Path):
        self._path = path
        self._seconds: dict[str, float] = {}
        if path.exists():
            self._seconds = files.read_json(path)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of what runs inside, also when a signal ends it; not after an error."""
        started = time.perf_counter()
        try:
            yield
        except (stopping.Stopped, KeyboardInterrupt):
            self.add(name, time.perf_counter() - started)
            raise
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        with files.written_whole(self._path) as partial:
            partial.write_text(json.dumps(self._seconds, indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        parts = [f"{name} {clock(seconds)}" for name, seconds in self._seconds.items()]
        return "  ".join([*parts, f"total {clock(sum(self._seconds.values()))}"])
