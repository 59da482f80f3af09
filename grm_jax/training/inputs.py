"""The records that a stage can learn from, selected before anything is sampled, trained or written.

    record -> each prompt that the stage makes of it, in every order of the responses -> tokens
           -> within the limits: kept | too long: an error, skipped, or cut in the middle
           -> can not be rendered (the template does not show its reference, too many responses,
              roles that the chat template refuses): an error that names file and line, or skipped

Each stage lists its prompts as `Reading`s; the pipeline checks those of all its stages at its
start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from grm_jax.data.collate import Example
from grm_jax.data.long_prompts import is_decidable, shorten
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.errors import UserError
from grm_jax.training.lengths import Reading, Tokens
from grm_jax.training.options import Fitting
from grm_jax.training.run import Run

log = logging.getLogger("grm_jax")


def sampled(run: Run, stage: str, tokens: Tokens, new: int) -> Reading:
    """A prompt for which critiques of up to `new` tokens are sampled."""
    limit = run.model.max_position - new
    positions = f"the model has {run.model.max_position:,} positions"
    fix = f"give a smaller {_option(stage, 'sampling.max-new-tokens')} ({positions})"
    return Reading("prompt", tokens, limit, fix)


def learnt(
    run: Run, stage: str, fitting: Fitting, tokens: Tokens, new: int, what: str = "prompt"
) -> Reading:
    """A prompt that is in a training row, with up to `new` tokens after it, and the end token: a
    critique with all of its scores may reach the limit of sampling before it ends."""
    limit, fix = row_length(run, stage, fitting)
    if not new:
        return Reading(what, tokens, limit, fix)
    after = f" (a critique of up to {new:,} tokens and its end follow)"
    return Reading(what, tokens, limit - new - 1, fix + after)


def row_length(run: Run, stage: str, fitting: Fitting) -> tuple[int, str]:
    """The most tokens of a training row, and what raises this limit."""
    limit, fix = run.setup.length_buckets[-1], "raise --length-buckets"
    if fitting.pack:
        limit, fix = fitting.pack, f"raise {_option(stage, 'fitting.pack')}"
    if limit <= run.model.max_position:
        return limit, fix
    return run.model.max_position, f"the model has {run.model.max_position:,} positions"


def _option(stage: str, name: str) -> str:
    return f"--{stage.replace('_', '-')}.{name}"


def usable(
    run: Run,
    stage: str,
    readings: Sequence[Reading],
    most: int | None = None,
    *,
    from_end: bool = False,
) -> list[Preference]:
    """The run's records that the stage can learn from, after `--long-prompts` and `--skip-bad-rows`
    were applied to the others. They are checked once for each stage of a run.

    Args:
      readings: the prompts that the stage makes of a record.
      most: the most records to use, from the first one on or, with `from_end`, from the last one
        back; the records after these are not checked. None for all.

    Raises DataError for a record that can not be rendered or is too long, naming its file and line;
    with `--skip-bad-rows`, for a larger share of bad rows than `--max-bad-share`; and where no
    record remains.
    """
    if stage not in run.usable:
        records = run.records[::-1] if from_end else run.records
        chosen = readable(run, stage, readings, records, most or len(records))
        run.usable[stage] = chosen[::-1] if from_end else chosen
        run.lengths.counts.save()
    return run.usable[stage]


def readable(
    run: Run,
    stage: str,
    readings: Sequence[Reading],
    records: Sequence[Preference],
    most: int,
) -> list[Preference]:
    """The first `most` records that the stage can read; see `usable`."""
    policy, skip = run.setup.long_prompts, run.setup.skip_bad_rows
    kept: list[Preference] = []
    long: list[DataError] = []
    bad: list[DataError] = []
    shortened = undecidable = 0
    for record in records:
        if len(kept) == most:
            break
        try:
            exceeded = next((r for r in readings if r.excess(record) > 0), None)
        except UserError as error:
            bad.append(_refused(error, record, stage))
            if not skip:
                raise bad[0] from error
            continue
        if exceeded is None:
            kept.append(record)
            continue
        long.append(_too_long(exceeded, record, stage))
        if policy == "truncate-middle":
            short = shorten(record, lambda r: max(reading.excess(r) for reading in readings))
            if is_decidable(short):
                kept.append(short)
                shortened += 1
            else:
                undecidable += 1
    if long and policy == "error":
        raise _all_too_long(long)
    share = run.setup.max_bad_share
    if len(bad) > share * (len(kept) + len(long) + len(bad)):
        raise DataError(
            "",
            f"the {stage} stage can not read {len(bad)} rows, more than {100 * share:g}%; the "
            f"first: {bad[0]}",
            "correct the file, or give a larger --max-bad-share",
        )
    if bad:
        log.warning("%s: %d bad rows skipped; the first: %s", stage, len(bad), bad[0])
    if not kept:
        raise (long or bad)[0]
    if long and policy == "skip":
        log.warning(
            "%s: %d records skipped, which are too long; first: %s", stage, len(long), long[0]
        )
    if shortened or undecidable:
        count = shortened + undecidable
        log.warning("%s: %d records cut in the middle; the first: %s", stage, count, long[0])
    if undecidable:
        log.warning(
            "%s: %d of them skipped: their responses differ only in what was cut",
            stage, undecidable,
        )  # fmt: skip
    return kept


def _too_long(reading: Reading, record: Preference, stage: str) -> DataError:
    needed = reading.tokens(record, reading.limit)
    return DataError(
        reading.what,
        f"{needed:,} tokens; the {stage} stage takes {reading.limit:,}",
        f"{reading.fix}, or give --long-prompts skip or truncate-middle (both are counted)",
        record.source or f"record {record.id!r}",
    )


def _all_too_long(errors: Sequence[DataError]) -> DataError:
    first = errors[0]
    if len(errors) == 1:
        return first
    problem = f"{first.problem} ({len(errors)} records are too long for it)"
    return DataError(first.field, problem, first.fix, first.where)


def _refused(error: UserError, record: Preference, stage: str) -> DataError:
    source = record.source or f"record {record.id!r}"
    if isinstance(error, DataError):
        return error.at(source)
    return DataError(
        "", f"the {stage} stage can not read it: {error}",
        "change the row or the template, or leave such rows out with --skip-bad-rows", source,
    )  # fmt: skip


def fitting_rows(
    run: Run,
    stage: str,
    fitting: Fitting,
    examples: Sequence[Example],
    places: Sequence[str] = (),
) -> list[int]:
    """Indices of the examples that fit a training row. Longer ones are an error, unless
    `--long-prompts` says otherwise; then they are skipped, since a text to be learnt is never cut.

    Args:
      places: "file:line" of each example, if known.

    Raises DataError for one that is too long, and where all are.
    """
    limit, fix = row_length(run, stage, fitting)
    kept = [index for index, example in enumerate(examples) if example.length <= limit]
    if len(kept) == len(examples):
        return kept
    long = next(index for index, example in enumerate(examples) if example.length > limit)
    skipped = len(examples) - len(kept)
    error = DataError(
        "",
        f"{examples[long].length:,} tokens; the {stage} stage takes {limit:,} ({skipped} of "
        f"{len(examples)} examples are too long for it)",
        f"{fix}, or give --long-prompts skip (the skipped ones are counted)",
        places[long] if places else f"example {long + 1}",
    )
    if run.setup.long_prompts == "error" or not kept:
        raise error
    log.warning("%s: %d examples skipped, which are too long; first: %s", stage, skipped, error)
    return kept
