"""Supervised fitting, the same for every loss: SFT, RFT, meta RM, scalar baseline.

batches -> train step -> metrics, checkpoints -> model
"""

from __future__ import annotations

import grain
import jax
import numpy as np

from grm_jax.model.flops import train_flops
from grm_jax.model.params import Params
from grm_jax.training.loop import Loop, Work
from grm_jax.training.losses import Loss
from grm_jax.training.run import Stage
from grm_jax.training.setup import Fitting
from grm_jax.training.step import HostBatch, LossFn, make_train_step, micro_batches
from grm_jax.training.trainable import Trainable


def fit(
    stage: Stage,
    fitting: Fitting,
    data: grain.DatasetIterator,
    loss_fn: LossFn,
    start: str,
    *,
    num_labels: int = 0,
) -> Params:
    """Train for `fitting.steps` steps, from the newest checkpoint if there is one.

    Args:
      stage: where checkpoints and metrics go.
      data: an endless iterator of batches whose position is saved with the state.
      loss_fn: see `step.LossFn`; nothing frozen is passed.
      start: what `Run.params` takes: "base", a stage, or a path.
      num_labels: width of the scalar head.

    Returns the trained model's parameters. Raises Stopped after saving when asked to stop.
    """
    run = stage.run
    trainable = Trainable(run, start, num_labels)

    def loss(params: Params, frozen, batch) -> Loss:
        return loss_fn(trainable.assemble(params, frozen), None, batch)

    with Loop(
        stage, fitting.steps, fitting.optimizer, trainable, data, log_every=run.setup.log_every
    ) as loop:
        train_step = make_train_step(
            loss, loop.optimizer, trainable.table, run.mesh,
            micro_batches=micro_batches(fitting.batch_size, fitting.device_batch, run.mesh),
            spike=run.setup.guard.spike, key=run.stage_key(stage.name),
        )  # fmt: skip
        for _ in loop:
            with loop.timer.phase("data"):
                batch = next(data)
            loop.take(train_step, trainable.frozen, batch, _work(stage, batch))
        return trainable.whole(loop.state.params)


def _work(stage: Stage, batch: HostBatch) -> Work:
    """Tokens and FLOPs of this process's rows, times the number of processes."""
    lengths = np.asarray(batch["lengths"]).reshape(-1)
    heads = batch["mask"].sum(axis=1) if "mask" in batch else np.zeros_like(lengths)
    rows = zip(lengths.tolist(), heads.tolist(), strict=True)
    processes = jax.process_count()
    flops = train_flops(stage.run.model, rows)
    return Work(float(lengths.sum()) * processes, flops * processes)
