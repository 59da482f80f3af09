"""A run: its directory, and what its stages share.

<run_dir>/
  run.lock          the command that uses the directory (lock.py)
  world/            the files of the embedded world, when it is used
  skipped_rows.txt  rows of the preferences that --skip-bad-rows left out, and why
  sft/ rft/ rl/ meta_rm/ scalar_rm/
    config.json     the recipe as used, and checksums of what the stage read
    checkpoints/    while the stage runs: train state and position of the data
    metrics.jsonl   and TensorBoard events
    model/          the result: parameters, tokenizer; the stage is done when it exists
  evaluation/       samples, figures, plot
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grm_jax import checkpoint, files, hub
from grm_jax.critique import Template
from grm_jax.critique.template_set import Templates
from grm_jax.data.holdout import split
from grm_jax.data.preferences import Preference, Records, read_preferences
from grm_jax.data.rows import expand
from grm_jax.data.synthetic_files import write_world
from grm_jax.identity import differences
from grm_jax.judge.about import About
from grm_jax.judge.cache import fingerprint
from grm_jax.judge.critiques import Critic
from grm_jax.judge.prompts import OrderMode, Prompts
from grm_jax.lock import hold
from grm_jax.model import storage
from grm_jax.model.config import ModelConfig, model_config
from grm_jax.model.hf_config import token_ids
from grm_jax.model.params import Params, ParamSpec, init_params, param_table
from grm_jax.model.storage import load_params, on_kind, param_shardings, read_model_config
from grm_jax.parallel.mesh import decode_mesh, make_mesh
from grm_jax.parallel.multihost import any_of, barrier, first, from_first
from grm_jax.sampler.engine import Sampler
from grm_jax.tokenizer import ChatTokenizer, load_tokenizer
from grm_jax.tokenizer.vocabulary import require_rows
from grm_jax.training import origin
from grm_jax.training.counts import Counts
from grm_jax.training.lengths import Lengths
from grm_jax.training.setup import SYNTHETIC, ConfigError, Setup, to_json

log = logging.getLogger("grm_jax")

# What a random key is for, as the constant that is folded into the run's key. Never renumber them:
# resumed runs would change.
STAGE_KEYS = {"init": 0, "sft": 1, "rft": 2, "rl": 3, "meta_rm": 4, "scalar_rm": 5, "heldout": 6}
STAGES = ("sft", "rft", "rl", "meta_rm", "scalar_rm")

SKIPPED_FILE = "skipped_rows.txt"
SKIPPED_IN_LOG = 10  # skipped rows in the log; the file lists all of them


class MissingStage(ConfigError):
    """A stage needs the result of another that is not there."""


class Run:
    """What the stages share: mesh, tokenizer, model shape, records, models by name.

    Args:
      setup: see `setup.Setup`.
      devices: the devices to run on; None for all.
      given: the size of the recipe and the shared options, as typed, for messages that name another
        command of the same run; None where they are not known.
    """

    def __init__(
        self,
        setup: Setup,
        devices: Sequence[Any] | None = None,
        *,
        given: tuple[str, Sequence[str]] | None = None,
    ):
        self.setup = setup
        self._given = given or ("", ["--run-dir", setup.run_dir])
        self.directory = files.expanded(setup.run_dir)
        self.mesh = make_mesh(
            setup.mesh.replica,
            setup.mesh.fsdp,
            setup.mesh.tensor,
            devices,
            sequence=setup.mesh.sequence,
        )
        self.key = jax.random.key(setup.seed)
        # Read at the start: their files may change while the run goes on.
        self.templates = Templates.load(setup.templates)
        self.usable: dict[str, list[Preference]] = {}  # records by stage: `inputs.usable`

    @property
    def synthetic(self) -> bool:
        return self.setup.preferences == SYNTHETIC

    @functools.cached_property
    def world(self) -> Path:
        """The embedded world's directory, written on first use."""
        root = self.directory / "world"
        wanted = json.loads(to_json(self.setup.world))
        about = root / "world.json"
        if any_of(not about.exists()):
            hold(self.directory)  # two commands would write it at once
        if about.exists():
            changed = differences(files.read_json(about, ConfigError), wanted)
            if changed:
                shown = "; ".join(f"{n}: {a!r} -> {b!r}" for n, (a, b) in changed.items())
                raise ConfigError(f"{root} holds another world ({shown}); give another --run-dir")
        elif first():
            log.info("world            writing %s", root)
            write_world(root, self.setup.world)
        barrier("world")
        return root

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        if source := self.setup.tokenizer or self.setup.base:
            tokenizer = load_tokenizer(source)
            if self.setup.base:
                base = hub.resolve(self.setup.base)
                rows = read_model_config(base).vocab_size
                require_rows(tokenizer.vocabulary, rows, source, self.setup.base)
                if self.setup.tokenizer:
                    _warn_of_other_ids(tokenizer, base)
            return tokenizer
        if self.synthetic:
            return load_tokenizer(self.world / "tokenizer")
        raise ConfigError(
            "no tokenizer: give --base (a checkpoint folder) or --tokenizer; only the embedded "
            "world has one of its own"
        )

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model's shape: the base checkpoint's, or the declared size with this vocabulary."""
        if self.setup.base:
            model = read_model_config(self.setup.base)
        else:
            model = model_config(self.setup.size).replace(vocab_size=self.vocab_size)
        return on_kind(model, *self.device, self.setup.compute_dtype, self.setup.attention)

    @property
    def device(self) -> tuple[str, str]:
        """The platform and the kind of the devices, as JAX names them."""
        device = self.mesh.devices.flat[0]
        return device.platform, device.device_kind

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary of a model that is not read from a checkpoint."""
        return self.tokenizer.vocab_size

    def table(self, num_labels: int = 0) -> tuple[ParamSpec, ...]:
        return param_table(self.model, num_labels=num_labels)

    @property
    def records(self) -> list[Preference]:
        """Training preferences, each with a single best response, without the held-out ones. What
        `--skip-bad-rows` leaves out is listed in `SKIPPED_FILE`."""
        return self._preferences[0]

    @functools.cached_property
    def heldout(self) -> list[Preference]:
        """The records of `--heldout.records`, or of `--heldout.share`. Raises ConfigError where
        both are given, or neither."""
        options = self.setup.heldout
        if bool(options.records) == bool(options.share):
            raise ConfigError(
                f"--heldout.every {options.every} needs records to measure on: give either "
                "--heldout.records FILE, or --heldout.share 0.02 to hold a part of --preferences "
                "out of all stages"
            )
        return self._read(options.records) if options.records else self._preferences[1]

    @functools.cached_property
    def _preferences(self) -> tuple[list[Preference], list[Preference]]:
        """(training preferences, held-out ones)."""
        source = self.world / "train.jsonl" if self.synthetic else self.setup.preferences
        records = self._read(source)
        if records.skipped:
            self._list_skipped(records)
        return split(records, self.setup.heldout.share)

    def _read(self, source: str | Path) -> Records:
        return read_preferences(
            source,
            skip_bad_rows=self.setup.skip_bad_rows,
            unique_best=True,
            max_bad_share=self.setup.max_bad_share,
        )

    def _list_skipped(self, records: Records) -> None:
        """List skipped rows: the first ones in the log, all in a file, since there may be
        thousands."""
        for message in records.skipped[:SKIPPED_IN_LOG]:
            log.warning("skipped: %s", message)
        file = self.directory / SKIPPED_FILE
        log.warning(
            "skipped %d rows, kept %d; all of them: %s",
            len(records.skipped), len(records), file,
        )  # fmt: skip
        if first():
            with files.written_whole(file) as partial:
                text = "".join(f"{message}\n" for message in records.skipped)
                partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    @functools.cached_property
    def lengths(self) -> Lengths:
        parts = [f"{name} {template.digest}" for name, template in self.templates.items()]
        of = f"tokenizer {self._tokenizer_digest or 'embedded'}, {', '.join(parts)}"
        counts = Counts(self.directory / "lengths.json", of)
        return Lengths(self.prompts("given"), self.templates.meta, counts)

    @functools.cached_property
    def data_files(self) -> dict[str, str]:
        """Checksums of the data files, by path: a run is not resumed with other data."""
        sources = [self.setup.instructions]
        if not self.synthetic:
            sources.append(self.setup.preferences)
        checksums = {}
        for source in filter(None, sources):
            for path in expand(source, quiet=True):
                with path.open("rb") as file:
                    checksums[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return checksums

    @functools.cached_property
    def sampler(self) -> Sampler:
        return Sampler(
            self.model, self.tokenizer.stop_ids, self.setup.engine, decode_mesh(self.mesh)
        )

    def prompts(self, order: OrderMode | int) -> Prompts:
        return Prompts(self.tokenizer, self.templates, order=order, seed=self.setup.seed)

    def new_critic(self, order: OrderMode | int) -> Critic:
        """A critic, which draws critiques. The memory of its caches is planned again, since each
        stage keeps other arrays on the devices."""
        self.sampler.budget.forget()
        return Critic(self.sampler, self.prompts(order))

    def stage_key(self, stage: str) -> jax.Array:
        return jax.random.fold_in(self.key, STAGE_KEYS[stage])

    def model_dir(self, stage: str, instead: str = "--init PATH") -> Path:
        """The directory of the stage's model. Raises MissingStage, with the command that makes it,
        if there is none.

        Args:
          instead: the option that names another model, for the message.
        """
        path = self.directory / stage / "model"
        if not storage.is_model_dir(path):
            raise MissingStage(
                f"this needs the {stage} stage's model, and {path} is not there. Make it with\n"
                f"    {self.command(stage)}\n"
                f"or run the whole pipeline with\n"
                f"    {self.command('spct')}\n"
                f"or start from another model with {instead}"
            )
        return path

    def command(self, recipe: str) -> str:
        """The command that runs another recipe of the same size, base and data, for a shell."""
        size, shared = self._given
        spec = f"{recipe}.py:{size}" if size else f"{recipe}.py"
        return shlex.join(["python", "-m", "grm_jax.train", "--config", spec, *shared])

    def params(self, source: str, num_labels: int = 0, *, dtype: Any = jnp.float32) -> Params:
        """Parameters of "base", of a stage, or of a checkpoint path, on the mesh.

        Args:
          source: "base", the name of a stage, or the path or repo id of a model.
          num_labels: the width of the scalar head; one that the source does not have starts at
            zero.
          dtype: the dtype of the arrays.

        Raises MissingStage for a stage without a model, ConfigError for a model of another shape.
        """
        shardings = param_shardings(self.table(num_labels), self.mesh)
        if source == "base" and self.setup.base is None:
            shardings.pop("score", None)
            rows = tuple(row for row in self.table(num_labels) if row.path != ("score",))
            init = jax.jit(lambda key: init_params(rows, key, dtype), out_shardings=shardings)
            params = init(self.stage_key("init"))
        else:
            path = self._locate(source)
            config, params = load_params(path, shardings=shardings, dtype=dtype)
            if config.shape != self.model.shape:
                raise ConfigError(f"{path}: its shape is not the run's: {config} / {self.model}")
        if num_labels and "score" not in params:
            params["score"] = jnp.zeros((self.model.embed_dim, num_labels), dtype)
        return params

    def require(self, source: str, instead: str = "--init PATH") -> None:
        """Raise MissingStage, or another UserError, unless `params(source)` would find a model."""
        if source == "base" and self.setup.base is None:
            return
        path = self._locate(source, instead)
        if source != "base" and source not in STAGES:
            _warn_of_other_ids(self.tokenizer, path)

    def content(self, sources: Sequence[str]) -> dict[str, Any]:
        """Checksums of everything that a stage reads; `sources` are the models that it starts from
        or samples."""
        return {
            "data": sorted(self.data_files.values()),
            "templates": {name: template.digest for name, template in self.templates.items()},
            "tokenizer": self._tokenizer_digest,
            "models": [self.digest(source) for source in sources],
            "sources": list(sources),
        }

    @functools.cached_property
    def _tokenizer_digest(self) -> str | None:
        """A checksum of the tokenizer's files; None for that of the embedded world."""
        if not (self.setup.tokenizer or self.setup.base):
            return None
        whole = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            for file in sorted(Path(folder).iterdir()):
                whole.update(f"{file.name}\n".encode() + file.read_bytes())
        return whole.hexdigest()[:16]

    @functools.cache  # noqa: B019  (a run lives as long as its process)
    def digest(self, source: str) -> str | None:
        """A checksum of the files of "base", of a stage's model, or of a checkpoint; None where
        there is no such model. Only the first process reads the files.
        """
        if source == "base" and self.setup.base is None:
            return None
        if source in STAGES and not storage.is_model_dir(self.directory / source / "model"):
            return None
        folder, checksum = self._locate(source), ""
        if first():
            folder = storage.model_folder(folder)
            checksum = fingerprint(folder, self.directory / "digests.json")
        return from_first(checksum)

    def _locate(self, source: str, instead: str = "--init PATH") -> Path:
        """The folder of "base", of a stage's model, or of a checkpoint by path or repo id."""
        if source == "base" and self.setup.base is not None:
            return hub.resolve(self.setup.base)
        return self.model_dir(source, instead) if source in STAGES else hub.resolve(source)


class Stage:
    """The directory of a stage: the recipe as used, checkpoints while it runs, the model at the
    end.

    Nothing is written before `begin`.

    Args:
      run: the run that it belongs to.
      name: the stage's name, which is that of its directory.
      used: the dataclass of the stage's options.
      init: the model of `--init`.
      needs: the models that it starts from or samples.
      examples: further templates that it reads, by name.

    Raises ConfigError when the directory was begun with another recipe or other data.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        used: Any,
        init: str | None = None,
        needs: Sequence[str] = (),
        examples: Mapping[str, Template] = {},
    ):
        self.run, self.name, self._needs = run, name, needs
        self.directory = run.directory / name
        self.model_path = self.directory / "model"
        self._config_file = self.directory / "config.json"
        content = run.content(needs)
        if examples:
            content["examples"] = {name: template.digest for name, template in examples.items()}
        now = origin.used(run.setup, used, init, content)
        self._config = to_json(now)
        self._before: dict[str, Any] | None = None
        if self._config_file.exists() and origin.begun(self.directory):
            self._before = files.read_json(self._config_file, ConfigError)
            refused, allowed = origin.compare(self._before, now, used)
            if refused:
                raise ConfigError(
                    f"{self.directory} was begun with another recipe or other data; nothing was "
                    "changed.\n    "
                    + "\n    ".join(refused)
                    + "\nUse the same options and files, or another --run-dir, or delete this one."
                )
            if allowed:
                log.info("%-16s resumed with changes: %s", name, "; ".join(allowed))

    def begin(self) -> None:
        """Check that the models it needs are there, hold the run directory, and note the recipe
        as used."""
        for index, source in enumerate(self._needs):
            # The meta RM starts from the first model; --init names the second, which it guides.
            start = self.name == "meta_rm" and index == 0
            self.run.require(source, "--meta-rm.start base" if start else "--init PATH")
        barrier("stage: checked")
        hold(self.run.directory)
        if first():
            with files.written_whole(self._config_file) as partial:
                partial.write_text(self._config, encoding="utf-8")
        barrier("stage: begun")

    @property
    def buckets(self) -> list[list[int]]:
        """The length buckets, on which the order of the data depends."""
        return [list(self.run.setup.length_buckets), list(self.run.setup.prompt_buckets)]

    @property
    def buckets_before(self) -> list[list[int]]:
        """`buckets` of the config.json that was read at the start."""
        setup = self._before["setup"] if self._before else {}
        names = ("length_buckets", "prompt_buckets")
        return [setup.get(name, ours) for name, ours in zip(names, self.buckets, strict=True)]

    @property
    def done(self) -> bool:
        return storage.is_model_dir(self.model_path)

    def open_checkpoints(self) -> checkpoint.StageCheckpoints:
        keep = self.run.setup.keep
        return checkpoint.StageCheckpoints(self.directory / "checkpoints", keep.latest, keep.every)

    def finish(self, params: Params) -> None:
        """Write the model (whole or not at all) and drop the checkpoints."""
        partial = self.directory / "model.partial"
        if first() and partial.exists():
            shutil.rmtree(partial)
        storage.save_model(partial, self.run.model, params)
        if first():
            with files.named(partial):
                self.run.tokenizer.save(partial)
                write_about(partial, self.run, self.name)
                partial.rename(self.model_path)
            checkpoint.drop_leftovers(self.directory)
        barrier("stage: finished")
        log.info("%-16s done: %s", self.name, self.model_path)


def _warn_of_other_ids(tokenizer: ChatTokenizer, model: Path) -> None:
    """Warn where ids stand for other pieces than in the tokenizer that belongs to a model.

    A few renamed unused ids are usual; the tokenizer of another model differs nearly everywhere.
    """
    pieces = {id: piece for piece, id in token_ids(model).items()}
    other = [id for piece, id in tokenizer.vocabulary.items() if pieces.get(id, piece) != piece]
    if other:
        log.warning(
            "%s: %d ids stand for other pieces than in the tokenizer of %s, such as id %d: that "
            "model has learnt them as other pieces",
            tokenizer.name, len(other), model, min(other),
        )  # fmt: skip


def write_about(directory: Path, run: Run, stage: str) -> None:
    """Write what a judge needs besides weights and tokenizer: templates and shapes, as trained."""
    setup = run.setup
    about = About(
        stage=stage,
        trained=True,
        templates=run.templates,
        judge=setup.judge,
        engine=setup.engine,
        length_buckets=setup.length_buckets,
    )
    about.write(directory)
