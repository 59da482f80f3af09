"""A worker loads the model, then times one run for each line of standard input (a seed).

Standard library only: workers run in the virtual environments of what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    found = parser.parse_args()
    found.ids = json.loads((found.model / "prompt.json").read_text())[: found.prompt]
    return found


def serve(name: str, run: Callable[[int], int]) -> None:
    """run(seed) -> tokens drawn. Warms up once, then answers each line with seconds and memory."""
    # Results go to the real standard output; what libraries print does not mix with them.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    run(10_000)
    print(json.dumps({"ready": name, "first": time.perf_counter() - started}), file=out, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        tokens = run(int(line))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer = {"seconds": seconds, "tokens": tokens, "peak_gib": peak}
        print(json.dumps(answer), file=out, flush=True)
