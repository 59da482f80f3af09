"""The tests marked `gpu`, a row each. In a dry run the CPU stands in for the GPU.

Exit code: pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from part import ROOT, Report, commit, parser

STAND_IN = "GRM_JAX_CPU_AS_GPU"  # read by tests/gpu/conftest.py


def main() -> int:
    told = parser(__doc__).parse_args()
    report = Report(told)
    report.about(commit=commit())
    environment = os.environ | ({STAND_IN: "1"} if told.dry else {})
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
        command += ["-p", "no:cacheprovider", f"--junitxml={found}"]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        for case in xml.parse(found).iter("testcase") if found.exists() else ():
            outcome, why = "passed", None
            for kind in ("skipped", "failure", "error"):
                if (node := case.find(kind)) is not None:
                    outcome, why = kind, (node.get("message") or "").splitlines()[0]
            seconds = round(float(case.get("time", 0)), 1)
            report.row(test=case.get("name"), outcome=outcome, seconds=seconds, why=why)
    return code


if __name__ == "__main__":
    sys.exit(main())
