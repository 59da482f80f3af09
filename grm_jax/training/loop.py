"""The host's side of gradient steps, the same for every stage.

    with Loop(stage, ...) as loop:
        train_step = loop.train_step(objective, micro_batches=...)
        for step in loop:                 # from the newest complete checkpoint on, if there is one
            batch = loop.next_batch()
            loop.take(train_step, batch, work)    # dispatched; its metrics are read by the next one

The loop saves checkpoints and metrics, stops after a step on Ctrl-C or SIGTERM, and goes back to
the last checkpoint when too many consecutive steps were skipped.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
import optax

from grm_jax.errors import UserError
from grm_jax.metrics import MetricsWriter, Progress, Timer, Tracer
from grm_jax.model.config import ModelConfig
from grm_jax.model.flops import train_flops
from grm_jax.parallel.devices import mesh_flops
from grm_jax.parallel.multihost import any_of
from grm_jax.room import require_room, state_bytes
from grm_jax.stopping import Stopped, requested
from grm_jax.training.heldout import Measure
from grm_jax.training.optimizer import make_optimizer, schedule
from grm_jax.training.options import OptimizerConfig
from grm_jax.training.run import Stage
from grm_jax.training.step import (
    Cut,
    HostBatch,
    LossFn,
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    make_train_step,
)
from grm_jax.training.trainable import Trainable

log = logging.getLogger("grm_jax")


class Diverged(UserError):
    """Too many consecutive steps were skipped, and going back to a checkpoint did not help."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a step: its tokens without padding, and its FLOPs by `model.flops`."""

    tokens: float = 0.0
    flops: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, batch: HostBatch) -> Work:
        """The work of a batch of whole rows, of which every process has as many."""
        lengths = np.asarray(batch["lengths"]).reshape(-1)  # [B], or [P, 2] of pairs
        # Only completion tokens have logits; rows without a mask have a scalar head.
        learned = (batch["mask"] > 0).sum(axis=1) if "mask" in batch else np.zeros_like(lengths)
        flops = train_flops(model, zip(lengths.tolist(), learned.tolist(), strict=True))
        processes = jax.process_count()
        return cls(float(lengths.sum()) * processes, flops * processes)


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A step that was dispatched, and whose metrics are not read yet."""

    step: int
    values: dict[str, jax.Array]
    host_metrics: dict[str, float]
    work: Work


class Loop:
    """The steps of a stage; iterating over it yields their numbers, counted from 1.

    Args:
      stage: the stage, whose directory gets checkpoints and metrics.
      steps: how many steps there are, those before a resume included.
      optimizer: the configuration of the optimizer.
      trainable: the parameters that are trained.
      data: an endless iterator; its position is saved with the state.
      log_every: the steps between two rows of metrics, each of which has means over these steps.
      shown: the metrics of the progress line; empty for all but the phases' seconds and skips.
      heldout: what is measured every `--heldout.every` steps and after the last one, as a function
        of the parameters of a forward pass; its metrics are logged as heldout/<name>. None: nothing
        is measured.

    Attributes:
      state: the train state.
      optimizer: the optax transformation.
      timer: the seconds of each phase; the caller may add phases.
      first: the number of the step from which the loop was resumed; 0 for a new run.
    """

    def __init__(
        self,
        stage: Stage,
        steps: int,
        optimizer: OptimizerConfig,
        trainable: Trainable,
        data: grain.DatasetIterator,
        *,
        log_every: int,
        shown: tuple[str, ...] = (),
        heldout: Measure | None = None,
    ):
        self.stage, self.steps, self.data = stage, steps, data
        self.trainable, self.log_every, self._shown = trainable, log_every, shown
        self._measure, self._measured = heldout, dict[str, float]()
        self.optimizer = make_optimizer(optimizer, steps, trainable.table)
        self.timer = Timer()
        self._rate = schedule(optimizer, steps)
        self._guard = stage.run.setup.guard
        self._peak = mesh_flops(stage.run.mesh)
        self.checkpoints = stage.open_checkpoints()
        self.state = self._restore() or self._fresh()
        self.first = self._now = int(self.state.step)
        self._metrics = MetricsWriter(stage.directory, self.first)
        self._progress = Progress(stage.name, steps, done=self.first)
        self._sent: _Sent | None = None
        self._rows: list[dict[str, float]] = []
        self._work: list[Work] = []
        self._since = time.perf_counter()
        self._lost = False
        self._rollbacks = 0

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.checkpoints.close()
        finally:
            self._metrics.close()

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the steps to take.

        Raises Stopped after a signal, once a checkpoint is saved, and Diverged when going back to a
        checkpoint does not help.
        """
        setup = self.stage.run.setup
        tracer = Tracer(setup.profile, self.stage.directory / "trace")
        with requested() as stop, tracer:
            while self._now < self.steps:
                self._now += 1
                with tracer.step(self._now):
                    yield self._now
                last = self._now == self.steps
                # Before the checkpoint, so that a resumed run has a row for every measured step.
                if self._now % max(1, setup.heldout.every) == 0 or last:
                    self._measure_heldout()
                # The last step is saved, too: until the model is written, nothing else keeps it.
                due = self._now % setup.checkpoint_every == 0 or last
                stop_agreed = any_of(stop.asked)
                if due or stop_agreed:
                    self._read()  # whether this step was skipped
                # In a single process a signal that came after `any_of` counts, too. Other processes
                # might not have seen it.
                stopping = stop_agreed or (stop.asked and jax.process_count() == 1)
                if self._lost:
                    self._roll_back()
                elif due or stopping:
                    with self.timer.phase("checkpoint"):
                        self.checkpoints.save(self._now, self.state, self._position())
                if stopping:
                    message = f"{self.stage.name} saved at step {self._now}"
                    raise Stopped(message, terminated=stop.terminated)

    def train_step(
        self, loss_fn: LossFn, *, micro_batches: int, cut: Cut | None = None
    ) -> TrainStep:
        """The gradient step of this stage; the arguments are those of `step.make_train_step`."""
        run = self.stage.run
        return make_train_step(
            loss_fn, self.optimizer, self.trainable.table, run.mesh,
            micro_batches=micro_batches, spike=self._guard.spike,
            key=run.stage_key(self.stage.name), cut=cut,
        )  # fmt: skip

    def next_batch(self) -> Any:
        """The next batch of the data; the wait for it is the phase "data"."""
        with self.timer.phase("data"):
            return next(self.data)

    def take(
        self,
        train_step: TrainStep,
        batch: HostBatch,
        work: Work,
        host_metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Dispatch a step, then read the metrics of the one before it.

        Args:
          train_step: what `train_step` returned.
          batch: the rows of this process.
          work: the step's tokens and FLOPs.
          host_metrics: metrics of this step that were computed on the host.
        """
        with self.timer.phase("update"):
            self.state, values = train_step(self.state, self.trainable.frozen, batch)
            self._read()
        metrics = {**(host_metrics or {}), **self.timer.take()}
        self._sent = _Sent(self._now, values, metrics, work)

    def _measure_heldout(self) -> None:
        """Measure the present parameters on held-out data, and write a row of metrics for it."""
        if self._measure is None:
            return
        with self.timer.phase("update"):
            jax.block_until_ready(self.state.params)
        started = time.perf_counter()
        with self.timer.phase("heldout"):
            params = self.trainable.assemble(self.state.params, self.trainable.frozen)
            values = self._measure(params)
        self._measured = {f"heldout/{name}": value for name, value in values.items()}
        self._metrics.write(self._now, self._measured)
        self._since += time.perf_counter() - started  # no part of the rates of training

    def _read(self) -> None:
        """Read the metrics of the dispatched step, and write a row of metrics when it is due."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        values = {name: float(value) for name, value in jax.device_get(sent.values).items()}
        if values["skipped"]:
            in_a_row = values.pop("skipped_in_a_row")
            log.warning(
                "%s: step %d was skipped (loss %.4g, gradient norm %.4g); %d in a row",
                self.stage.name, sent.step, values.get("loss", np.nan), values["grad_norm"],
                in_a_row,
            )  # fmt: skip
            self._lost = in_a_row >= self._guard.patience
        values.pop("skipped_in_a_row", None)
        self._rows.append(values | sent.host_metrics)
        self._work.append(sent.work)
        if sent.step % self.log_every == 0 or sent.step == self.steps:
            self._write(sent.step)

    def _write(self, step: int) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        # A phase that a step did not have, such as saving a checkpoint, counts as 0 seconds.
        names = dict.fromkeys(name for row in self._rows for name in row)
        means = {name: float(np.mean([row.get(name, 0.0) for row in self._rows])) for name in names}
        count = len(self._rows)
        tokens, flops = (sum(getattr(w, kind) for w in self._work) for kind in ("tokens", "flops"))
        self._rows, self._work = [], []
        rates = {"train_tokens_per_second": tokens / seconds}
        if self._peak is not None:
            rates["model_flops_utilisation"] = flops / seconds / self._peak
        rate = {"learning_rate": float(np.asarray(self._rate(step - 1)))}
        self._metrics.write(step, {**means, **rate, **rates})
        shown = self._shown or tuple(
            name for name in means if not name.startswith(("skipped", "seconds"))
        )
        values = {name: means[name] for name in shown} | rates | self._measured
        self._progress.update(count, values)

    def _abstract(self) -> TrainState:
        return _abstract_state(self.stage, self.optimizer, self.trainable)

    def _restore(self) -> TrainState | None:
        """The state of the newest checkpoint, or None; the data continues from its position."""
        checkpoint = self.checkpoints.restore(self._abstract())
        if checkpoint is None:
            return None
        _, state, position = checkpoint
        # Earlier versions saved the position of the data without the buckets.
        with_buckets = isinstance(position, dict) and position.keys() == {"buckets", "data"}
        buckets = position["buckets"] if with_buckets else self.stage.buckets_before
        if buckets == self.stage.buckets:
            self.data.set_state(position["data"] if with_buckets else position)
        else:
            log.warning(
                "%s: other length buckets than before: from step %d on the data is shuffled anew",
                self.stage.name, int(state.step),
            )  # fmt: skip
        return state

    def _position(self) -> dict[str, Any]:
        """The position of the data, and the buckets on which the order of the data depends."""
        return {"buckets": self.stage.buckets, "data": self.data.get_state()}

    def _fresh(self) -> TrainState:
        return init_state(
            self.trainable.table, self.optimizer, self.stage.run.mesh, params=self.trainable.begin()
        )

    def _roll_back(self) -> None:
        """Restore the last checkpoint, and continue with the data that comes next.

        The data's position is not restored, so that the batches since then are not used again.
        """
        self._rollbacks += 1
        name, patience = self.stage.name, self._guard.patience
        if self._rollbacks > self._guard.rollbacks:
            raise Diverged(
                f"{name}: {patience} steps in a row were skipped, and going back to a "
                f"checkpoint {self._guard.rollbacks} times did not help. Look at metrics.jsonl; "
                "lower the learning rate, check the data, or raise --guard.spike"
            )
        checkpoint = self.checkpoints.restore(self._abstract())
        self.state = self._fresh() if checkpoint is None else checkpoint[1]
        self._now, self._lost, self._sent, self._rows, self._work = (
            int(self.state.step), False, None, [], []
        )  # fmt: skip
        log.warning(
            "%s: %d steps in a row were skipped; back to step %d", name, patience, self._now
        )
        self._metrics.close()
        self._metrics = MetricsWriter(self.stage.directory, self._now)
        self._progress.done = self._now


def require_checkpoint_room(
    stage: Stage, steps: int, optimizer: OptimizerConfig, trainable: Trainable
) -> None:
    """Raise UserError unless a checkpoint of a Loop with these arguments can be written.

    A stage that samples before it trains calls this first: the loop would find out only after the
    hours of sampling. No weights are read.
    """
    state = _abstract_state(stage, make_optimizer(optimizer, steps, trainable.table), trainable)
    require_room(stage.directory / "checkpoints", state_bytes(state), "a checkpoint")


def _abstract_state(
    stage: Stage, optimizer: optax.GradientTransformation, trainable: Trainable
) -> TrainState:
    return abstract_state(trainable.table, optimizer, stage.run.mesh, trainable.dtype)
