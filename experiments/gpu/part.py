"""What `day.py` tells the program of a part, and how that reports: in rows, as it measures them."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grm_jax.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every part has. A part's own options are added to them."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, required=True, help="the JSON file of the rows")
    made.add_argument("--seconds", type=float, default=600.0, help="the most it may take")
    made.add_argument("--dry", action="store_true", help="toy sizes, on any device")
    return made


class Report:
    """The rows of a part. Its file is written anew with each of them, so that none is lost when
    the part is stopped.

    Args:
      told: the parsed options.
    """

    def __init__(self, told: argparse.Namespace):
        self._path, self._end = told.output, time.monotonic() + told.seconds
        self._content: dict[str, Any] = {"about": {}, "rows": [], "notes": []}
        self._write()

    def about(self, **facts: Any) -> None:
        """What holds for all rows."""
        self._content["about"] |= facts
        self._write()

    def row(self, **cells: Any) -> None:
        """Add a row to the table; the names of the cells are the columns."""
        self._content["rows"].append(cells)
        print(json.dumps(cells), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence below the table, such as what could not be measured and why."""
        self._content["notes"].append(text)
        print(text, flush=True)
        self._write()

    def text(self, markdown: str) -> None:
        """Add Markdown below the table, such as a table that another program wrote."""
        self._content["text"] = markdown
        print(markdown, flush=True)
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self._end - time.monotonic()

    def while_time(self, settings: Sequence[T]) -> Iterator[T]:
        """The settings, as long as the time that is left is more than the longest one took. A note
        names those that are left out."""
        longest = 0.0
        for index, setting in enumerate(settings):
            if self.left < longest:
                rest = "; ".join(map(str, settings[index:]))
                self.note(f"No time was left for: {rest}.")
                return
            started = time.monotonic()
            yield setting
            longest = max(longest, time.monotonic() - started)

    def _write(self) -> None:
        with written_whole(self._path) as partial:
            partial.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")


def about_jax() -> dict[str, Any]:
    """The first device, JAX's version and the commit, for `Report`."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is checked out; `unknown` where this is no clone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"


class Peak:
    """The peak memory of what runs between its creation and `gib`.

    A device only tells the peak since the process started. Where that was not exceeded, the peak
    of what ran is known to be no higher, and is written as `<= 1.23`.
    """

    def __init__(self, device: Any):
        self._device, self._before = device, _peak_bytes(device)

    def gib(self) -> float | str:
        """GiB, of the device or (on a CPU) of the process."""
        peak = _peak_bytes(self._device)
        shown = round(peak / 2**30, 2)
        return shown if peak > self._before else f"<= {shown}"


def _peak_bytes(device: Any) -> int:
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
