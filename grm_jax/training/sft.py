"""Supervised training, the cold start: next-token loss on completions only.

cold_start.jsonl (trajectories, instructions) -> examples -> batches -> steps -> sft/model

Without a teacher's trajectories the base model writes them: `cold_start`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from grm_jax.data.collate import Example
from grm_jax.data.examples import trajectory_example
from grm_jax.data.loader import example_batches
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.data.targets import Targets, read_targets
from grm_jax.data.trajectories import Instruction, Trajectory
from grm_jax.errors import UserError
from grm_jax.model.batch import completion_logprobs
from grm_jax.parallel.mesh import local_rows
from grm_jax.training import cold_start
from grm_jax.training.heldout import critique_accuracy, critique_records
from grm_jax.training.inputs import fitting_rows
from grm_jax.training.loop import Loop, Work, require_checkpoint_room
from grm_jax.training.losses import Loss, sft_loss
from grm_jax.training.options import SFT, Fitting
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import ConfigError
from grm_jax.training.step import LossFn, micro_batches
from grm_jax.training.trainable import Assemble, Trainable, as_it_is

log = logging.getLogger("grm_jax")


def run_sft(run: Run, config: SFT) -> None:
    """Train on `setup.instructions` from the base model; does nothing when already done."""
    source = _source(run)
    shown = cold_start.shown(config.cold_start) if source is None else {}
    stage = Stage(run, "sft", config, needs=["base"], examples=shown)
    if stage.done:
        return
    targets = _written(stage, config) if source is None else _given(run, source)
    examples = [
        _example(run, row, place) for row, place in zip(targets.rows, targets.sources, strict=True)
    ]
    kept = fitting_rows(run, "sft", config.fitting, examples, targets.sources)
    examples = [examples[index] for index in kept]
    learned = [row for row in targets.rows if isinstance(row, Trajectory)]
    heldout = critique_records(run, "sft", learned)
    log.info("sft              %d examples from %s", len(examples), source or "the base model")
    stage.begin()
    train_on(stage, config.fitting, examples, "base", heldout)


def check_records(run: Run, config: SFT) -> None:
    """Raise a UserError for records of which the base model could not write critiques to learn
    from, or on which the stage could not be measured."""
    if _source(run) is None and config.cold_start.many is not None:
        cold_start.usable_records(run, config)
        critique_records(run, "sft", run.records)


def _source(run: Run) -> str | Path | None:
    """The file of given trajectories; None where the base model writes them."""
    return run.setup.instructions or (run.world / "cold_start.jsonl" if run.synthetic else None)


def _given(run: Run, source: str | Path) -> Targets:
    return read_targets(
        source,
        many=run.templates.many,
        single=run.templates.single,
        skip_bad_rows=run.setup.skip_bad_rows,
        max_bad_share=run.setup.max_bad_share,
    )


def _written(stage: Stage, config: SFT) -> Targets:
    """What the base model writes. Records and room are checked before anything is sampled."""
    run, fitting = stage.run, config.fitting
    if config.cold_start.many is None:
        raise ConfigError(
            "sft needs --instructions: a JSONL of trajectories or of {'messages': [...]} rows. "
            "Without it, let the base model write them (--sft.cold-start.many short_examples), or "
            "start RFT from an instruction-tuned model: --config rft.py --init PATH"
        )
    check_records(run, config)
    stage.begin()
    require_checkpoint_room(stage, fitting.steps, fitting.optimizer, Trainable(run, "base"))
    rows = cold_start.cold_start(stage, config)
    return Targets(list(rows), [f"trajectory of {row.example_id}" for row in rows])


def _example(run: Run, row: Trajectory | Instruction, source: str) -> Example:
    """The row as tokens. Raises DataError for a row that its template can not render."""
    try:
        return trajectory_example(row, run.tokenizer, run.templates)
    except UserError as error:
        fix = "change the row or the template"
        raise DataError("", f"it can not be rendered: {error}", fix, source) from error


def train_on(
    stage: Stage,
    fitting: Fitting,
    examples: list[Example],
    start: str,
    heldout: Sequence[Preference],
) -> None:
    """Train the model `start` on completions and write the stage's model. RFT trains on the
    critiques that it kept through this, too."""
    run, setup = stage.run, stage.run.setup
    data = example_batches(
        examples,
        setup.length_buckets,
        fitting.batch_size,
        setup.seed,
        f"{stage.name} examples",
        local_rows(run.mesh, fitting.batch_size),
        pack=fitting.pack,
    )
    trainable = Trainable(run, start)
    with Loop(
        stage, fitting.steps, fitting.optimizer, trainable, data,
        log_every=setup.log_every, heldout=critique_accuracy(run, heldout),
    ) as loop:  # fmt: skip
        train_step = loop.train_step(
            completion_objective(run, trainable.assemble),
            micro_batches=micro_batches(fitting.batch_size, fitting.device_batch, run.mesh),
        )
        for _ in loop:
            batch = loop.next_batch()
            loop.take(train_step, batch, Work.of(run.model, batch))
        params = trainable.whole(loop.state.params)
    stage.finish(params)


def completion_objective(run: Run, assemble: Assemble = as_it_is) -> LossFn:
    """Negative log-likelihood of completions; `assemble`: see `Trainable.assemble`."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        logprobs, _ = completion_logprobs(
            assemble(params, frozen), model, batch,
            temperature=1.0, remat=setup.remat, chunk=setup.logprob_chunk,
        )  # [B, C]  # fmt: skip
        return sft_loss(logprobs, batch["mask"])

    return loss_fn
