"""The runs behind the claims: one pipeline a seed, and what starts from its models.

    RUNS/SEED           python -m grm_jax.train --config spct.py: every stage, and its evaluation
    RUNS/SEED-BRANCH    one stage again with other options; the others are links to RUNS/SEED
    RUNS/*/judged       critiques that `python -m grm_jax.evaluate` keeps

Commands are those that a user types. One whose result is there is not run again, and one that was
stopped goes on where it was. With another size than `tiny` the same commands train a pretrained
model on preferences of yours, and judge held-out records of yours.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax import recipes
from grm_jax.benchmarks import synthetic
from grm_jax.data.preferences import Preference, read_preferences
from grm_jax.errors import UserError
from grm_jax.files import written_whole
from grm_jax.model.config import TINY_SIZES
from grm_jax.model.storage import is_model_dir

STAGES = ("sft", "rft", "rl", "scalar_rm", "meta_rm")  # each starts from some before it
_shown: set[str] = set()  # commands that --dry or --plan has shown


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs share."""

    runs: Path = Path("runs/claims")
    """Where the runs go."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One pipeline each."""
    k: int = 32
    """The most critiques of a record."""
    config: str = "spct.py"
    """The recipe of the pipeline. With a size, such as spct.py:27b, the branches have it, too."""
    heldout: Path | None = None
    """Preferences with labels, on which judges are compared; None: the embedded world's."""
    options: str = "--compute-dtype bfloat16 --mesh.cpu-devices 1"
    """Further options of each training command: --options="--base MODEL --preferences FILE"."""
    plan: str | None = None
    """Only ask `python -m grm_jax.plan` whether the training commands fit this topology, such as
    v5p:2x2x4 or h100:64."""
    dry: bool = False
    """Print the commands that are missing, and run none."""

    @property
    def size(self) -> str:
        """The recipes' size: tiny, 27b, .."""
        return self.config.partition(":")[2].partition(",")[0] or "tiny"

    @property
    def embedded(self) -> bool:
        """Whether the runs learn from the embedded world, where the truth is known."""
        return self.size in TINY_SIZES


