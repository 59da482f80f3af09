"""Signals in a process of their own: what is said, what is kept, which exit code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grm_jax import stopping, train

ROOT = Path(__file__).resolve().parent.parent
LOOP = """
import os, signal, sys, time
from grm_jax import stopping
with stopping.handled():
    with stopping.requested() as stop:
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        print("asked", stop.terminated, flush=True)
        time.sleep(600)
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_the_first_signal_asks_and_the_second_ends_at_once(number):
    with start(LOOP) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert "stopping after this step" in process.stdout.readline()
        assert process.stdout.readline() == f"asked {number == signal.SIGTERM}\n"
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_without_a_loop_a_signal_ends_the_work(number):
    before = signal.getsignal(number)
    with pytest.raises(stopping.Interrupted) as error, stopping.handled():
        os.kill(os.getpid(), number)
    assert stopping.terminated(error.value) == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_requests_outside_of_a_command_and_threads():
    with pytest.raises(stopping.Stopped), stopping.requested() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.terminated
        raise stopping.Stopped("saved")
    found = []
    thread = threading.Thread(target=lambda: found.append(list_of_handled()))
    thread.start()
    thread.join()
    assert found == ["fine"]


def test_a_signal_that_came_when_the_loop_no_longer_looked_is_not_lost():
    with (
        stopping.handled(),
        pytest.raises(stopping.Interrupted) as error,
        stopping.requested(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.terminated(error.value)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_while_garbage_is_collected_is_not_lost(number):
    """What is raised there is ignored by Python; the signal comes again and ends the work."""

    class Last:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0)  # the handler runs between two instructions

    hook = sys.unraisablehook
    with pytest.raises(stopping.Interrupted) as error, stopping.handled():
        Last()
        time.sleep(10)
        pytest.fail("went on")
    assert error.value.number == number
    assert sys.unraisablehook is hook


COROUTINE = """
import os, signal
from grm_jax import stopping
async def read(): ...
try:
    with stopping.handled():
        reading = read()
        os.kill(os.getpid(), signal.SIGTERM)
except stopping.Interrupted:
    del reading
"""


def test_what_a_signal_cuts_off_says_nothing():
    with start(COROUTINE) as process:
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def list_of_handled() -> str:
    with stopping.handled():
        return "fine"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_train_says_how_to_go_on(number, code, monkeypatch, capsys):
    """Before any stage has begun, with a directory that a shell would take apart."""
    args = ["--config", "sft.py", "--run-dir", "runs/[a] b#1"]
    monkeypatch.setattr(train, "run", lambda *given: os.kill(os.getpid(), number))
    assert train.main(args) == code
    said = capsys.readouterr().out
    command = said.splitlines()[-1].strip()
    assert "Go on with the same command" in said
    assert shlex.split(command) == ["python", "-m", "grm_jax.train", *args]
