"""k-way sampling on an accelerator: `python experiments/sampler/bench.py --device gpu`.

Random weights of a size, bfloat16: tokens/s for prompts x k x number of prompts, beside the floor
that memory sets (a step must read every weight, each prompt's keys and values once, and each
sample's own), at the bandwidth measured in the same run, and the peak memory.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.model.config import ModelConfig, model_config
from grm_jax.model.params import init_params, param_table
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.plan import token_bytes
from grm_jax.sampler.schedule import Request

PROMPTS, KS, COUNTS = (512, 2048, 4096), (8, 32), (1, 8)


def measure(size: str, new: int, repeats: int, engine: EngineConfig) -> dict[str, Any]:
    """Every setting; prints a line each."""
    device = jax.devices()[0]
    model = model_config(size)
    table = param_table(model)
    dtype = jnp.dtype(model.compute_dtype)
    make = jax.jit(lambda key: jax.tree.map(lambda w: w.astype(dtype), init_params(table, key)))
    params = jax.block_until_ready(make(jax.random.key(0)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    bandwidth = read_bandwidth()
    found: dict[str, Any] = {
        "device": device.device_kind,
        "size": size,
        "new_tokens": new,
        "bandwidth_gb_s": round(bandwidth / 1e9),
        "settings": [],
    }
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    for length, k, count in itertools.product(PROMPTS, KS, COUNTS):
        if length + new > model.max_position:
            continue
        sampler = Sampler(model, [model.vocab_size + 1], engine, mesh)
        rng = np.random.default_rng(0)
        requests = [
            Request(str(i), tuple(rng.integers(4, model.vocab_size, length).tolist()), range_of(k))
            for i in range(count)
        ]
        settings = SamplingConfig(max_new_tokens=new)
        seconds, decode = [], []
        for repeat in range(repeats + 1):
            before = sampler.stats.decode_seconds
            started = time.perf_counter()
            drawn = sum(
                len(sample.tokens)
                for sample in sampler.sample(params, requests, settings, jax.random.key(repeat))
            )
            seconds.append(time.perf_counter() - started)
            decode.append(sampler.stats.decode_seconds - before)
        assert drawn == k * count * new
        step = statistics.median(decode[1:]) / new  # the first one compiles
        least = floor_bytes(model, weights, length, k, count, new) / bandwidth
        memory = device.memory_stats() or {}
        row = {
            "prompt": length,
            "k": k,
            "prompts": count,
            "tokens_per_second": round(drawn / statistics.median(seconds[1:]), 1),
            "decode_tokens_per_second": round(k * count / step, 1),
            "step_ms": round(1e3 * step, 2),
            "floor_ms": round(1e3 * least, 2),
            "share_of_floor": round(least / step, 2),
            "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
            "compilations": len(sampler.programs.compilations),
        }
        print(row, flush=True)
        found["settings"].append(row)
    return found


def range_of(k: int) -> tuple[int, ...]:
    return tuple(range(k))


def floor_bytes(
    model: ModelConfig, weights: int, length: int, k: int, count: int, new: int
) -> float:
    """What a decode step must read, on average over the `new` steps."""
    token = token_bytes(model)
    local = min(length, model.sliding_window)
    prompt = count * (length + local) / 2 * token
    return weights + prompt + count * k * new / 2 * token


def read_bandwidth() -> float:
    """Bytes/s of reading an array once."""
    array = jnp.ones(2**28 if jax.devices()[0].platform != "cpu" else 2**24, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.max(x))
    jax.block_until_ready(total(array))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(total(array))
        times.append(time.perf_counter() - started)
    return array.size * 2 / statistics.median(times)
