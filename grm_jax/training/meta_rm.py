"""The meta RM (section 4): a scalar head that judges critiques, trained with BCE.

    RFT's non-hinted trajectories + samples of the trained GRM (+ RL's rollouts)
        -> label = correct by Eq. (10) -> (query, responses | critique) -> fit -> meta_rm/model

A share of the records is held out; accuracy and ROC-AUC of the critiques on them are written to
`meta_rm/heldout.json`, the AUC also within items: can it tell right from wrong critiques of the
same responses, which is what guided voting needs?
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.statistics import mean_auc_within, roc_auc
from grm_jax.config import ConfigError, MetaRM
from grm_jax.critique import is_correct
from grm_jax.data.loader import Example, example_batches
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory, read_trajectories
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import local_rows
from grm_jax.parallel.multihost import first
from grm_jax.sampler.scoring import score_examples
from grm_jax.training.examples import meta_example
from grm_jax.training.fit import fit
from grm_jax.training.objectives import critique_objective
from grm_jax.training.rft import to_trajectory
from grm_jax.training.run import Run, Stage
from grm_jax.training.sampling import sample_in_chunks

log = logging.getLogger("grm_jax")

CHUNK = 256  # records sampled between two writes to disk


def run_meta_rm(run: Run, config: MetaRM, init: str | None = None) -> None:
    """Train the meta RM that guides the GRM `init` (default: the rl stage)."""
    needs = [config.start, *([init or "rl"] if config.samples else [])]
    stage = Stage(run, "meta_rm", config, init, needs)
    if stage.done:
        return
    stage.begin()
    rows = collect(stage, config, init or "rl")
    heldout = [row for row in rows if held_out(row.id, config.holdout)]
    training = [row for row in rows if not held_out(row.id, config.holdout)]
    right = float(np.mean([bool(row.correct) for row in training]))
    log.info(
        "meta_rm          %d critiques, %.1f%% correct; %d held out",
        len(training), 100 * right, len(heldout),
    )  # fmt: skip
    examples = meta_examples(run, training)

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
    objective = critique_objective(run)
    params = fit(stage, config.fitting, data, objective, config.start, num_labels=1)
    if heldout:
        figures = validate(run, params, heldout, config.fitting.batch_size)
        # JSON has no NaN: an AUC of critiques that are all right, or all wrong, is null.
        known = {name: v if math.isfinite(v) else None for name, v in figures.items()}
        if first():
            (stage.directory / "heldout.json").write_text(json.dumps(known, indent=2) + "\n")
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        log.info("meta_rm held out %s", shown)
    else:
        log.warning("meta_rm: no critiques held out, nothing validated; raise meta_rm.holdout")
    stage.finish(params)


def collect(stage: Stage, config: MetaRM, grm: str) -> list[Trajectory]:
    """Labelled, readable critiques from the earlier stages and from the GRM to be guided."""
    run = stage.run
    rows: list[Trajectory] = []
    if config.rft_trajectories:
        file = run.directory / "rft" / "trajectories.jsonl"
        if not file.exists():
            raise ConfigError(
                f"meta_rm.rft_trajectories needs {file}; run the rft stage first or give "
                "--meta-rm.no-rft-trajectories"
            )
        rows += [row for row in _trajectories(file) if not row.hinted]
    if config.rollouts:
        file = run.directory / "rl" / "rollouts.jsonl"
        if not file.exists():
            raise ConfigError(
                f"meta_rm.rollouts needs {file}; run the rl stage with save_rollouts first or give "
                "--meta-rm.no-rollouts"
            )
        rows += _trajectories(file)
    if config.samples:
        file = stage.directory / "samples.jsonl"
        if not file.exists():
            sample_grm(run, config, grm, file)
        rows += _trajectories(file)
    # An unreadable critique never reaches a vote, so there is nothing to learn about it.
    return [row for row in rows if row.scores is not None]


def _trajectories(file) -> list[Trajectory]:
    return [row for row in read_trajectories(file) if isinstance(row, Trajectory)]


def sample_grm(run: Run, config: MetaRM, grm: str, file: Path) -> None:
    """Write critiques of the trained GRM, labelled by Eq. (10); resumed chunk by chunk."""
    # From the end: the records that earlier stages, which begin at the front, saw least.
    records = run.records[-(config.records or len(run.records)) :]
    params = run.params(grm, dtype=run.model.compute_dtype)
    critic, key = run.critic("one"), run.stage_key("meta_rm")

    def draw(part: Sequence[Preference]) -> Iterator[Trajectory]:
        found = critic.critiques(params, part, range(config.samples), config.sampling, key)
        for record in part:
            for critique in found[record.id]:
                correct = is_correct(critique.scores, record.labels)
                yield to_trajectory(record, critique, correct, kept=True)

    sample_in_chunks(file, records, draw, chunk=CHUNK, rows_each=config.samples, what="meta_rm")


def meta_examples(run: Run, rows: Sequence[Trajectory]) -> list[Example]:
    """What the meta RM reads, with its labels."""
    template = run.templates.meta
    return [
        meta_example(
            row.query,
            row.responses,
            row.critique,
            run.tokenizer,
            template,
            float(bool(row.correct)),
            reference=row.reference,
            principles=row.principles,
        )
        for row in rows
    ]


def held_out(record_id: str, share: float) -> bool:
    """Whether a record's critiques are kept for validation; depends on its id alone."""
    digest = hashlib.blake2b(record_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < share * 2**32


def validate(
    run: Run, params: Params, rows: Sequence[Trajectory], batch_size: int
) -> dict[str, float]:
    """Accuracy at probability one half, ROC-AUC, ROC-AUC within items, of held-out critiques."""
    examples = meta_examples(run, rows)
    scores = score_examples(
        params, run.model, examples, run.setup.length_buckets, batch_size, run.mesh,
        run.setup.engine.prefill_tokens,
    )  # fmt: skip
    labels = np.asarray([example.label for example in examples])
    return {
        "accuracy": float(np.mean((scores > 0) == (labels > 0.5))),
        "auc": roc_auc(scores, labels),
        "auc_within_item": mean_auc_within(scores, labels, [row.id for row in rows]),
        "critiques": float(len(rows)),
    }
