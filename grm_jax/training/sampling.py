"""Critiques of many records, written chunk by chunk: a stopped stage resumes with the next chunk.

records -> chunk -> draw(chunk, progress) -> trajectories -> FILE.partial, flushed -> ... -> FILE

A chunk that was not finished is sampled again from its start, so that batches, and with them all
bits, are those of a run without an interruption. A signal ends the sampling at once; the current
chunk is lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from grm_jax import files, stopping
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory
from grm_jax.judge.critiques import chunks
from grm_jax.metrics import Progress
from grm_jax.parallel.multihost import barrier, first

Draw = Callable[[Sequence[Preference], Callable[[int], None]], Iterable[Trajectory]]
"""(records, progress) -> their trajectories, record by record. `progress` is called with the number
of critiques that have ended, as they end."""


def sample_in_chunks(
    file: Path,
    records: Sequence[Preference],
    draw: Draw,
    *,
    chunk: int,
    rows_each: int,
    what: str,
) -> None:
    """Write the trajectories of all records to `file`, which appears when it is complete.

    Args:
      draw: makes `rows_each` trajectories of each record. All processes call it together; the first
        one writes.
      chunk: how many records are sampled between two writes.
      what: the name of the work, for progress and messages.

    Raises stopping.Stopped when a signal ends it; complete chunks are kept.
    """
    partial = file.with_name(file.name + ".partial")
    done = resume(partial, chunk=chunk, rows_each=rows_each, total=len(records))
    barrier(f"{what}: resumed")
    critiques = len(records) * rows_each
    progress = Progress(f"{what} sampling", critiques, done=done * rows_each)
    target = partial if first() else Path(os.devnull)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.named(target), target.open("a", encoding="utf-8") as out:
        try:
            for part in chunks(records[done:], chunk):
                for row in list(draw(part, progress.update)):
                    line = {k: v for k, v in dataclasses.asdict(row).items() if v is not None}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                done += len(part)
        except KeyboardInterrupt as signal:
            message = f"{what} saved after {done} of {len(records)} records"
            raise stopping.Stopped(message, terminated=stopping.terminated(signal)) from None
    if first():
        partial.rename(file)
    barrier(f"{what}: sampled")


def resume(partial: Path, *, chunk: int, rows_each: int, total: int) -> int:
    """The number of records in complete chunks of the partial file, which is truncated to them."""
    if not partial.exists():
        return 0
    # In bytes, since an incomplete last line may end within a character.
    ends, position = [], 0
    with partial.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                position += len(line)
                ends.append(position)
    done = len(ends) // rows_each
    # Complete chunks only, so that batches are those of a run without an interruption.
    done = done if done == total else done // chunk * chunk
    barrier("sampling: read")
    if first():
        os.truncate(partial, ends[done * rows_each - 1] if done else 0)
    return done
