"""Benchmarks: one file each, read as it is published and scored as its authors do.

    files -> scoring.benchmark.Benchmark.load -> records -> (a judge) -> critiques -> `scoring`

A new benchmark is a module with a `BENCHMARK`, and a line below.
"""

from __future__ import annotations

from grm_jax.benchmarks import (
    hhh,
    judgebench,
    llmbar,
    pandalm,
    ppe,
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
        ppe.PPE_PREFERENCE,
        ppe.PPE_CORRECTNESS,
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
    """The benchmark of that name; a ValueError lists the known ones."""
    if name not in BENCHMARKS:
        known = "".join(f"\n  {known}: {BENCHMARKS[known].about}" for known in sorted(BENCHMARKS))
        raise UserError(f"unknown benchmark {name!r}; there are{known}")
    return BENCHMARKS[name]
