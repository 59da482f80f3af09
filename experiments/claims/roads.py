"""The runs behind the claims: one pipeline a seed, and what starts from its models.

    RUNS/SEED           python -m grm_jax.train --config spct.py: every stage, and its evaluation
    RUNS/SEED-BRANCH    one stage again with other options; the others are links to RUNS/SEED
    RUNS/*/judged       critiques that `python -m grm_jax.evaluate` keeps

Commands are those that a user types. One whose result is there is not run again, and one that was
stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from grm_jax.model.storage import is_model_dir

STAGES = ("sft", "rft", "rl", "scalar_rm", "meta_rm")  # each starts from some before it


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs share."""

    runs: Path = Path("runs/claims")
    """Where the runs go."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One pipeline each."""
    k: int = 32
    """The most critiques of a record."""
    options: tuple[str, ...] = ("--compute-dtype", "bfloat16", "--mesh.cpu-devices", "1")
    """Further options of each training command."""
    dry: bool = False
    """Print the commands that are missing, and run none."""


@dataclasses.dataclass(frozen=True)
class Road:
    """The runs of one seed."""

    settings: Settings
    seed: int

    @property
    def directory(self) -> Path:
        """The directory of the pipeline."""
        return self.settings.runs / str(self.seed)

    @property
    def world(self) -> Path:
        """The directory of the embedded world's files."""
        return self.directory / "world"

    def pipeline(self) -> None:
        """All stages and the evaluation at their end."""
        if not (self.directory / "evaluation" / "summary.json").exists():
            self._train("spct.py", self.directory)

    def branch(self, name: str, stage: str, *options: str) -> Path:
        """A stage trained with other options, from the pipeline's models; returns its run
        directory, in which all other stages are links to the pipeline's."""
        directory = self.settings.runs / f"{self.seed}-{name}"
        if not is_model_dir(directory / stage / "model"):
            directory.mkdir(parents=True, exist_ok=True)
            for part in ("world", *STAGES[: STAGES.index(stage)]):
                link = directory / part
                if not link.is_symlink():
                    link.symlink_to((self.directory / part).resolve(), target_is_directory=True)
            self._train(f"{stage}.py", directory, *options)
        return directory

    def judged(self, model: Path, *, meta: Path | None = None, k: int | None = None) -> Path:
        """The samples of a model on the held-out records of the world: samples.jsonl.

        Args:
          model: the directory of a stage, such as RUNS/0/rl.
          meta: the run of a meta RM whose scores the samples get.
        """
        count = self.settings.k if k is None else k
        folder = (
            model.parent
            / "judged"
            / "-".join([model.name, str(count), *([] if meta is None else [meta.name])])
        )
        file = folder / "synthetic" / "samples.jsonl"
        if not file.exists():
            command = [
                "-m", "grm_jax.evaluate", "--bench", "synthetic", "--data", str(self.directory),
                "--model", str(model), "-k", str(count), "--probes", "0", "--resamples", "200",
                "--seed", str(self.seed), "--output", str(folder),
                "--cache", str(self.directory / "evaluation" / "cache"),
                "--compute-dtype", "bfloat16",
            ]  # fmt: skip
            self._run([*command, *([] if meta is None else ["--meta", str(meta)])])
        return file

    def verdicts(self, stage: str) -> Path:
        """Verdicts of a stage's model on the held-out records, with the expected scores of each
        critique: what `python -m grm_jax.judge` writes."""
        file = self.directory / "judged" / f"{stage}-expected-{self.settings.k}.jsonl"
        if not file.with_suffix(".done").exists():
            self._run(
                [
                    "-m", "grm_jax.judge", "--model", str(self.directory / stage / "model"),
                    "--input", str(self.world / "heldout.jsonl"), "--output", str(file),
                    "-k", str(self.settings.k), "--seed", str(self.seed), "--expected",
                    "--compute-dtype", "bfloat16",
                ]
            )  # fmt: skip
            if not self.settings.dry:
                file.with_suffix(".done").touch()
        return file

    def _train(self, recipe: str, directory: Path, *options: str) -> None:
        seed = str(self.seed)
        command = ["-m", "grm_jax.train", "--config", recipe, "--run-dir", str(directory)]
        command += ["--seed", seed, "--world.seed", seed, *self.settings.options, *options]
        self._run(command)

    def _run(self, command: Sequence[str]) -> None:
        print(shlex.join(["python", *command]), flush=True)
        if not self.settings.dry:
            subprocess.run([sys.executable, *command], check=True)
