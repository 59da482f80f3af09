"""The Bradley-Terry baseline: a scalar reward model on the same backbone and preferences.

    records -> (better, worse) pairs -> -log sigmoid(score difference) -> scalar_rm/model

Single responses form no pairs. So that the baseline can judge them too, a threshold is chosen after
training, on the single responses of the training records: a response with a higher score counts as
correct (`calibration.json`; null where there are none to choose it on).
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grm_jax.data.collate import Batch, Example, collate_rows
from grm_jax.data.examples import reply_example
from grm_jax.data.loader import batches, group_by_length
from grm_jax.data.preferences import Preference
from grm_jax.files import written_whole
from grm_jax.judge.scalar import ScalarRM as ScalarModel
from grm_jax.model.batch import row_scores
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import local_rows
from grm_jax.parallel.multihost import first
from grm_jax.training.heldout import Measure, heldout_records
from grm_jax.training.inputs import learnt, usable
from grm_jax.training.lengths import Reading
from grm_jax.training.loop import Loop, Work
from grm_jax.training.losses import Loss, bradley_terry_loss
from grm_jax.training.options import ScalarRM
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import ConfigError
from grm_jax.training.step import LossFn, micro_batches
from grm_jax.training.trainable import Assemble, Trainable, as_it_is

log = logging.getLogger("grm_jax")


Pair = tuple[Example, Example]


def run_scalar_rm(run: Run, config: ScalarRM, init: str | None = None) -> None:
    """Train the baseline from `init` (default: `config.start`)."""
    start = init or config.start
    stage = Stage(run, "scalar_rm", config, init, [start])
    if stage.done:
        return
    if config.fitting.pack:
        raise ConfigError(
            "scalar_rm learns from pairs, which are not packed; give --scalar-rm.fitting.pack 0"
        )
    records = usable_records(run, config)
    heldout = measured_records(run, config)
    pairs = [pair for record in records for pair in preference_pairs(run, record)]
    log.info("scalar_rm        %d pairs of %d records", len(pairs), len(records))
    stage.begin()
    groups = group_by_length(
        pairs, lambda p: max(p[0].length, p[1].length), run.setup.length_buckets, "pairs"
    )
    collators = {
        bucket: (lambda items, length=bucket: collate_pairs(items, length)) for bucket in groups
    }
    size = config.fitting.batch_size
    data = batches(groups, collators, size, run.setup.seed, local_rows(run.mesh, size))
    fitting, trainable = config.fitting, Trainable(run, start, num_labels=1)
    with Loop(
        stage, fitting.steps, fitting.optimizer, trainable, data,
        log_every=run.setup.log_every, heldout=pair_accuracy(run, heldout, fitting.batch_size),
    ) as loop:  # fmt: skip
        train_step = loop.train_step(
            preference_objective(run, trainable.assemble),
            micro_batches=micro_batches(fitting.batch_size, fitting.device_batch, run.mesh),
        )
        for _ in loop:
            batch = loop.next_batch()
            loop.take(train_step, batch, Work.of(run.model, batch))
        params = trainable.whole(loop.state.params)
    threshold = calibrate(run, params, records, config.fitting.batch_size)
    if first():
        text = json.dumps({"threshold": threshold}) + "\n"
        with written_whole(stage.directory / "calibration.json") as partial:
            partial.write_text(text, encoding="utf-8")
    stage.finish(params)


def usable_records(run: Run, config: ScalarRM) -> list[Preference]:
    """The records to learn from, each response as the last turn of its conversation. Raises
    DataError as `inputs.usable` does, ConfigError where no record holds a pair.
    """
    records = usable(run, "scalar_rm", [_reading(run, config)])
    if all(len(set(record.labels)) < 2 for record in records):
        raise ConfigError(
            f"scalar_rm learns from pairs of a better and a worse response, and none of the "
            f"{len(records)} records has two responses (single responses alone can not train it); "
            "give --preferences with some, or train the other stages one by one"
        )
    return records


def measured_records(run: Run, config: ScalarRM) -> list[Preference]:
    """The held-out records; see `heldout.heldout_records`."""
    return heldout_records(run, "scalar_rm", [_reading(run, config)], run.records)


def _reading(run: Run, config: ScalarRM) -> Reading:
    what = "conversation and response"
    return learnt(run, "scalar_rm", config.fitting, run.lengths.reply, 0, what)


def preference_pairs(run: Run, record: Preference) -> list[Pair]:
    """Every (better, worse) pair of the record's responses."""
    examples = [reply_example(record.turns, text, run.tokenizer) for text in record.responses]
    pairs = []
    for a, b in itertools.combinations(range(len(examples)), 2):
        if record.labels[a] != record.labels[b]:
            better, worse = (a, b) if record.labels[a] > record.labels[b] else (b, a)
            pairs.append((examples[better], examples[worse]))
    return pairs


