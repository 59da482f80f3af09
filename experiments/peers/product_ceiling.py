"""How fast a sampler would be whose step is nothing but its matrix products."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from grm_jax.model.config import ModelConfig
from grm_jax.model.storage import read_model_config

PRODUCTS = """
import json, statistics, sys, time
import jax, jax.numpy as jnp
rows, layers, shapes, dtype = json.loads(sys.argv[1])
key = jax.random.key(0)
weights = [[jax.random.normal(key, tuple(s), dtype) for s in shapes] for _ in range(layers)]
inputs = [jax.random.normal(key, (rows, s[0]), dtype) for s in shapes]
multiply = jax.jit(lambda xs, ws: [
    [jnp.matmul(x, w, preferred_element_type=jnp.float32) for x, w in zip(xs, layer)]
    for layer in ws
])
times = []
for _ in range(12):
    started = time.perf_counter()
    jax.block_until_ready(multiply(inputs, weights))
    times.append(time.perf_counter() - started)
print(json.dumps(statistics.median(times)))
"""


def ceiling(
    threads: int, model: Path, dtype: str, rows: Sequence[int] = (8, 32)
) -> dict[str, float]:
    """Tokens/s if a step were its matrix products alone, by the number of rows: {"k 8": ..}.

    Args:
      threads: cores to use, from the first one on.
      model: the folder that `sampler/make_model.py` wrote.
      dtype: of weights and inputs; products are accumulated in float32.
      rows: samples drawn at once.
    """
    c: ModelConfig = read_model_config(model)
    layer = [
        (c.embed_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
        (c.num_heads * c.head_dim, c.embed_dim),
        (c.embed_dim, 2 * c.hidden_dim),
        (c.hidden_dim, c.embed_dim),
    ]
    head = [(c.embed_dim, c.vocab_size)]
    found = {}
    for k in rows:
        total = 0.0
        for layers, shapes in ((c.num_layers, layer), (1, head)):
            command = ["taskset", "-c", ",".join(map(str, range(threads)))]
            command += [sys.executable, "-c", PRODUCTS, json.dumps([k, layers, shapes, dtype])]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            total += float(out.stdout)
        found[f"k {k}"] = round(k / total, 1)
    return found
