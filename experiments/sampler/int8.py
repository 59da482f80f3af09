"""What 8-bit decoding costs in accuracy, on a finished road on the embedded world.

    python experiments/sampler/int8.py --run runs/tiny

The RL model judges the held-out records with its matrices, its caches, both and neither stored in 8
bits: the same orders and random numbers, so differences are paired. Writes int8.json and int8.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from grm_jax.benchmarks import synthetic
from grm_jax.critique import credit, vote
from grm_jax.critique.voting import Scores
from grm_jax.data.preferences import Preference
from grm_jax.judge.judge import Judge
from grm_jax.judge.request import JudgeOptions
from grm_jax.metrics import Progress, setup_logging
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.scoring.results import versions
from grm_jax.scoring.statistics import mean_interval
from grm_jax.train import setup_devices

HERE = Path(__file__).resolve().parent
THRESHOLD = 0.5  # single responses of the embedded world are scored 0 or 1
FORMS = {
    "as trained": (False, False),
    "matrices": (True, False),
    "caches": (False, True),
    "both": (True, True),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path = Path("runs/tiny")
    k: int = 32
    cpu_devices: int = 2


def main(args: Arguments) -> None:
    setup_devices(args.cpu_devices)
    setup_logging()
    records = [r for r in synthetic.BENCHMARK.load(args.run) if r.domain == synthetic.FRESH]
    judge = Judge.load(args.run, mesh=make_mesh())
    found: dict[str, dict[str, list[float]]] = {}
    for name, (weights, cache) in FORMS.items():
        sampler = judge.sampler
        engine = dataclasses.replace(sampler.engine, int8_weights=weights, int8_cache=cache)
        stop_ids = sampler.stop_ids.tolist()
        judge.sampler = Sampler(sampler.model, stop_ids, engine, sampler.mesh)
        progress = Progress(f"8 bits: {name}", len(records) * (args.k + 1))
        rows = judge.sample(records, JudgeOptions(k=args.k, greedy=True), progress)
        scores: dict[str, list[Scores | None]] = {r.id: [None] * args.k for r in records}
        greedy: dict[str, Scores | None] = {}
        for row in rows:
            if row.greedy:
                greedy[row.example_id] = row.scores
            else:
                scores[row.example_id][row.sample] = row.scores
        found[name] = {
            "greedy": [earned(r, [greedy[r.id]]) for r in records],
            "one sample": [float(np.mean([earned(r, [s]) for s in scores[r.id]])) for r in records],
            f"vote@{args.k}": [earned(r, scores[r.id]) for r in records],
        }
    results, lines = {}, []
    columns = list(found["as trained"])
    lines = ["| 8-bit | " + " | ".join(columns) + " |", "| :--- |" + " ---: |" * len(columns)]
    for name, credits in found.items():
        cells, results[name] = [], {}
        for column in columns:
            value = mean_interval(credits[column])
            before = found["as trained"][column]
            apart = [x - y for x, y in zip(credits[column], before, strict=True)]
            difference = mean_interval(apart)
            results[name][column] = {"accuracy": vars(value), "difference": vars(difference)}
            cell = f"{100 * value.value:.1f}"
            if name != "as trained":
                low, high = difference.bounds or (math.nan, math.nan)
                cell += f" ({100 * difference.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])"
            cells.append(cell)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    text = "\n".join(lines) + "\n"
    kind = jax.devices()[0].device_kind
    about = {"records": len(records), "versions": versions(), "device": kind}
    output = json.dumps(about | {"results": results}, indent=2) + "\n"
    (HERE / "int8.json").write_text(output, encoding="utf-8")
    (HERE / "int8.md").write_text(text, encoding="utf-8")
    print(text)


def earned(record: Preference, scores: Sequence[Scores | None]) -> float:
    return credit(vote(scores), record.labels, THRESHOLD)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
