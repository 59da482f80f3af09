"""What a second look costs: `python experiments/evaluate/reaggregate.py --data DIR --model MODEL`.

Evaluates a model on a benchmark with an empty cache, and again as a new process under other rules
and with another bootstrap, from the cache. Prints seconds of sampling (from the cache's own notes),
of both processes, and of the figures alone (samples.jsonl read, votes, intervals, bias), with their
shares of the sampling. Writes reaggregate.json, an entry a benchmark and model.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from grm_jax.benchmarks import get_benchmark
from grm_jax.data.critiques import read_critiques
from grm_jax.scoring.assess import assess
from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Path
    data: Path
    bench: str = "rewardbench"
    meta: Path | None = None
    k: int = 32
    limit: int = 100
    max_new_tokens: int | None = None


def main(args: Arguments) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        cache, output = Path(scratch) / "cache", Path(scratch) / "out"
        common = [
            sys.executable, "-m", "grm_jax.evaluate", "--bench", args.bench, "--data",
            str(args.data), "--model", str(args.model), "-k", str(args.k), "--limit",
            str(args.limit), "--cache", str(cache), "--output", str(output),
        ]  # fmt: skip
        if args.max_new_tokens is not None:
            common += ["--max-new-tokens", str(args.max_new_tokens)]
        if args.meta is not None:
            common += ["--meta", str(args.meta)]
        first = timed(common)
        spent = [
            json.loads(line)
            for file in cache.glob("*/seconds.jsonl")
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        second = timed([*common, "--ties", "wrong", "--unparsed", "wrong", "--resamples", "4000"])
        figures = figures_seconds(args, output / args.bench / "samples.jsonl")
    sampling = sum(row["seconds"] for row in spent)
    found = {
        "k": args.k,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "versions": versions(),
        "samples": sum(row["samples"] for row in spent),
        "sampling_seconds": round(sampling, 1),
        "first_seconds": round(first, 1),
        "second_seconds": round(second, 1),
        "second_share": round(second / sampling, 4),
        "figures_seconds": round(figures, 2),
        "figures_share": round(figures / sampling, 4),
    }
    file = HERE / "reaggregate.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept[f"{args.bench}, {args.model.name}"] = found
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def figures_seconds(args: Arguments, samples: Path) -> float:
    """Of one more look at the samples, in this process."""
    benchmark = get_benchmark(args.bench)
    rules = dataclasses.replace(benchmark.authors, ties="wrong", unparsed="wrong")
    records = benchmark.load(args.data, rules=rules, limit=args.limit, seed=0, skip_bad_rows=False)
    started = time.perf_counter()
    assess(benchmark, records, read_critiques(samples), judge="", rules=rules)
    return time.perf_counter() - started


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
