"""Logs of resumed runs, NaN in JSON, progress and timers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from grm_jax import metrics
from grm_jax.errors import describe
from grm_jax.metrics import MetricsWriter, Progress, StepLog, Timer, clock


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def fill(path: Path, count: int, tail: bytes = b"") -> None:
    log = StepLog(path)
    for step in range(1, count + 1):
        log.write([{"step": step, "text": "ä–\u2028 ok"}, {"step": step}])
    log.close()
    with path.open("ab") as out:
        out.write(tail)


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3, "te', b'{"step": 3, "text": "\xc3', b"\x00\x00", b"7\n", b'{"text": 1}\n'],
    ids=["whole", "cut", "cut in a character", "zeros", "no row", "no step"],
)
def test_later_steps_and_cut_off_lines_are_dropped(tmp_path, tail):
    path = tmp_path / "deep" / "log.jsonl"
    fill(path, 4, tail)
    log = StepLog(path, resume_step=2)
    log.write([{"step": 3}])
    log.close()
    assert path.read_text(encoding="utf-8").count("\u2028") == 2
    assert [json.loads(row)["step"] for row in path.read_text("utf-8").split("\n")[:-1]] == [
        1, 1, 2, 2, 3,
    ]  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_without_a_checkpoint_the_log_begins_again(tmp_path):
    path = tmp_path / "log.jsonl"
    fill(path, 3)
    StepLog(path).close()
    assert path.read_bytes() == b""


def test_rows_are_on_disk_when_they_are_written(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    log.write([{"step": 1}])
    assert steps(tmp_path / "log.jsonl") == [1]
    log.close()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log = StepLog(tmp_path / "log.jsonl")
    log.write([{"step": 1}])
    log.close()
    writer = MetricsWriter(tmp_path / "stage")
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert not any(tmp_path.iterdir())


def test_metrics_have_no_nan_in_json_and_reach_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5, "auc": math.nan, "gap": math.inf})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (row["step"], row["loss"], row["auc"], row["gap"]) == (1, 0.5, None, None)
    assert row["time"] > 1e9
    (events,) = tmp_path.glob("events.*")
    blob, found = events.read_bytes(), []
    while blob:  # TFRecord: size, its checksum, data, its checksum
        (size,) = struct.unpack("<Q", blob[:8])
        data = blob[12 : 12 + size]
        assert blob[8:12] == struct.pack("<I", masked_crc32c(blob[:8]))
        assert blob[12 + size : 16 + size] == struct.pack("<I", masked_crc32c(data))
        found.append(Event.FromString(data))
        blob = blob[16 + size :]
    version, start, event = found
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, 1)
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 1 and values.keys() == {"loss", "auc", "gap"}
    assert values["loss"] == 0.5 and math.isnan(values["auc"]) and math.isinf(values["gap"])


def test_a_file_that_can_not_grow_is_an_error_that_names_it(tmp_path):
    """In the thread that writes: no other waits for a reader that is gone."""
    writer = MetricsWriter(tmp_path)
    many = {f"metric {index}": 0.5 for index in range(500)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*(metrics|events)") as error:
            for step in range(9):
                writer.write(step, many if step else {"loss": 0.5})
        with contextlib.suppress(OSError):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Make room" in describe(error.value)


def test_metrics_are_taken_up_again(tmp_path):
    for first in (0, 2):
        writer = MetricsWriter(tmp_path, first)
        for step in range(first + 1, 5):
            writer.write(step, {"loss": float(step)})
        writer.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_progress_prints_the_last_and_not_too_often(caplog):
    with caplog.at_level(logging.INFO, "grm_jax"):
        progress = Progress("sft", 100, done=90, every=60.0)
        for _ in range(10):
            progress.update(1, {"loss": 0.123456})
        (last,) = caplog.messages
        assert last.startswith("sft              100/100  loss 0.1235")
        assert last.endswith("0:00 left")
        progress = Progress("sft", 4, every=0.0)
        progress.update()
        assert "1/4" in caplog.messages[1]


def test_the_rate_is_without_the_first_update_and_what_was_there(caplog, monkeypatch):
    """The first update compiles; its seconds made a user's first line say days."""
    now = iter((0.0, 600.0, 610.0, 620.0))
    monkeypatch.setattr("grm_jax.metrics.time.perf_counter", lambda: next(now))
    with caplog.at_level(logging.INFO, "grm_jax"):
        progress = Progress("judging", 1000, every=5.0)
        progress.skip(900)
        progress.update(10)
        progress.update(10)
        progress.done = 910  # a stage went back to a checkpoint
        progress.update(10)
    assert caplog.messages == [
        "judging          910/1000",
        "judging          920/1000  1/s  1:20 left",
        "judging          920/1000  1/s  1:20 left",
    ]


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_the_cut_is_found_from_the_end(block, step, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    rows = [json.dumps({"step": i // 2, "text": "x" * (i * 5)}).encode() + b"\n" for i in range(12)]
    monkeypatch.setattr(metrics._backwards, "__defaults__", (block,))
    for tail in (b"", b"\n", b"\n\n{", b'{"step": "1"}\n'):
        path.write_bytes(b"".join(rows) + tail)
        StepLog(path, step).close()
        assert path.read_bytes() == b"".join(rows[: 2 * step + 2])
    path.write_bytes(b"".join(rows)[:-1])  # the line is whole but for its end
    StepLog(path, step).close()
    assert path.read_bytes() == b"".join(rows[: 2 * step + 2])


def test_taking_a_log_up_parses_only_what_is_dropped(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    fill(path, 500)
    parsed = []
    step_of = metrics._step_of
    monkeypatch.setattr(metrics, "_step_of", lambda line: parsed.append(line) or step_of(line))
    StepLog(path, 498).close()
    assert len(parsed) == 5  # two rows a step, and the last that stays
    assert b'"step": 498' in path.read_bytes().splitlines()[-1]


def test_clock():
    assert [clock(s) for s in (0, 59.9, 61, 3600, 90061, 1e12)] == [
        "0:00", "0:59", "1:01", "1:00:00", "25:01:01", "99:59:59",
    ]  # fmt: skip


def test_timer_adds_up_and_starts_again():
    timer = Timer()
    for _ in range(2):
        with timer.phase("a"):
            pass
    with pytest.raises(KeyError), timer.phase("b"):
        raise KeyError
    taken = timer.take()
    assert taken.keys() == {"seconds/a", "seconds/b"} and min(taken.values()) >= 0
    assert timer.take() == {}


def test_a_step_log_goes_back(tmp_path):
    log = StepLog(tmp_path / "rows.jsonl")
    for step in (1, 2, 3):
        log.write([{"step": step, "try": 1}, {"step": step, "try": 1}])
    log.rewind(1)
    log.write([{"step": 2, "try": 2}])
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["step"], row["try"]) for row in rows] == [(1, 1), (1, 1), (2, 2)]


def test_tensorboard_does_not_load_torch(tmp_path):
    """It takes seconds, and nothing of it is used. Afterwards it can be imported as ever."""
    code = (
        "import importlib.util, pathlib, sys; from grm_jax.metrics import Board; "
        "Board(pathlib.Path(sys.argv[1])); print('torch' in sys.modules); "
        "importlib.util.find_spec('torch') and __import__('torch').zeros(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(metrics.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
