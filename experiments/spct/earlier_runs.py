"""Whether the figures of `seeds.py` changed with the code, or by chance.

    python experiments/spct/earlier_runs.py

Every version of results.json in the repository's history that has seeds 0, 1 and 2 is one run of
`seeds.py`. For each stage and number of votes: the accuracy of each seed in each run, and
the first run less each later one. A difference is tested in two ways: paired by seed (the same
embedded world, other random numbers in training), and unpaired (SFT itself was another training, so
that seeds have nothing in common). The last table is what RL adds to RFT, and RFT to SFT, where a
change of RL alone would show. Writes earlier_runs.md beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "claims"))

from paired import over_seeds, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent  # paths in `git log` are relative to where it runs
STAGES = ("SFT", "RFT", "RL")
VOTES = ("vote@8", "vote@32")
METHODS = ("greedy", "sample@1", *VOTES)
GAINS = (("RFT", "SFT"), ("RL", "RFT"), ("RL", "SFT"))
Run = dict[tuple[str, str], list[float]]  # (stage, method) -> accuracy in percent by seed


def main() -> None:
    runs = read_runs()
    if len(runs) < 2:
        raise SystemExit(
            "error: this clone has no earlier results; get them: git fetch --unshallow"
        )
    text = report(runs)
    (HERE / "earlier_runs.md").write_text(text, encoding="utf-8")
    print(text)


def read_runs() -> dict[str, Run]:
    """The runs by the commit that they were made at, the oldest first."""
    file = "experiments/spct/results.json"
    runs: dict[str, Run] = {}
    for commit in git("log", "--reverse", "--format=%H", "--", file).split():
        found = run(json.loads(git("show", f"{commit}:{file}")))
        if found is not None:
            runs[found[0]] = found[1]
    return runs


def run(results: dict[str, Any]) -> tuple[str, Run] | None:
    """(commit, accuracies) of a results file; None for one with other seeds or other figures."""
    seeds = results.get("seeds", {})
    if not isinstance(seeds, dict) or list(seeds) != ["0", "1", "2"]:
        return None
    if any("figures" not in seed for seed in seeds.values()):
        return None
    return results["commit"], {
        (stage, method): [100 * s["figures"][stage][method]["value"] for s in seeds.values()]
        for stage in STAGES
        for method in METHODS
    }


def report(runs: dict[str, Run]) -> str:
    """Markdown."""
    names = list(runs)
    first, *later = names
    rows, tests = [], []
    for key in runs[first]:
        stage, method = key
        rows.append([f"{stage}, {method}", *(cell(runs[name][key]) for name in names)])
        if method in VOTES:
            for name in later:
                tests.append([f"{stage}, {method}: {first} less {name}"])
                tests[-1] += compared(runs[first][key], runs[name][key])
    gains = [
        [f"{a} less {b}, {method}"] + [paired(r[a, method], r[b, method]) for r in runs.values()]
        for a, b in GAINS
        for method in METHODS
    ]
    return "\n".join(
        [
            "Accuracy in percent: the mean of three seeds, and each seed.\n",
            table(["", *names], rows),
            "Differences in points with a 95% t interval.\n",
            table(["", "paired by seed", "unpaired (Welch)"], tests),
            "What a stage adds to one before it, in points, paired by seed within a run.\n",
            table(["", *names], gains),
        ]
    )


def cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def compared(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """Cells of the paired and of the unpaired test."""
    test: Any = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    mean = np.mean(a) - np.mean(b)
    return [paired(a, b), f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], p = {test.pvalue:.2g}"]


def paired(a: Sequence[float], b: Sequence[float]) -> str:
    """a - b in points, paired by seed, with its interval and p-value."""
    return over_seeds([(x - y) / 100 for x, y in zip(a, b, strict=True)]).signed()


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


if __name__ == "__main__":
    main()
