"""All that a GPU is wanted for, by one command with a budget of time.

    python experiments/gpu/day.py --minutes 12
    python experiments/gpu/day.py --dry                      every part on a CPU, at toy size
    python experiments/gpu/day.py --only parity train-sft    parts whose names begin so

The parts are listed in `parts.py`, the most valuable first. Each runs in a process of its own. It
is stopped at its time limit, and a part that fails or is stopped does not keep the next one from
running. When a part ends, its results are on disk: NAME.json and NAME.md, NAME.log with its
output, and day.md with the tables of all parts so far. What no longer fits into the budget is
given less time or skipped, and day.md says so. Exit code 0 if no part failed or was stopped,
else 1.

This file needs nothing but Python, so that it also tells on a bare machine what is missing there.
`wheels.py` says how to bring it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parts import PARTS, Part
from tables import day_table, part_table

from grm_jax.files import written_whole

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GRACE = 5.0  # seconds between asking a part to stop and killing it
LAST_LINES = 6  # of a failed part's output, in the table
PLATFORM = "import jax; print(jax.devices()[0].platform)"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts whose names begin so")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-day"))
    found = parser.parse_args(given)
    unknown = [name for name in found.only or () if not _chosen([name])]
    if unknown:
        names = ", ".join(part.name for part in PARTS)
        parser.error(f"no part is named {', '.join(unknown)}; the parts are {names}")
    return found


def _chosen(names: Sequence[str] | None) -> list[Part]:
    return [part for part in PARTS if names is None or part.name.startswith(tuple(names))]


def main(args: argparse.Namespace) -> int:
    environment = child_environment(dry=args.dry)
    if not args.dry and (problem := no_gpu(environment)):
        print(f"error: {problem}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = _chosen(args.only)
    return run_all(parts, 60 * args.minutes, args.output, environment, dry=args.dry)


def child_environment(*, dry: bool) -> dict[str, str]:
    """The environment of the parts: a GPU beside the CPU, or in a dry run a CPU alone."""
    environment = dict(os.environ)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if dry:
        environment["JAX_PLATFORMS"] = "cpu"
        # Toy programs run for microseconds: what takes time is compiling, which this halves.
        environment.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    else:
        environment.setdefault("JAX_PLATFORMS", "cuda,cpu")
        # One part at a time has the device for itself.
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Where grm_jax.train keeps compiled programs, too.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "grm_jax" / "jax"))
    return environment


def no_gpu(environment: dict[str, str]) -> str | None:
    """Why JAX can not use a GPU here, in one sentence; None if it can."""
    command = [sys.executable, "-c", PLATFORM]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode == 0 and found.stdout.strip() == "gpu":
        return None
    lines = found.stderr.strip().splitlines() or [f"its first device is a {found.stdout.strip()}"]
    return f"JAX can not use a GPU here: {lines[-1]}; --dry runs all parts on a CPU, at toy size"


def run_all(
    parts: Sequence[Part],
    seconds: float,
    output: Path,
    environment: dict[str, str],
    *,
    dry: bool = False,
) -> int:
    """Run the parts one after the other, and write what they found. Returns the exit code.

    Args:
      seconds: the budget for all of them together.
      output: the folder of the results; a part that runs replaces its earlier result there.
    """
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    good = True
    for part in parts:
        left = end - time.monotonic()
        if left < part.least:
            run = {
                "state": "skipped",
                "why": f"{max(0.0, left):.0f} s were left, and it needs {part.least:.0f} s",
            }
        else:
            (output / f"{part.name}.json").unlink(missing_ok=True)
            print(f"{part.name:18} begins", flush=True)
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            # A busy CPU is no reason to stop a part.
            limit = left if dry else min(part.seconds, left)
            run = {"started_utc": started, "limit_seconds": round(limit), "dry": dry}
            try:
                run |= run_part(part, limit, output, environment, dry=dry)
            except KeyboardInterrupt:
                run |= {"state": "stopped", "why": "day.py was interrupted"}
                write(part, run, output)
                print(f"interrupted in {part.name}; {output / 'day.md'} has the parts before it")
                return 130
        good &= run["state"] not in ("failed", "stopped")
        write(part, run, output)
        took = f" after {run['seconds']:.0f} s" if "seconds" in run else ""
        why = f": {run['why']}" if "why" in run else ""
        print(f"{part.name:18} {run['state']}{took}{why}", flush=True)
    print((output / "day.md").read_text(encoding="utf-8"))
    print(f"written to {output / 'day.md'}")
    return 0 if good else 1


def run_part(
    part: Part, limit: float, output: Path, environment: dict[str, str], *, dry: bool
) -> dict[str, Any]:
    """Run one part in a process group of its own, at most `limit` seconds and `GRACE`.

    Returns its state (done, failed or stopped), its seconds, and why it did not succeed.
    """
    log = output / f"{part.name}.log"
    script, *options = part.command
    command = [sys.executable, str(HERE / script), *options]
    # A part that plans its time itself ends a little before it would be stopped.
    command += ["--output", str(output / f"{part.name}.json"), "--seconds", f"{limit - 2:.0f}"]
    command += ["--dry"] if dry else []
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    run: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if code == 0:
        return {"state": "done", **run}
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = "\n".join(line.split("\r")[-1] for line in lines[-LAST_LINES:]) or "no output"
    if code is None:
        return {
            "state": "stopped",
            **run,
            "why": f"it took longer than {limit:.0f} s; last:\n{last}",
        }
    return {"state": "failed", **run, "why": f"exit code {code}; last:\n{last}"}


def _end(process: subprocess.Popen) -> None:
    """End what is left of a part: politely, then by force. Its own processes go with it."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, which)
            process.wait(GRACE)
        except ProcessLookupError:  # nothing of it is left
            break
        except subprocess.TimeoutExpired:
            continue


def write(part: Part, run: dict[str, Any], output: Path) -> None:
    """The files of a part that ended, and those of the day so far. The result of an earlier day in
    the same folder stays where the part was skipped."""
    file = output / f"{part.name}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if run["state"] != "skipped" or not found:
        found = {"part": part.name, "title": part.title, **found, "run": run}
        _write(file, json.dumps(found, indent=2) + "\n")
        _write(output / f"{part.name}.md", part_table(found))
    results = []
    for one in PARTS:
        path = output / f"{one.name}.json"
        if path.exists():
            results.append(json.loads(path.read_text(encoding="utf-8")))
    _write(output / "day.md", day_table(results))


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(arguments()))
