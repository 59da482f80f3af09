"""Starting a program again with huge pages: the same process, the same arguments, once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from grm_jax.parallel.host import HUGE_PAGES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
print(os.getpid(), flush=True)
from grm_jax.parallel.host import use_huge_pages
use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


def run(tmp_path: Path, **more: str) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, str(script), "--name", "two words"],
        env=environment | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_it_starts_again_as_the_same_process(tmp_path):
    first, again, found = run(tmp_path)
    assert first == again, "the same process number"
    assert found == f"{HUGE_PAGES} ['--name', 'two words']"


def test_what_the_user_set_stays(tmp_path):
    _, found = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert found == "glibc.malloc.check=0 ['--name', 'two words']"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("command", ["train", "evaluate", "judge", "serve"])
def test_commands_that_compute_start_again_with_huge_pages(command, tmp_path):
    """Python runs sitecustomize.py whenever it starts."""
    said = "import os, sys; print('started', os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)"
    (tmp_path / "sitecustomize.py").write_text(said)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-m", f"grm_jax.{command}", "--help"],
        env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    started = [line for line in done.stderr.splitlines() if line.startswith("started")]
    assert started == ["started None", f"started {HUGE_PAGES}"]
