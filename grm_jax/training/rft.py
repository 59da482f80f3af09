"""Rejective fine-tuning (section 3.2): sample critiques, reject some, train on those that are kept.

    records -> N_RFT non-hinted + 1 hinted critique each -> reject -> trajectories.jsonl -> train

Rejected are incorrect trajectories (Eq. 10), and the non-hinted trajectories of a record if all
N_RFT of them are correct, since it is too easy. `rft/trajectories.jsonl` holds every trajectory
with its label; the meta RM learns from the non-hinted ones, right and wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grm_jax.critique import is_correct, keep_hinted, keep_rft
from grm_jax.critique.parse import commonest_boxes, one_line
from grm_jax.data.collate import Example
from grm_jax.data.examples import trajectory_example
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory, read_trajectories, to_trajectory
from grm_jax.errors import UserError
from grm_jax.judge.critiques import Rollout
from grm_jax.training.heldout import critique_records
from grm_jax.training.inputs import fitting_rows, learnt, sampled, usable
from grm_jax.training.loop import require_checkpoint_room
from grm_jax.training.options import RFT
from grm_jax.training.relabel import relabelled
from grm_jax.training.rewards import token_weights
from grm_jax.training.run import Run, Stage
from grm_jax.training.sampling import sample_in_chunks
from grm_jax.training.setup import ConfigError
from grm_jax.training.sft import train_on
from grm_jax.training.trainable import Trainable

log = logging.getLogger("grm_jax")


def run_rft(run: Run, config: RFT, init: str | None = None) -> None:
    """Sample from `init` (default: the sft stage), reject, train it on the kept trajectories."""
    check(run, config)
    start = init or "sft"
    stage = Stage(run, "rft", config, init, [start])
    if stage.done:
        return
    records = usable_records(run, config)
    heldout = critique_records(run, "rft", run.records)
    stage.begin()
    file = stage.directory / "trajectories.jsonl"
    if not file.exists():
        fitting = config.fitting
        require_checkpoint_room(stage, fitting.steps, fitting.optimizer, Trainable(run, start))
        sample_trajectories(stage, config, start, records, file)
    rows = [row for row in read_trajectories(file) if isinstance(row, Trajectory)]
    report(rows, config)
    kept = to_learn(run, config, rows)
    if not kept:
        raise UserError(
            f"rft kept none of {len(rows)} trajectories; look at {file}: the start model writes no "
            "correct critiques, or all of them are (too easy)"
        )
    train_on(stage, config.fitting, as_examples(run, config, kept, file), start, heldout)


def check(run: Run, config: RFT) -> None:
    """Raise ConfigError for options that do not go together, before anything is sampled."""
    drawn = config.samples + config.hinted
    if config.orders > drawn:
        raise ConfigError(
            f"--rft.orders {config.orders}: {drawn} critiques of a record can not be sampled in "
            f"more than {drawn} orders; give --rft.samples {config.orders - config.hinted} or more"
        )
    if config.relabel and run.templates.many.reads == "index":
        raise ConfigError(
            "--rft.relabel exchanges the scores of two responses, and the template "
            f"{run.setup.templates.many!r} asks for the place of the best one; leave it out"
        )


def to_learn(run: Run, config: RFT, rows: Sequence[Trajectory]) -> list[Trajectory]:
    """The kept trajectories; with `config.relabel` the wrong ones, too, as far as they can be
    relabelled. The file keeps them as they were written, for the meta RM."""
    kept = [row for row in rows if row.kept]
    if not config.relabel:
        return kept
    wrong = [row for row in rows if not row.correct]
    exchanged = [relabelled(row, run.templates) for row in wrong]
    found = [row for row in exchanged if row is not None]
    log.info("rft              %d of %d wrong critiques relabelled", len(found), len(wrong))
    return kept + found


def as_examples(run: Run, config: RFT, kept: Sequence[Trajectory], file: Path) -> list[Example]:
    """The trajectories to learn as tokens, those before the verdict with the weight `text_weight`.
    Those that are too long are skipped or an error, as in `inputs.fitting_rows`: a text that was
    sampled may have more tokens when it is written again.
    """
    examples = [trajectory_example(row, run.tokenizer, run.templates) for row in kept]
    if config.text_weight != 1.0:
        examples = [
            dataclasses.replace(
                example,
                weights=token_weights(
                    example.completion, row.text, len(row.order), config.text_weight,
                    run.tokenizer.decode,
                ),
            )
            for example, row in zip(examples, kept, strict=True)
        ]  # fmt: skip
    places = [f"{file}: sample {row.sample} of {row.example_id!r}" for row in kept]
    fits = fitting_rows(run, "rft", config.fitting, examples, places)
    return [examples[index] for index in fits]


def usable_records(run: Run, config: RFT) -> list[Preference]:
    """The records for which critiques are sampled. Their prompts must fit with and without the hint
    for sampling, and without it for training. Raises DataError as `inputs.usable` does.
    """
    new, lengths = config.sampling.max_new_tokens, run.lengths
    readings = [sampled(run, "rft", lengths.judge, new)]
    readings.append(learnt(run, "rft", config.fitting, lengths.judge, new))
    if config.hinted:
        readings.append(sampled(run, "rft", lengths.hinted, new))
    return usable(run, "rft", readings, config.records)


def sample_trajectories(
    stage: Stage, config: RFT, start: str, records: Sequence[Preference], file: Path
) -> None:
    """Write the trajectories of every record; when it was stopped, from the next chunk on."""
    run = stage.run
    params = run.sampler.take(run.params(start, dtype=run.model.compute_dtype))
    critic, key = run.new_critic(config.orders), run.stage_key("rft")

    def draw(part: Sequence[Preference], progress: Callable[[int], None]) -> Iterator[Trajectory]:
        plain = critic.critiques(
            params, part, range(config.samples), config.sampling, key, salt="rft",
            progress=progress,
        )  # fmt: skip
        hinted = {}
        if config.hinted:
            # Its own sample index gives it its own randomness, and the next order in turn.
            hinted = critic.critiques(
                params, part, [config.samples], config.sampling, key, hinted=True, salt="rft",
                progress=progress,
            )  # fmt: skip
        for record in part:
            yield from _judge(
                record, plain[record.id], hinted.get(record.id, []),
                critic.prompts.single.threshold, relabel=config.relabel,
            )  # fmt: skip

    sample_in_chunks(
        file, records, draw,
        chunk=config.chunk, rows_each=config.samples + config.hinted, what="rft",
    )  # fmt: skip


def _judge(
    record: Preference,
    plain: list[Rollout],
    hinted: list[Rollout],
    threshold: float | None = None,
    *,
    relabel: bool = False,
) -> Iterator[Trajectory]:
    """The trajectories of a record, with whether they are correct and kept."""
    corrects = [is_correct(c.scores, record.labels, threshold=threshold) for c in plain]
    keep = corrects if relabel else keep_rft(corrects)
    for critique, correct, kept in zip(plain, corrects, keep, strict=True):
        yield to_trajectory(record, critique, correct, kept=kept)
    for critique in hinted:
        correct = is_correct(critique.scores, record.labels, threshold=threshold)
        yield to_trajectory(record, critique, correct, kept=keep_hinted(correct), hinted=True)


def report(rows: list[Trajectory], config: RFT) -> None:
    """Log how many trajectories were drawn, correct, too easy and kept, and why some are
    unparsable."""
    plain = [row for row in rows if not row.hinted]
    hinted = [row for row in rows if row.hinted]
    for name, group in (("non-hinted", plain), ("hinted", hinted)):
        if group:
            correct = sum(bool(row.correct) for row in group) / len(group)
            unparsable = sum(row.failure is not None for row in group) / len(group)
            log.info(
                "rft %-12s %d trajectories: %.1f%% correct, %.1f%% unparsable, %d kept",
                name, len(group), 100 * correct, 100 * unparsable, sum(row.kept for row in group),
            )  # fmt: skip
    failures = collections.Counter(row.failure for row in rows if row.failure is not None)
    boxes = commonest_boxes((row.failure, row.text) for row in rows)
    for kind, count in failures.most_common():
        box, times = boxes.get(kind, ("", 0))
        shown = f"; the commonest box ({times:,} times): {one_line(box)}" if box else ""
        log.info("rft unparsable   %s: %d critiques%s", kind, count, shown)
    if not config.relabel:
        easy = sum(bool(row.correct) and not row.kept for row in plain) // max(1, config.samples)
        log.info("rft              %d records too easy (all %d correct)", easy, config.samples)
