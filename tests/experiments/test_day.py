"""A day with a GPU: parts, their time limits, what is on disk after each, and all of it dry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import day
import part as programs
import pytest
import tables
from parts import PARTS, Part

DAY = Path(day.__file__)
# A part of its own: writes two rows, then what the test says.
SCRIPT = """
import sys, time
from part import Report, parser
told = parser(None).parse_args()
report = Report(told)
report.about(device="toy")
report.row(what="first", value=1.5)
report.row(what="second", value=None)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(name -> what its part does after two rows, seconds, ...) -> (exit code, output folder)."""
    monkeypatch.setattr(day, "GRACE", 1.0)
    environment = day.child_environment(dry=True)
    environment["PYTHONPATH"] += os.pathsep + str(DAY.parent)

    def go(scripts, seconds=60.0, least=1.0, limit=30.0):
        made = []
        for name, body in scripts.items():
            file = tmp_path / f"{name}.py"
            file.write_text(SCRIPT + body, encoding="utf-8")
            made.append(Part(name, f"Title of {name}", (str(file),), limit, least))
        monkeypatch.setattr(day, "PARTS", tuple(made))
        return day.run_all(made, seconds, tmp_path / "out", environment), tmp_path / "out"

    return go


def ended(process: int) -> bool:
    """Whether a process is gone, or waits for nothing but to be forgotten, within some seconds."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_a_part_that_fails_does_not_stop_the_next(run):
    code, out = run({"bad": "raise ValueError('no kernel')", "good": "report.note('A note.')"})
    assert code == 1
    bad, good = read(out, "bad"), read(out, "good")
    assert bad["run"]["state"] == "failed" and good["run"]["state"] == "done"
    assert "exit code 1" in bad["run"]["why"] and "ValueError: no kernel" in bad["run"]["why"]
    # The rows from before the failure are kept.
    assert [row["what"] for row in bad["rows"]] == ["first", "second"]
    assert good["about"] == {"device": "toy"} and good["notes"] == ["A note."]
    shown = (out / "day.md").read_text(encoding="utf-8")
    assert "| bad | failed |" in shown and "ValueError: no kernel" in shown
    assert "| first | 1.5 |\n| second | - |" in shown and "- A note." in shown
    assert "## Title of good" in shown
    assert "| good | done |" in (out / "good.md").read_text(encoding="utf-8")
    assert "no kernel" in (out / "bad.log").read_text(encoding="utf-8")


def test_a_part_is_stopped_at_its_limit_with_all_it_started(run, tmp_path):
    """Also one that does not listen to SIGTERM, and the processes that it started."""
    number = tmp_path / "child"
    body = f"""
import pathlib, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(number)!r}).write_text(str(child.pid))
print("now it hangs", flush=True)
time.sleep(600)
"""
    started = time.monotonic()
    code, out = run({"slow": body, "next": ""}, limit=8.0)
    assert code == 1 and time.monotonic() - started < 60
    slow = read(out, "slow")
    assert slow["run"]["state"] == "stopped" and len(slow["rows"]) == 2
    assert slow["run"]["why"].startswith("it took longer than 8 s")
    assert slow["run"]["why"].endswith("now it hangs")
    assert read(out, "next")["run"]["state"] == "done"
    assert ended(int(number.read_text()))


def test_what_no_longer_fits_is_skipped_and_says_so(run):
    code, out = run({"one": "report.note(str(told.seconds))"}, seconds=20.0)
    one = read(out, "one")
    # Its limit is what is left of the budget, and it is told a little less.
    assert code == 0 and one["run"]["limit_seconds"] == 20 and one["notes"] == ["18.0"]
    code, out = run({"one": "", "two": ""}, seconds=5.0, least=10.0)
    assert code == 0
    # The earlier result of a part that is skipped stays.
    assert read(out, "one") == one
    why = read(out, "two")["run"]
    assert why == {"state": "skipped", "why": "5 s were left, and it needs 10 s"}
    assert "| two | skipped | - | - | 5 s were left" in (out / "day.md").read_text("utf-8")


