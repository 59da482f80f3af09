"""Workers of several virtual environments, run in turn by one process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Worker:
    """A process that has loaded what it measures and times one run a line.

    Args:
      python: the interpreter of its virtual environment.
      script: its file, which calls `serve`.
      arguments: of the script.
      threads: cores it is pinned to.
    """

    def __init__(self, python: Path, script: Path, arguments: Sequence[str], threads: int):
        cores = ",".join(map(str, range(threads)))
        command = ["taskset", "-c", cores, str(python), str(script), *arguments]
        paths = [str(ROOT), str(ROOT / "experiments" / "peers")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        self.ready = self._read()

    def run(self, seed: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command} died; run it by hand")
        return json.loads(line)
