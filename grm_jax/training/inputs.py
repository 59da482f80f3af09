"""Records that a stage can learn from, found before anything is sampled, trained or written.

    record -> each prompt that the stage makes of it, in every order of the responses -> tokens
           -> within the limits: kept | too long: an error, left out, or cut in the middle
           -> can not be rendered (no place for its reference, too many responses, roles that the
              chat template refuses): an error that names file and line, or a bad row left out

Each stage lists its prompts as `Reading`s; the whole road asks for those of all its stages at its
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
from grm_jax.training.run import Run
from grm_jax.training.setup import Fitting

log = logging.getLogger("grm_jax")


def sampled(run: Run, stage: str, tokens: Tokens, new: int) -> Reading:
    """A prompt that critiques of up to `new` tokens are drawn for."""
    limit = run.model.max_position - new
    positions = f"the model has {run.model.max_position:,} positions"
    fix = f"give a smaller {_option(stage, 'sampling.max-new-tokens')} ({positions})"
    return Reading("prompt", tokens, limit, fix)


def learnt(
    run: Run, stage: str, fitting: Fitting, tokens: Tokens, new: int, what: str = "prompt"
) -> Reading:
    """A prompt that is learnt from with up to `new` tokens after it."""
    room, fix = row_length(run, stage, fitting)
    after = f" (a critique of up to {new:,} tokens follows)" if new else ""
    return Reading(what, tokens, room - new, fix + after)


def row_length(run: Run, stage: str, fitting: Fitting) -> tuple[int, str]:
    """Most tokens of a training row, and how to have more."""
    room, fix = run.setup.length_buckets[-1], "raise --length-buckets"
    if fitting.pack:
        room, fix = fitting.pack, f"raise {_option(stage, 'fitting.pack')}"
    if room <= run.model.max_position:
        return room, fix
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
    """The run's records as the stage can read them: all, or with what `--long-prompts` and
    `--skip-bad-rows` make of the others. Looked at once for each stage of a run.

    Args:
      most: the most records to use, from the first one on or, with `from_end`, from the last one
        back; the records after these are not read.

    Raises DataError for a record that can not be rendered or is too long, naming its file and line;
    with `--skip-bad-rows`, for a larger share of bad rows than `--max-bad-share`; and where none is
    left.
    """
    if stage not in run.usable:
        records = run.records[::-1] if from_end else run.records
        chosen = readable(run, stage, readings, records, most or len(records))
        run.usable[stage] = chosen[::-1] if from_end else chosen
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
    cut = same = 0
    for record in records:
        if len(kept) == most:
            break
        try:
            over = next((r for r in readings if r.excess(record) > 0), None)
        except UserError as error:
            bad.append(_refused(error, record, stage))
            if not skip:
                raise bad[0] from error
            continue
        if over is None:
            kept.append(record)
            continue
        long.append(_too_long(over, record, stage))
        if policy == "truncate-middle":
            short = shorten(record, lambda r: max(reading.excess(r) for reading in readings))
            if is_decidable(short):
                kept.append(short)
                cut += 1
            else:
                same += 1
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
        log.warning("%s: %d bad rows left out; the first: %s", stage, len(bad), bad[0])
    if not kept:
        raise (long or bad)[0]
    if long and policy == "skip":
        log.warning("%s: %d records left out as too long; first: %s", stage, len(long), long[0])
    if cut or same:
        log.warning("%s: %d records cut in the middle; the first: %s", stage, cut + same, long[0])
    if same:
        log.warning(
            "%s: %d of them left out: their responses differ only in what was cut", stage, same
        )
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
    """Indices of the examples that fit a training row. Longer ones are an error unless
    `--long-prompts` says otherwise; then they are left out: a text that is learnt is never cut.

    Args:
      places: "file:line" of each, where it is known.

    Raises DataError for one that is too long, and where all are.
    """
    limit, fix = row_length(run, stage, fitting)
    kept = [index for index, example in enumerate(examples) if example.length <= limit]
    if len(kept) == len(examples):
        return kept
    fits = frozenset(kept)
    long = next(index for index in range(len(examples)) if index not in fits)
    left_out = len(examples) - len(kept)
    error = DataError(
        "",
        f"{examples[long].length:,} tokens; the {stage} stage takes {limit:,} ({left_out} of "
        f"{len(examples)} examples are too long for it)",
        f"{fix}, or give --long-prompts skip (those left out are counted)",
        places[long] if places else f"example {long + 1}",
    )
    if run.setup.long_prompts == "error" or not kept:
        raise error
    log.warning("%s: %d examples left out as too long; first: %s", stage, left_out, error)
    return kept