def test_an_interrupted_day_keeps_what_was_finished(tmp_path):
    """SIGTERM, as at the end of a lease, ends the part that runs, too."""
    (tmp_path / "parts.py").write_text(
        (DAY.parent / "parts.py").read_text("utf-8")
        + f"\nPARTS = (Part('quick', 'Quick', ({str(tmp_path / 'quick.py')!r},), 60, 1), "
        f"Part('hangs', 'Hangs', ({str(tmp_path / 'hangs.py')!r},), 600, 1))\n"
    )
    (tmp_path / "quick.py").write_text(SCRIPT)
    (tmp_path / "hangs.py").write_text(SCRIPT + "time.sleep(600)")
    (tmp_path / "go.py").write_text(
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(DAY.parent)!r}]\n"
        "import day\nsys.exit(day.main(day.arguments(sys.argv[1:])))\n"
    )
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": f"{DAY.parent}{os.pathsep}{DAY.parents[2]}"}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "go.py"), "--dry", "--output", str(out)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (out / "hangs.json").exists() or len(read(out, "hangs")["rows"]) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted in hangs" in said
    assert read(out, "quick")["run"]["state"] == "done"
    hangs = read(out, "hangs")
    assert hangs["run"]["why"] == "day.py was interrupted" and len(hangs["rows"]) == 2
    assert "| hangs | stopped |" in (out / "day.md").read_text("utf-8")


def test_a_part_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        day.arguments(["--only", "sampler", "smapler"])
    assert "no part is named smapler; the parts are device, tests," in capsys.readouterr().err


def test_parts_are_chosen_by_the_beginning_of_their_names():
    chosen = [part.name for part in day._chosen(["train-sft", "road"])]
    assert chosen == [name for name in (part.name for part in PARTS) if name.startswith(
        ("train-sft", "road"))]  # fmt: skip
    assert len(chosen) >= 4


def test_without_a_gpu_it_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert day.main(day.arguments([])) == 1
    said = capsys.readouterr().err
    assert "JAX can not use a GPU here: its first device is a cpu; --dry runs all parts" in said


def test_every_part_has_its_program_and_a_name_of_its_own():
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert (DAY.parent / part.command[0]).is_file()
        assert part.least <= part.seconds


def test_settings_that_would_not_be_done_in_time_are_named(tmp_path, monkeypatch):
    told = programs.parser(None).parse_args(
        ["--output", str(tmp_path / "a.json"), "--seconds", "10"]
    )
    clock = [0.0]
    monkeypatch.setattr(programs.time, "monotonic", lambda: clock[0])
    report, done = programs.Report(told), []
    for setting in report.while_time(["a", "b", "c", "d"]):
        clock[0] += 4
        done.append(setting)
    assert done == ["a", "b"]  # 2 s are left, and one took 4 s
    assert read(tmp_path, "a")["notes"] == ["No time was left for: c; d."]


def test_a_peak_that_was_there_before_is_only_a_bound():
    class Device:
        peak = 2**30

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    device = Device()
    peak = programs.Peak(device)
    assert peak.gib() == "<= 1.0"
    device.peak = 3 * 2**29
    assert peak.gib() == 1.5


def test_a_table_has_the_columns_of_all_rows():
    rows = [{"a": 1, "b": None}, {"a": 2345.678, "c": "x|y\nz"}, {"a": 0.5, "d": True}]
    assert tables.table(rows) == (
        "| a | c | d |\n| ---: | :--- | :--- |\n"
        "| 1 | - | - |\n| 2,346 | x/y<br>z | - |\n| 0.5 | - | yes |\n"
    )


@pytest.mark.slow
def test_every_part_runs_dry(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(DAY), "--dry", "--minutes", "30", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    states = {part.name: read(out, part.name)["run"]["state"] for part in PARTS}
    assert set(states.values()) == {"done"}, states
    rows = {part.name: read(out, part.name)["rows"] for part in PARTS}
    assert all(row["good"] for row in rows["parity"]) and len(rows["parity"]) > 20
    assert [row["prompt"] for row in rows["sampler"]] == [32, 64]
    # Toy models, too, are computed in the dtype of released ones.
    assert read(out, "sampler")["about"]["dtype"] == "bfloat16"
    assert rows["train-sft-chunked"][0]["dtype"] == "bfloat16"
    assert {row["outcome"] for row in rows["tests"]} == {"passed", "skipped"}
    for name in ("train-sft-chunked", "train-grpo-chunked", "train-grpo-9b-lora"):
        assert rows[name][0]["tokens/s"] > 0
    assert not rows["train-sft-tokamax"]  # it needs a GPU, which a note says
    assert "H100" in read(out, "train-sft-tokamax")["notes"][0]
    stages = [row["stage"] for row in rows["road"]]
    assert stages == ["sft", "rft", "rl", "meta_rm", "scalar_rm", "evaluation"]
    shown = (out / "day.md").read_text(encoding="utf-8")
    assert "its figures mean nothing" in shown and "| scalar (Bradley-Terry) |" in shown
