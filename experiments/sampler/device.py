"""k-way sampling on an accelerator: `python experiments/sampler/bench.py --device gpu`.

Random weights of a size, in its own dtype: tokens/s for prompts x k x number of prompts, beside
the floor that memory sets (a step must read every weight, each prompt's keys and values once, and
each sample's own), at the bandwidth of the data sheet and at the one measured in the same run, and
the peak memory. `experiments/gpu/sampling.py` measures the same within a time limit.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, build_tree, param_table
from grm_jax.parallel.devices import find_device
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.plan import token_bytes
from grm_jax.sampler.schedule import Request


class Setting(NamedTuple):
    """`prompts` prompts of `prompt` tokens, and k samples of each."""

    prompt: int
    k: int
    prompts: int

    def __str__(self) -> str:
        return f"prompt {self.prompt}, k {self.k}, prompts {self.prompts}"


# Prompts of 512, 2,048 and 4,096 tokens x k of 8 and 32 x 1 and 8 prompts; those that tell most
# come first, since whoever has little time measures only the first ones.
SETTINGS = tuple(
    Setting(*numbers)
    for numbers in (
        (512, 8, 1), (2048, 32, 8), (512, 32, 8), (4096, 32, 8), (2048, 8, 1), (512, 32, 1),
        (4096, 32, 1), (2048, 32, 1), (4096, 8, 1), (2048, 8, 8), (512, 8, 8), (4096, 8, 8),
    )
)  # fmt: skip


class DeviceBench:
    """A sampler with random weights on the first device, and the bytes that a step reads.

    Args:
      model: the shape of the model, which is computed in its checkpoint's own dtype.
      engine: how the device is used.

    Attributes:
      weights: the bytes of the weights as decoding reads them.
      bandwidth: bytes/s of reading an array once, measured.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig):
        self.model = model = model.replace(compute_dtype=model.dtype)
        self.device = jax.devices()[0]
        self.sampler = Sampler(
            model, [model.vocab_size + 1], engine, make_mesh(1, 1, 1, [self.device])
        )
        self.params = self.sampler.take(random_params(model))
        self.weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.bandwidth = read_bandwidth()

    def about(self) -> dict[str, Any]:
        """What holds for all settings."""
        sheet = find_device(self.device.device_kind)
        return {
            "device": self.device.device_kind,
            "dtype": self.model.compute_dtype,
            "weights_gib": round(self.weights / 2**30, 2),
            "bandwidth_gb_s": round(self.bandwidth / 1e9),
            "data_sheet_gb_s": round(sheet.bandwidth / 1e9) if sheet else None,
        }

    def measure(self, setting: Setting, new: int, repeats: int) -> dict[str, Any]:
        """One setting: medians of `repeats` runs of `new` tokens a sample, after a first run, which
        compiles. Seconds of decoding are without prefill; `share of floor` is the least time of a
        step, at the data sheet's bandwidth, over the measured one."""
        length, k, count = setting
        rng = np.random.default_rng(0)
        requests = [
            Request(
                str(i), tuple(rng.integers(4, self.model.vocab_size, length).tolist()),
                tuple(range(k)),
            )
            for i in range(count)
        ]  # fmt: skip
        stats, programs = self.sampler.stats, self.sampler.programs
        compiled_before = len(programs.compilations)
        seconds, decode = [], []
        for repeat in range(repeats + 1):
            before = stats.decode_seconds
            started = time.perf_counter()
            drawn = sum(
                len(sample.tokens)
                for sample in self.sampler.sample(
                    self.params, requests, SamplingConfig(max_new_tokens=new),
                    jax.random.key(repeat),
                )
            )  # fmt: skip
            seconds.append(time.perf_counter() - started)
            decode.append(stats.decode_seconds - before)
        assert drawn == k * count * new
        step = statistics.median(decode[1:]) / new
        read = floor_bytes(self.model, self.weights, length, k, count, new)
        sheet = find_device(self.device.device_kind)
        return {
            **setting._asdict(),
            "tokens/s": round(drawn / statistics.median(seconds[1:]), 1),
            "decoding tokens/s": round(k * count / step, 1),
            "step, ms": round(1e3 * step, 2),
            "read a step, GB": round(read / 1e9, 3),
            "share of floor": round(read / sheet.bandwidth / step, 3) if sheet else None,
            "share at measured bandwidth": round(read / self.bandwidth / step, 3),
            "first run, s": round(seconds[0], 1),
            "programs": len(programs.compilations) - compiled_before,
        }


def random_params(model: ModelConfig) -> Params:
    """Random weights in the checkpoint's dtype. They are made one after the other, the largest
    first, so that making them takes little more memory than they do."""
    make = jax.jit(
        lambda key, std, shape: std * jax.random.normal(key, shape, model.dtype),
        static_argnums=(1, 2),
    )
    table = sorted(param_table(model), key=lambda spec: -math.prod(spec.shape))
    keys = jax.random.split(jax.random.key(0), len(table))
    leaves = {
        spec.path: jax.block_until_ready(make(key, spec.init_std, spec.shape))
        for spec, key in zip(table, keys, strict=True)
    }
    return build_tree(tuple(table), lambda spec: leaves[spec.path])


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
    array = jnp.ones(2**31 if jax.devices()[0].platform != "cpu" else 2**24, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.max(x))
    jax.block_until_ready(total(array))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(total(array))
        times.append(time.perf_counter() - started)
    return array.size * 2 / statistics.median(times)
