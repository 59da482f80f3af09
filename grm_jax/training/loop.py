"""The host's side of gradient steps, the same for every stage.

    with Loop(stage, ...) as loop:
        for step in loop:                 # from the newest whole checkpoint on, if there is one
            loop.take(train_step, ...)    # sent; its metrics are read when the next one is sent

It saves, logs, stops on Ctrl-C or SIGTERM after a step, and goes back to the last checkpoint when
too many steps in a row could not be taken.
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

from grm_jax.errors import UserError
from grm_jax.metrics import MetricsWriter, Progress, Timer, Tracer
from grm_jax.parallel.devices import mesh_flops
from grm_jax.parallel.multihost import any_of
from grm_jax.stopping import Stopped, requested
from grm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from grm_jax.training.run import Stage
from grm_jax.training.step import (
    HostBatch,
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
)
from grm_jax.training.trainable import Trainable

log = logging.getLogger("grm_jax")


class Diverged(UserError):
    """Too many steps in a row could not be taken, again and again."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes on: real tokens, and FLOPs by `model.flops`."""

    tokens: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A step whose metrics are not read yet."""

    step: int
    values: dict[str, jax.Array]
    known: dict[str, float]
    work: Work


class Loop:
    """Steps of a stage; iterate over it for their numbers.

    Args:
      stage: where checkpoints and metrics go.
      steps: how many there are in all.
      optimizer: its configuration.
      trainable: what is trained.
      data: an endless iterator; its position is saved with the state.
      log_every: steps between two rows of metrics, which are means.
      shown: metrics of the progress line; none given: all of the loss's.

    Attributes:
      state: the train state.
      optimizer: the optax transformation.
      timer: seconds of each phase; the caller may add phases.
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
    ):
        self.stage, self.steps, self.data = stage, steps, data
        self.trainable, self.log_every, self._shown = trainable, log_every, shown
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
        """Numbers of the steps to take. Raises Stopped after saving when asked to stop, and
        Diverged when going back to a checkpoint does not help.
        """
        setup = self.stage.run.setup
        tracer = Tracer(setup.profile, self.stage.directory / "trace")
        with requested() as stop, tracer:
            while self._now < self.steps:
                self._now += 1
                with tracer.step(self._now):
                    yield self._now
                last = self._now == self.steps
                # The last step too: until the model stands, it is all there is of the training.
                due = self._now % setup.checkpoint_every == 0 or last
                asked = any_of(stop.asked)
                if due or asked:
                    self._read()  # was this step taken?
                # A signal that came since then counts too where there is no other process that
                # might not have seen it.
                stopping = asked or (stop.asked and jax.process_count() == 1)
                if self._lost:
                    self._roll_back()
                elif due or stopping:
                    with self.timer.phase("checkpoint"):
                        self.checkpoints.save(self._now, self.state, self._position())
                if stopping:
                    message = f"{self.stage.name} saved at step {self._now}"
                    raise Stopped(message, terminated=stop.terminated)

    def take(
        self,
        train_step: TrainStep,
        frozen: Any,
        batch: HostBatch,
        work: Work,
        known: Mapping[str, float] | None = None,
    ) -> None:
        """Send a step, then read the metrics of the one before it.

        Args:
          known: metrics of this step that the host has already.
        """
        with self.timer.phase("update"):
            self.state, values = train_step(self.state, frozen, batch)
            self._read()
        self._sent = _Sent(self._now, values, {**(known or {}), **self.timer.take()}, work)

    def _read(self) -> None:
        """Take in the metrics of the step that was sent; write a row when it is time."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        values = {name: float(value) for name, value in jax.device_get(sent.values).items()}
        if values["skipped"]:
            row = values.pop("skipped_in_a_row")
            log.warning(
                "%s: step %d was not taken (loss %.4g, gradient norm %.4g); %d in a row",
                self.stage.name, sent.step, values.get("loss", np.nan), values["grad_norm"], row,
            )  # fmt: skip
            self._lost = row >= self._guard.patience
        values.pop("skipped_in_a_row", None)
        self._rows.append(values | sent.known)
        self._work.append(sent.work)
        if sent.step % self.log_every == 0 or sent.step == self.steps:
            self._write(sent.step)

    def _write(self, step: int) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        # A phase that a step did not have, such as a checkpoint, took it no time.
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
        self._progress.update(count, {name: means[name] for name in shown} | rates)

    def _abstract(self) -> TrainState:
        trainable, mesh = self.trainable, self.stage.run.mesh
        return abstract_state(trainable.table, self.optimizer, mesh, trainable.dtype)

    def _restore(self) -> TrainState | None:
        found = self.checkpoints.restore(self._abstract())
        if found is None:
            return None
        _, state, position = found
        # Earlier versions saved the data's position alone.
        whole = isinstance(position, dict) and position.keys() == {"buckets", "data"}
        buckets = position["buckets"] if whole else self.stage.buckets_before
        if buckets == self.stage.buckets:
            self.data.set_state(position["data"] if whole else position)
        else:
            log.warning(
                "%s: other length buckets than before: from step %d on the data is shuffled anew",
                self.stage.name, int(state.step),
            )  # fmt: skip
        return state

    def _position(self) -> dict[str, Any]:
        """Where the data is, and the buckets that its order depends on."""
        return {"buckets": self.stage.buckets, "data": self.data.get_state()}

    def _fresh(self) -> TrainState:
        return init_state(
            self.trainable.table, self.optimizer, self.stage.run.mesh, params=self.trainable.begin()
        )

    def _roll_back(self) -> None:
        """Go on from the last checkpoint, with the data that comes next, not what was met again."""
        self._rollbacks += 1
        name, patience = self.stage.name, self._guard.patience
        if self._rollbacks > self._guard.rollbacks:
            raise Diverged(
                f"{name}: {patience} steps in a row could not be taken, and going back to a "
                f"checkpoint {self._guard.rollbacks} times did not help. Look at metrics.jsonl; "
                "lower the learning rate, check the data, or raise --guard.spike"
            )
        found = self.checkpoints.restore(self._abstract())
        self.state = self._fresh() if found is None else found[1]
        self._now, self._lost, self._sent, self._rows, self._work = (
            int(self.state.step), False, None, [], []
        )  # fmt: skip
        log.warning(
            "%s: %d steps in a row were not taken; back to step %d", name, patience, self._now
        )
        self._metrics.close()
        self._metrics = MetricsWriter(self.stage.directory, self._now)
        self._progress.done = self._now
