"""Benchmarks: one file each, read as published and scored by its official metric.

    files -> scoring.benchmark.Benchmark.load -> records -> (a judge) -> critiques -> `scoring`

To add a benchmark, write a module with a `BENCHMARK` and add it to the lists below.
"""

from __future__ import annotations

from grm_jax.benchmarks import (
    hhh,
    judgebench,
    llmbar,
    pandalm,
    ppe_correctness,
    ppe_preference,
    preferences,
    realmistake,
    rewardbench,
    rewardbench2,
    rmb,
    rmbench,
    synthetic,
)
from grm_jax.errors import UserError
from grm_jax.scoring.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        rewardbench.BENCHMARK,
        rewardbench2.BENCHMARK,
        ppe_preference.BENCHMARK,
        ppe_correctness.BENCHMARK,
        rmb.BENCHMARK,
        realmistake.BENCHMARK,
        rmbench.BENCHMARK,
        judgebench.BENCHMARK,
        llmbar.BENCHMARK,
        pandalm.BENCHMARK,
        hhh.BENCHMARK,
        preferences.BENCHMARK,
        synthetic.BENCHMARK,
    )
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises UserError with a list of them for an unknown name."""
    if name not in BENCHMARKS:
        known = "".join(f"\n  {known}: {BENCHMARKS[known].about}" for known in sorted(BENCHMARKS))
        raise UserError(f"unknown benchmark {name!r}; there are{known}")
    return BENCHMARKS[name]
