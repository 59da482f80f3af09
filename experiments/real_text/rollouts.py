"""What RL's rollouts say of the judge, step by step: does it lean to a place, and is it right?

    python experiments/real_text/rollouts.py runs/short runs/placeless

For each run, from RUN/rl/rollouts.jsonl, of the rollouts with a winner among two responses: by five
steps, how many were won by the response shown first; and of all, how many were right, with a 95% t
interval over records. A step draws before it learns, so that it says how the judge is on records
that it has not learnt from, as long as none comes twice (which is printed, too).
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from grm_jax.critique import best_label
from grm_jax.data.trajectories import Trajectory, read_trajectories
from grm_jax.training.rewards import winning_place

STEPS = 5


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""


def main(args: Arguments) -> None:
    for run in args.runs:
        print(run)
        for line in report(run / "rl" / "rollouts.jsonl"):
            print(f"    {line}")


def report(file: Path) -> list[str]:
    """The lines of one run."""
    steps = [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in read_trajectories(file) if isinstance(row, Trajectory)]
    first: Mapping[int, list[bool]] = collections.defaultdict(list)
    right: Mapping[str, list[bool]] = collections.defaultdict(list)
    seen: Mapping[str, set[int]] = collections.defaultdict(set)
    for step, row in zip(steps, rows, strict=True):
        seen[row.example_id].add(step)
        place = winning_place(row.scores, row.order)
        if place is not None and len(row.order) == 2:
            first[(step - 1) // STEPS].append(place == 0)
            right[row.example_id].append(row.order[place] == best_label(row.labels or ()))
    lines = [
        f"steps {STEPS * part + 1} to {STEPS * (part + 1)}: the first one wins "
        f"{np.mean(wins):.2f} of {len(wins)}"
        for part, wins in sorted(first.items())
    ]
    shares = [float(np.mean(each)) for each in right.values()]
    test: Any = stats.ttest_1samp(shares, 0.5)
    low, high = test.confidence_interval(0.95)
    total = sum(map(sum, right.values())), sum(map(len, right.values()))
    again = sum(len(steps) > 1 for steps in seen.values())
    return [
        *lines,
        f"right: {total[0]} of {total[1]}; by record, of which there are {len(shares)}: "
        f"{100 * np.mean(shares):.1f} [{100 * low:.1f}, {100 * high:.1f}], p = {test.pvalue:.2g}; "
        f"{again} records came twice",
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
