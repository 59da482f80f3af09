"""Two commands on one run directory: the second is refused, a killed one is no obstacle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from grm_jax import lock
from grm_jax.errors import UserError

# Without JAX in the holder: it only has to hold.
HOLDER = """
import sys, fcntl, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from grm_jax import lock
lock._take(Path(sys.argv[1]).absolute() / lock.LOCK_FILE)
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_command_is_refused_by_name_and_a_killed_one_is_no_obstacle(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(lock.__file__)))
    command = [sys.executable, "-c", HOLDER, str(tmp_path), root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .* since 20"):
                lock.hold(tmp_path)
        finally:
            holder.kill()
    assert (tmp_path / lock.LOCK_FILE).exists()
    lock.hold(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / lock.LOCK_FILE).read_text()


def test_the_same_process_may_hold_it_again_and_a_directory_made_anew(tmp_path):
    for _ in range(2):
        lock.hold(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    lock.hold(tmp_path / "run")
    assert (tmp_path / "run" / lock.LOCK_FILE).exists()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("grm_jax.lock.fcntl.flock", refuse)
    with caplog.at_level("WARNING", logger="grm_jax"):
        lock.hold(tmp_path)
    assert "has no locks (Function not implemented)" in caplog.text


def test_a_stage_holds_its_run_directory(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("grm_jax.training.run.hold", held.append)

    class Here:
        directory = tmp_path

        def require(self, source, other):
            assert not held  # what is refused makes no file

    from grm_jax.training.run import Stage

    stage = Stage.__new__(Stage)
    stage.run, stage.name, stage.directory = Here(), "sft", tmp_path / "sft"
    stage._config, stage._config_file = "{}", tmp_path / "sft" / "config.json"
    stage._needs = ["base"]
    stage.begin()
    assert held == [tmp_path]