def collate_pairs(pairs: Sequence[Pair], length: int) -> Batch:
    """tokens [P, 2, T], lengths [P, 2]: the better response first."""
    rows = collate_rows([example for pair in pairs for example in pair], length=length)
    return {
        "tokens": rows["tokens"].reshape(len(pairs), 2, length),
        "lengths": rows["lengths"].reshape(len(pairs), 2),
    }


def reply_scores(
    run: Run, params: Params, records: Sequence[Preference], batch_size: int
) -> list[tuple[float, ...]]:
    """The score of each response of each record; a higher one is better."""
    model = ScalarModel(run.model, params, run.setup.length_buckets, run.tokenizer, batch_size)
    asked = [(record.turns, record.responses) for record in records]
    return model.scores(asked, run.mesh, run.setup.engine.prefill_tokens)


def pair_accuracy(run: Run, records: Sequence[Preference], batch_size: int) -> Measure | None:
    """Measures the pairs of held-out records; None where there are no records, or no pairs.

    Returns a function of the parameters; its metrics are `accuracy`, the share of pairs whose
    better response has the higher score, `loss`, Bradley-Terry's, and `n`, the number of pairs.
    """
    pairs = [
        (place, better, worse)
        for place, record in enumerate(records)
        for better, worse in itertools.permutations(range(len(record.labels)), 2)
        if record.labels[better] > record.labels[worse]
    ]
    if records and not pairs:
        log.warning("scalar_rm: the held-out records have no pairs, so nothing is measured on them")
    if not pairs:
        return None

    def measure(params: Params) -> dict[str, float]:
        scores = reply_scores(run, params, records, batch_size)
        margins = np.asarray([scores[i][better] - scores[i][worse] for i, better, worse in pairs])
        return {
            "accuracy": float(np.mean(margins > 0)),
            "loss": float(np.mean(np.logaddexp(0.0, -margins))),
            "n": float(len(pairs)),
        }

    return measure


def calibrate(
    run: Run, params: Params, records: Sequence[Preference], batch_size: int
) -> float | None:
    """The score that best separates right from wrong single responses of the training records; None
    where there are none."""
    singles = [record for record in records if len(record.responses) == 1]
    if not singles:
        return None
    scores = np.asarray([s[0] for s in reply_scores(run, params, singles, batch_size)])
    labels = np.asarray([record.labels[0] for record in singles]) > 0.5
    order = np.argsort(scores)
    scores, labels = scores[order], labels[order]
    # For a threshold below each score: correct are labels of 0 below it, and labels of 1 above it.
    below = np.concatenate([[0], np.cumsum(~labels)])
    above = labels.sum() - np.concatenate([[0], np.cumsum(labels)])
    cut = int(np.argmax(below + above))
    edges = np.concatenate([[scores[0] - 1], scores, [scores[-1] + 1]])
    return float((edges[cut] + edges[cut + 1]) / 2)


def preference_objective(run: Run, assemble: Assemble = as_it_is) -> LossFn:
    """Bradley-Terry's: -log sigmoid of the difference of a pair's scores; `assemble`: see
    `Trainable.assemble`."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        params = assemble(params, frozen)
        pairs, _, length = batch["tokens"].shape
        tokens, lengths = batch["tokens"].reshape(2 * pairs, length), batch["lengths"].reshape(-1)
        scores = row_scores(params, model, tokens, lengths, remat=setup.remat).reshape(pairs, 2)
        return bradley_terry_loss(scores[:, 0], scores[:, 1], jnp.ones(pairs, jnp.float32))

    return loss_fn