@dataclasses.dataclass(frozen=True)
class Road:
    """The runs of one seed."""

    settings: Settings
    seed: int

    @property
    def directory(self) -> Path:
        """The directory of the pipeline."""
        return self.settings.runs / str(self.seed)

    def records(self, *, shifted: bool = False, world: Path | None = None) -> list[Preference]:
        """The held-out records with two responses or more: of the training distribution, or those
        of which training has not seen the like.

        Args:
          world: the run whose records they are; None: the pipeline.
        """
        if self.settings.heldout is not None:
            found = [] if shifted else list(read_preferences(self.settings.heldout))
        else:
            heldout = synthetic.BENCHMARK.load((world or self.directory) / "world")
            found = [r for r in heldout if (r.domain != synthetic.FRESH) == shifted]
        return [record for record in found if len(record.responses) > 1]

    def samples(self, stage: str, *, shifted: bool = False) -> Path:
        """The critiques of a stage's model on the held-out records."""
        if self.settings.heldout is not None:
            return self.judged(self.directory / stage, meta=self._meta(stage))
        name = f"{stage}_shifted.jsonl" if shifted else f"{stage}.jsonl"
        return self.directory / "evaluation" / name

    def pipeline(self) -> None:
        """All stages, and critiques of each one's model."""
        last = "evaluation/summary.json" if self.settings.embedded else "scalar_rm/model"
        if not (self.directory / last).exists():
            self._train(self.settings.config, self.directory)
        if self.settings.heldout is not None:
            for stage in STAGES[:3]:
                self.judged(self.directory / stage, meta=self._meta(stage))

    def branch(self, name: str, stage: str, *options: str, arguments: str = "") -> Path:
        """A stage trained with other options, from the pipeline's models; returns its run
        directory, in which all other stages are links to the pipeline's.

        Args:
          arguments: of the recipe, such as "group=16".
        """
        directory = self.settings.runs / f"{self.seed}-{name}"
        if not is_model_dir(directory / stage / "model"):
            if self.runs_commands:
                self._link(directory, STAGES[: STAGES.index(stage)])
            recipe = ",".join(
                [f"{stage}.py:{self.settings.size}", *([arguments] * bool(arguments))]
            )
            self._train(recipe, directory, *options)
        return directory

    def scalar_rm(self, times: int, *, start: str | None = None) -> Path:
        """The run of a scalar RM that makes `times` the recipe's steps, the learning rate spread
        over them.

        Args:
          start: the weights it starts from, None: those of the recipe; "base": the base model's,
            which are random on the embedded world.
        """
        recipe = recipes.load(f"scalar_rm.py:{self.settings.size}")
        assert isinstance(recipe, recipes.ScalarRMRecipe)
        usual = recipe.scalar_rm.start
        start = start or usual
        if (times, start) == (1, usual):
            return self.directory
        options = ["--scalar-rm.fitting.steps", str(times * recipe.scalar_rm.fitting.steps)]
        options += [] if start == usual else ["--scalar-rm.start", start]
        return self.branch(f"scalar-{'base-' * (start == 'base')}x{times}", "scalar_rm", *options)

    def instructions(self, name: str, change: Callable[[str], str]) -> Path:
        """The teacher's critiques with changed texts, for the branch `name`."""
        file = self.settings.runs / f"{self.seed}-{name}" / "instructions.jsonl"
        if self.runs_commands and not file.exists():
            source = self.directory / "world" / "cold_start.jsonl"
            rows = map(json.loads, source.read_text(encoding="utf-8").splitlines())
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as partial, partial.open("w", encoding="utf-8") as out:
                for row in rows:
                    out.write(json.dumps({**row, "text": change(row["text"])}) + "\n")
        return file

    def other_size(self, size: str) -> Path:
        """The run directory of SFT, RFT and RL of another size, which learn from files of the same
        seed."""
        return self._other(size, STAGES[:3], size)

    def other_world(self, name: str, *options: str) -> Path:
        """The run directory of SFT, RFT, RL and a scalar RM that learn from another world of the
        same seed."""
        return self._other(name, STAGES[:4], self.settings.size, *options)

    def _other(self, name: str, stages: Sequence[str], size: str, *options: str) -> Path:
        directory = self.settings.runs / f"{self.seed}-{name}"
        for stage in stages:
            if not is_model_dir(directory / stage / "model"):
                self._train(f"{stage}.py:{size}", directory, *options)
        return directory

    def judged(
        self,
        model: Path,
        *,
        meta: Path | None = None,
        k: int | None = None,
        temperature: float | None = None,
        world: Path | None = None,
    ) -> Path:
        """The samples of a model on the held-out records: samples.jsonl.

        Args:
          model: the directory of a stage, such as RUNS/0/rl.
          meta: the run of a meta RM whose scores the samples get.
          k: critiques of a record; None: those of the settings.
          temperature: at which they are drawn; None: the recipe's.
          world: the run whose held-out records they are; None: the pipeline.
        """
        settings, k = self.settings, k or self.settings.k
        parts = [model.name, str(k), *([] if meta is None else [meta.name])]
        parts += [] if temperature is None else [f"t{temperature:g}"]
        folder = model.parent / "judged" / "-".join(parts)
        bench, data = "synthetic", world or self.directory
        if settings.heldout is not None:
            bench, data = "preferences", settings.heldout
        file = folder / bench / "samples.jsonl"
        if not file.exists():
            command = [
                "-m", "grm_jax.evaluate", "--bench", bench, "--data", str(data),
                "--model", str(model), "-k", str(k), "--probes", "0",
                "--resamples", "200", "--seed", str(self.seed), "--output", str(folder),
                "--cache", str(self.directory / "evaluation" / "cache"),
                "--compute-dtype", "bfloat16",
            ]  # fmt: skip
            command += [] if meta is None else ["--meta", str(meta)]
            command += [] if temperature is None else ["--temperature", f"{temperature:g}"]
            self.run(command)
        return file

    @property
    def runs_commands(self) -> bool:
        """Whether commands are run, so that there are files to read."""
        return not (self.settings.dry or self.settings.plan)

    def verdicts(self, stage: Path) -> Path:
        """Verdicts of a stage's model on the held-out records, with the expected scores of each
        critique: what `python -m grm_jax.judge` writes.

        Args:
          stage: its directory, such as RUNS/0/rl.
        """
        settings, directory = self.settings, stage.parent
        file = directory / "judged" / f"{stage.name}-expected-{settings.k}.jsonl"
        rows = settings.heldout or directory / "world" / "heldout.jsonl"
        self._judge(stage, rows, file, settings.k, "--expected")
        return file

    def rows_file(self, stage: str, name: str, k: int, at_once: int | None = None) -> Path:
        """The verdicts of `judge_rows`."""
        suffix = "" if at_once is None else f"-by-{at_once}"
        return self.directory / "judged" / f"{stage}-{name}-{k}{suffix}.jsonl"

    def judge_rows(
        self,
        stage: str,
        name: str,
        rows: Callable[[], Iterable[Mapping[str, Any]]],
        k: int,
        at_once: int | None = None,
    ) -> None:
        """Verdicts of a stage's model on rows that are made here, of k critiques each.

        Args:
          name: of the rows, which are kept beside the verdicts.
          rows: makes them; called where they are not there.
          at_once: most responses that a critique reads; None: all.
        """
        given = self.directory / "judged" / f"{name}.jsonl"
        if self.runs_commands and not given.exists():
            given.parent.mkdir(exist_ok=True)
            with written_whole(given) as partial, partial.open("w", encoding="utf-8") as out:
                for row in rows():
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        options = [] if at_once is None else ["--at-once", str(at_once)]
        file = self.rows_file(stage, name, k, at_once)
        self._judge(self.directory / stage, given, file, k, *options)

    def _judge(self, stage: Path, rows: Path, file: Path, k: int, *options: str) -> None:
        if file.with_suffix(".done").exists():
            return
        self.run(
            [
                "-m", "grm_jax.judge", "--model", str(stage / "model"),
                "--input", str(rows), "--output", str(file), "-k", str(k),
                "--seed", str(self.seed), *options, "--compute-dtype", "bfloat16",
            ],
            unjudged=True,
        )  # fmt: skip
        if self.runs_commands:
            file.with_suffix(".done").touch()

    def _meta(self, stage: str) -> Path | None:
        """The meta RM was trained to guide the RL model."""
        return self.directory if stage == "rl" else None

    def _link(self, directory: Path, stages: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for part in ("world", *stages):
            source, link = self.directory / part, directory / part
            if link.exists():  # linked before, or trained by the branch itself
                continue
            if source.exists():
                link.symlink_to(source.resolve(), target_is_directory=True)
            elif part != "world":
                raise UserError(f"{source} is missing; run the pipeline of seed {self.seed} first")

    def _train(self, recipe: str, directory: Path, *options: str) -> None:
        if self.settings.plan is not None:
            command = ["-m", "grm_jax.plan", "--config", recipe, "--topology", self.settings.plan]
            self.run([*command, *options], allow_plan=True)
            return
        seed = str(self.seed)
        command = ["-m", "grm_jax.train", "--config", recipe, "--run-dir", str(directory)]
        command += ["--seed", seed]
        command += ["--world.seed", seed] if self.settings.embedded else []
        self.run([*command, *shlex.split(self.settings.options), *options])

    def run(
        self,
        command: Sequence[str],
        *,
        allow_plan: bool = False,
        unjudged: bool = False,
        code: Path | None = None,
    ) -> None:
        """Run `python COMMAND`, or print it alone. Raises UserError where it fails.

        Args:
          unjudged: status 3, by which `grm_jax.judge` says that rows have no readable critique, is
            no failure.
          code: a folder that has other code than this one, to run the command with.
        """
        if self.settings.plan is not None and not allow_plan:
            return
        shown = shlex.join(["python", *command])
        environment = dict(os.environ)
        if code is not None:
            environment["PYTHONPATH"] = str(code)
            shown = f"cd {code} && PYTHONPATH={code} {shown}"
        if self.settings.dry or self.settings.plan:
            # What they would make is not there for the next claim, which would ask for it again.
            if shown in _shown:
                return
            _shown.add(shown)
        print(shown, flush=True)
        if self.settings.dry:
            return
        status = subprocess.run(
            [sys.executable, *command], check=False, env=environment, cwd=code
        ).returncode
        if status and not (unjudged and status == 3):
            raise UserError(f"this command ended with status {status}: {shown}")
