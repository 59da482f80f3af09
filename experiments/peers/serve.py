"""A worker loads what it measures, then times one run for each line of standard input.

Standard library only: workers run in the virtual environments of what they measure.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def serve(name: str, run: Callable[[int], float]) -> None:
    """run(seed) -> a figure. Warms up once, then answers each line, a seed, with seconds, the
    figure, and peak memory.
    """
    # Results go to the real standard output; what libraries print does not mix with them.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    run(10_000)
    print(json.dumps({"ready": name, "first": time.perf_counter() - started}), file=out, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        figure = run(int(line))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer = {"seconds": seconds, "figure": figure, "peak_gib": peak}
        print(json.dumps(answer), file=out, flush=True)
