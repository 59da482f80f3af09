"""The meta RM (section 4): a scalar head that judges critiques, trained with BCE.

    RFT's non-hinted trajectories + samples of the trained GRM (+ RL's rollouts)
        -> label = correct by Eq. (10) -> (query, responses | critique) -> steps -> meta_rm/model

The critiques of a share of the records are held out. Accuracy and ROC-AUC on them are written to
`meta_rm/heldout.json`. The AUC is computed within items, too: guided voting needs a meta RM that
tells correct from wrong critiques of the same responses. A critique whose top score is shared is
wrong by Eq. (10), which anybody reads off its scores, and has no vote anyway. So two AUCs stand
apart: right critiques against such ties (`auc_ties`), and right against wrong ones among all others
(`auc_decisive`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from grm_jax.critique import decisive, is_correct, rule_reward
from grm_jax.data.collate import Example
from grm_jax.data.examples import meta_example
from grm_jax.data.holdout import in_share
from grm_jax.data.loader import example_batches
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory, read_trajectories, to_trajectory
from grm_jax.errors import UserError
from grm_jax.files import written_whole
from grm_jax.judge.scalar import score_examples
from grm_jax.model.batch import critique_scores
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import local_rows
from grm_jax.parallel.multihost import first
from grm_jax.scoring.statistics import mean_auc_within, roc_auc
from grm_jax.training.inputs import fitting_rows, learnt, sampled, usable
from grm_jax.training.loop import Loop, Work, require_checkpoint_room
from grm_jax.training.losses import Loss, bce_loss
from grm_jax.training.options import MetaRM
from grm_jax.training.run import Run, Stage
from grm_jax.training.sampling import sample_in_chunks
from grm_jax.training.setup import ConfigError
from grm_jax.training.step import LossFn, micro_batches
from grm_jax.training.trainable import Assemble, Trainable, as_it_is

log = logging.getLogger("grm_jax")


CHUNK = 256  # records sampled between two writes to disk

Row = tuple[Trajectory, Example]


def run_meta_rm(run: Run, config: MetaRM, init: str | None = None) -> None:
    """Train the meta RM that guides the GRM `init` (default: the rl stage)."""
    grm = init or "rl"
    stage = Stage(run, "meta_rm", config, init, [config.start, *([grm] if config.samples else [])])
    if stage.done:
        return
    earlier = read(run, config, earlier_rows(run, config))
    records = usable_records(run, config)
    ids = [*(row.example_id for row, _ in earlier), *(record.id for record in records)]
    if ids and all(in_share(id, config.holdout) for id in ids):
        raise ConfigError(
            f"--meta-rm.holdout {config.holdout:g} holds out all {len(set(ids))} records, and "
            "nothing is left to learn from; lower it, or give more records"
        )
    stage.begin()
    fitting, trainable = config.fitting, Trainable(run, config.start, num_labels=1)
    if records:
        require_checkpoint_room(stage, fitting.steps, fitting.optimizer, trainable)
    rows = [*earlier, *read(run, config, sampled_rows(stage, config, grm, records))]
    heldout = [row for row in rows if in_share(row[0].example_id, config.holdout)]
    training = [row for row in rows if not in_share(row[0].example_id, config.holdout)]
    if config.tie == "leave-out":
        training = [row for row in training if _decisive(run, row[0])]
    if not training:
        raise UserError(
            f"meta_rm: no critique is left to learn from ({len(heldout)} parsable ones are held "
            f"out); look at {stage.directory / 'samples.jsonl'}: unparsable critiques of the GRM "
            f"are not used{_no_ties(config)}; lower --meta-rm.holdout, or raise --meta-rm.samples"
        )
    correct = float(np.mean([example.label for _, example in training]))
    log.info(
        "meta_rm          %d critiques, %.1f%% correct; %d held out",
        len(training), 100 * correct, len(heldout),
    )  # fmt: skip
    examples = [example for _, example in training]

    batch_size = config.fitting.batch_size
    data = example_batches(
        examples,
        run.setup.length_buckets,
        batch_size,
        run.setup.seed,
        "critiques",
        local_rows(run.mesh, batch_size),
        pack=config.fitting.pack,
    )

    def measure(params: Params) -> dict[str, float]:
        figures = validate(run, params, heldout, fitting.batch_size)
        return figures | {"n": figures.pop("critiques")}

    with Loop(
        stage, fitting.steps, fitting.optimizer, trainable, data,
        log_every=run.setup.log_every,
        heldout=measure if heldout and run.setup.heldout.every else None,
    ) as loop:  # fmt: skip
        train_step = loop.train_step(
            critique_objective(run, trainable.assemble),
            micro_batches=micro_batches(fitting.batch_size, fitting.device_batch, run.mesh),
        )
        for _ in loop:
            batch = loop.next_batch()
            loop.take(train_step, batch, Work.of(run.model, batch))
        params = trainable.whole(loop.state.params)
    if heldout:
        figures = validate(run, params, heldout, fitting.batch_size)
        # JSON has no NaN: an AUC of critiques that are all right, or all wrong, is null.
        finite = {name: v if math.isfinite(v) else None for name, v in figures.items()}
        if first():
            with written_whole(stage.directory / "heldout.json") as partial:
                partial.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        log.info("meta_rm held out %s", shown)
    else:
        log.warning("meta_rm: no critiques are held out to validate on; raise --meta-rm.holdout")
    stage.finish(params)


def usable_records(run: Run, config: MetaRM) -> list[Preference]:
    """The records that the GRM is sampled on for the meta RM. Raises DataError as `inputs.usable`
    does.
    """
    if not config.samples:
        return []
    new, lengths = config.sampling.max_new_tokens, run.lengths
    readings = [
        sampled(run, "meta_rm", lengths.judge, new),
        learnt(run, "meta_rm", config.fitting, lengths.meta, new, "meta RM's prompt"),
    ]
    # From the end: the records that earlier stages, which begin at the front, saw least.
    return usable(run, "meta_rm", readings, config.records, from_end=True)


def earlier_rows(run: Run, config: MetaRM) -> list[Trajectory]:
    """Critiques that earlier stages have written. Raises ConfigError where they are missing."""
    rows: list[Trajectory] = []
    if config.rft_trajectories:
        file = run.directory / "rft" / "trajectories.jsonl"
        if not file.exists():
            raise ConfigError(
                f"--meta-rm.rft-trajectories needs {file}; run the rft stage first or give "
                "--meta-rm.no-rft-trajectories"
            )
        rows += [row for row in _trajectories(file) if not row.hinted]
    if config.rollouts:
        file = run.directory / "rl" / "rollouts.jsonl"
        if not file.exists():
            raise ConfigError(
                f"--meta-rm.rollouts needs {file}; run the rl stage with --rl.save-rollouts first "
                "or give --meta-rm.no-rollouts"
            )
        rows += _trajectories(file)
    return rows


def sampled_rows(
    stage: Stage, config: MetaRM, grm: str, records: Sequence[Preference]
) -> list[Trajectory]:
    """Critiques of the GRM to be guided, labelled by Eq. (10), `config.samples` for each record.
    They are sampled where the file is missing; when it was stopped, from the next chunk on."""
    run, file = stage.run, stage.directory / "samples.jsonl"
    if not records:
        return []
    if file.exists():
        return _trajectories(file)
    params = run.sampler.take(run.params(grm, dtype=run.model.compute_dtype))
    critic, key = run.new_critic("one"), run.stage_key("meta_rm")

    def draw(part: Sequence[Preference], progress: Callable[[int], None]) -> Iterator[Trajectory]:
        # In an order of its own, not the one in which the GRM was trained on the record.
        critiques = critic.critiques(
            params, part, range(config.samples), config.sampling, key, salt="meta_rm",
            progress=progress,
        )  # fmt: skip
        for record in part:
            for critique in critiques[record.id]:
                correct = is_correct(
                    critique.scores, record.labels, threshold=critic.prompts.single.threshold
                )
                yield to_trajectory(record, critique, correct, kept=True)

    sample_in_chunks(file, records, draw, chunk=CHUNK, rows_each=config.samples, what="meta_rm")
    return _trajectories(file)


def _trajectories(file: Path) -> list[Trajectory]:
    return [row for row in read_trajectories(file) if isinstance(row, Trajectory)]


def read(run: Run, config: MetaRM, rows: Sequence[Trajectory]) -> list[Row]:
    """Critiques with their examples: tokens as the meta RM reads them, and the label. Those that
    are too long are skipped or an error, as in `inputs.fitting_rows`.

    Unparsable critiques are left out: they never take part in a vote.
    """
    parsable = [row for row in rows if row.scores is not None]
    examples = [
        meta_example(
            row.query,
            row.shown,
            row.text,
            run.tokenizer,
            run.templates.meta,
            label(row, config, run.templates.single.threshold),
            reference=row.reference,
            principles=row.principles,
        )
        for row in parsable
    ]
    kept = fitting_rows(run, "meta_rm", config.fitting, examples)
    return [(parsable[index], examples[index]) for index in kept]


def _decisive(run: Run, row: Trajectory) -> bool:
    assert row.scores is not None
    return decisive(row.scores, threshold=run.templates.single.threshold)


def _no_ties(config: MetaRM) -> str:
    return "" if config.tie != "leave-out" else ", nor are those with a shared top score"


def label(row: Trajectory, config: MetaRM, threshold: float | None) -> float:
    """What the meta RM learns to say of a critique: the probability that it is correct."""
    if config.tie != "expected" or row.labels is None:
        return float(bool(row.correct))
    reward = rule_reward(row.scores, row.labels, tie="expected", threshold=threshold)
    return (reward + 1.0) / 2.0


def validate(run: Run, params: Params, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    """Figures of held-out critiques; `critiques` is their number.

    accuracy: at probability one half; loss: the binary cross-entropy; auc: of all; within items,
    each item counting once: auc_within_item of all, auc_ties of right ones against those whose top
    score is shared, auc_decisive of right against wrong ones whose top score is not shared.
    """
    examples = [example for _, example in rows]
    scores = score_examples(
        params, run.model, examples, run.setup.length_buckets, batch_size, run.mesh,
        run.setup.engine.prefill_tokens,
    )  # fmt: skip
    labels = np.asarray([example.label for example in examples])
    correct = np.asarray([bool(row.correct) for row, _ in rows])
    alone = np.asarray([_decisive(run, row) for row, _ in rows])
    items = np.asarray([row.example_id for row, _ in rows])

    def within(chosen: np.ndarray) -> float:
        return mean_auc_within(scores[chosen], correct[chosen], items[chosen].tolist())

    return {
        "accuracy": float(np.mean((scores > 0) == (labels > 0.5))),
        "loss": float(np.mean(np.logaddexp(0.0, scores) - labels * scores)),
        "auc": roc_auc(scores, correct),
        "auc_within_item": within(np.ones(len(rows), bool)),
        "auc_ties": within(correct | ~alone),
        "auc_decisive": within(alone),
        "critiques": float(len(rows)),
    }


def critique_objective(run: Run, assemble: Assemble = as_it_is) -> LossFn:
    """Binary cross-entropy of whether critiques are correct; `assemble`: see
    `Trainable.assemble`."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        params = assemble(params, frozen)
        return bce_loss(*critique_scores(params, model, batch, remat=setup.remat))

    return loss_fn
