"""Metrics: a JSONL file, TensorBoard, and a progress line; the only file that knows them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from grm_jax import files
from grm_jax.errors import UserError

log = logging.getLogger("grm_jax")


def setup_logging() -> None:
    """One line a message; warnings of libraries only; process 0 alone speaks."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING, force=True)
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    # Orbax warns at every checkpoint that the data position holds no arrays; and it logs what it
    # raises, with the traceback of each of its threads, where one line says it.
    return "Skipping merge of" not in str(record.msg) and not record.exc_info


class StepLog:
    """A JSONL file whose rows carry a step, in their order; process 0 writes.

    Resuming reads from the end of the file, only the rows that are dropped and one more: the
    rollouts of a long run are gigabytes.

    Args:
      path: appended to.
      resume_step: rows of later steps are dropped, since they will be written again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self._path, self._file = path, None
        if jax.process_index() != 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop the rows of steps after `step`: they will be written again."""
        self.close()
        self.__init__(self._path, step)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        with files.named(self._path):
            for row in rows:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with files.named(self._path):
                self._file.close()


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """In this block a module that is not imported yet can not be imported."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[module]


class Board:
    """TensorBoard events, written by the thread that has them.

    tensorboardX has a writer that leaves it to another thread. A full disk ends that thread with a
    traceback, and the training then waits for it for ever; so only its records are used here.

    Args:
      resume_step: TensorBoard forgets what other files of the directory say of later steps.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        with _without("torch"):  # tensorboardX imports it where there is one, which takes seconds
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import masked_crc32c

        self._proto, self._summary, self._check = event_pb2, summary_pb2, masked_crc32c
        self._path = directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = self._path.open("ab")
        self._add(file_version="brain.Event:2")
        self._add(step=resume_step + 1, session_log={"status": "START"})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step. Raises OSError when they can not be written."""
        Value = self._summary.Summary.Value
        rows = [Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary.Summary(value=rows))

    def _add(self, **event: Any) -> None:
        data = self._proto.Event(wall_time=time.time(), **event).SerializeToString()
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", self._check(part)) for part in (size, data)]
        with files.named(self._path):
            self._file.write(size + checks[0] + data + checks[1])
            self._file.flush()

    def close(self) -> None:
        with files.named(self._path):
            self._file.close()


class MetricsWriter:
    """Metrics of a stage, in `metrics.jsonl` and as TensorBoard events; process 0 only."""

    def __init__(self, directory: Path, resume_step: int = 0):
        self._log = StepLog(directory / "metrics.jsonl", resume_step)
        self._board = Board(directory, resume_step) if jax.process_index() == 0 else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN; a metric that has none of its kind this step is null.
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        self._log.write([{"step": step, "time": round(time.time(), 3), **finite}])
        if self._board is not None:
            self._board.write(step, numbers)

    def close(self) -> None:
        try:
            self._log.close()
        finally:
            if self._board is not None:
                self._board.close()


def _cut(path: Path, step: int) -> None:
    """Drop all that follows the last whole row of `step` or an earlier one."""
    with path.open("r+b") as file:
        for start, line in _backwards(file):
            if _step_of(line) <= step:
                file.truncate(start + len(line))
                if not line.endswith(b"\n"):
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                return
        file.truncate(0)


def _backwards(file: BinaryIO, block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """Lines of a file from the last to the first, with their offsets; their ends belong to them.

    Bytes: a line may have been cut off within a character.
    """
    start = end = file.seek(0, os.SEEK_END)  # the line under way is what lies between
    parts: list[bytes] = []
    while start:
        size = min(block, start)
        file.seek(start - size)
        data = file.read(size)
        stop = size
        # A line begins behind each line end, the file's last one aside.
        while (at := data.rfind(b"\n", 0, stop)) >= 0:
            begin = start - size + at + 1
            if begin < end:
                yield begin, b"".join([data[at + 1 : stop], *reversed(parts)])
            # The line end itself belongs to the line before.
            parts, end, stop = [b"\n"], begin, at
        parts.append(data[:stop])
        start -= size
    if end:
        yield 0, b"".join(reversed(parts))


def _step_of(line: bytes) -> float:
    """The step of a JSONL row; infinity for a line that was cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf


class Progress:
    """A progress line: what, how far, values, rate, time left. At most one in `every` seconds.

    Rate and time left count from the end of the first update, since that one compiles; a line
    before the second has neither.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, every: float = 5.0):
        self.what, self.total, self.done = what, total, done
        self._counted = 0
        self._started: float | None = None
        self._every, self._last = every, time.perf_counter()

    def skip(self, count: int) -> None:
        """Advance by `count` that were there already: they are no part of the rate."""
        self.done += count

    def update(self, count: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Advance by `count` and print when it is time."""
        self.done += count
        now = time.perf_counter()
        pace = ""
        if self._started is None:
            self._started = now
        else:
            self._counted += count
            rate = self._counted / max(now - self._started, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            pace = f"  {rate:.3g}/s  {clock(left)} left"
        if self.done < self.total and now - self._last < self._every:
            return
        self._last = now
        shown = "".join(f"  {name} {value:.4g}" for name, value in (values or {}).items())
        log.info("%-16s %d/%d%s%s", self.what, self.done, self.total, shown, pace)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = int(min(seconds, 359_999))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Tracer:
    """Writes a trace of some steps for TensorBoard's profiler (or Perfetto).

    Args:
      steps: "first:last", or None for no trace.
      directory: where it is written.

    Raises ValueError for anything else.
    """

    def __init__(self, steps: str | None, directory: Path):
        self._directory, self._on = directory, False
        self._first = self._last = -1
        if steps is not None:
            first, _, last = steps.partition(":")
            if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
                raise UserError(f"--profile {steps}: give FIRST:LAST, two step numbers")
            self._first, self._last = int(first), int(last)

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The steps between which the trace begins and ends."""
        if number == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._on = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == self._last:
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info(
                "trace            steps %d to %d in %s", self._first, self._last, self._directory
            )


class Timer:
    """Seconds spent in named phases of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """`seconds/<phase>` since the last call."""
        taken = {f"seconds/{name}": value for name, value in self.seconds.items()}
        self.seconds = {}
        return taken
