"""The whole pipeline on the embedded world (`python -m grm_jax.train --config spct.py`): seconds of
each stage, and its table of accuracies.

Where the time does not suffice, the run is stopped as by Ctrl-C, and the stages that were finished
are reported.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from part import ROOT, Report, commit, parser

# A road of the same stages, so short that its models learn little.
DRY = {
    "world": {"cold-start": 400, "train": 64, "fresh": 4, "shifted": 2},
    "mesh": {"cpu-devices": 1},
    "sft": {"fitting.steps": 60, "fitting.batch-size": 16},
    "rft": {"records": 48, "fitting.steps": 2},
    "rl": {"steps": 2, "prompts": 4, "train-groups": 4},
    "meta-rm": {"records": 8, "samples": 2, "fitting.steps": 2},
    "scalar-rm": {"fitting.steps": 2},
    "evaluation": {"k": 2, "records": 2},
}


def main() -> int:
    told = parser(__doc__).parse_args()
    report = Report(told)
    report.about(commit=commit())
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        command = [sys.executable, "-m", "grm_jax.train", "--config", "spct.py"]
        command += ["--run-dir", str(run_dir)]
        if told.dry:
            command += [
                word
                for group, options in DRY.items()
                for name, value in options.items()
                for word in (f"--{group}.{name}", str(value))
            ]
        # Whoever stops this part stops that process, too; its end is waited for.
        signal.signal(signal.SIGTERM, lambda *_: None)
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = process.wait(max(1.0, report.left - 10))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            code = process.wait()
            report.note("It was stopped, since no time was left.")
        times = run_dir / "seconds.json"
        found = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
        for stage, seconds in found.items():
            report.row(stage=stage, seconds=round(seconds, 1))
        table = run_dir / "evaluation" / "table.md"
        if table.exists():
            report.text(table.read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
