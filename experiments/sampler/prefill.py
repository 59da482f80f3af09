"""What a call of prefill costs, against the number of pages that the cache holds.

    python experiments/sampler/prefill.py

Random weights in the shapes of SmolLM2-135M; 16 pages of 128 tokens are computed and written, each
after four earlier pages. A call writes the same bytes whatever the size of the cache, so that its
time should not depend on it. Seconds, medians of `--repeats`. Writes prefill.md beside this file.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from grm_jax.model.config import ModelConfig, model_config
from grm_jax.model.params import init_params, param_table
from grm_jax.sampler import cache, decode

HERE = Path(__file__).resolve().parent
COMPUTED, SLOTS, EARLIER = 16, 128, 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    pages: tuple[int, ...] = (64, 256, 768)
    """Pages of the cache."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int = 5


def main(args: Arguments) -> None:
    on_cpu = jax.default_backend() == "cpu"
    found: dict[str, list[float]] = {}
    for dtype in args.dtypes:
        config = model_config("smollm2_135m").replace(compute_dtype=dtype)
        params = init_params(param_table(config), jax.random.key(0), dtype)
        found[dtype] = [seconds(config, params, n, args.repeats, on_cpu) for n in args.pages]
    heads = [f"{pages} pages" for pages in args.pages]
    lines = [f"| {' | '.join(['', *heads])} |", "|" + " ---: |" * (len(heads) + 1)]
    lines += [
        f"| {dtype} | {' | '.join(f'{value:.2f}' for value in values)} |"
        for dtype, values in found.items()
    ]
    text = "\n".join(lines) + "\n"
    (HERE / "prefill.md").write_text(text, encoding="utf-8")
    print(text)


def seconds(config: ModelConfig, params, pages: int, repeats: int, on_cpu: bool) -> float:
    """The median seconds of a call."""
    held = cache.empty_pages(config, 1, pages, SLOTS, on_cpu=on_cpu)

    def compute(params, held, *arrays):
        return decode.compute_pages(params, config, held, *arrays)

    program = jax.jit(compute, donate_argnums=1)
    tokens = jnp.ones((1, COMPUTED, SLOTS), jnp.int32)
    start = jnp.full((1, COMPUTED), EARLIER * SLOTS)
    fill = jnp.full((1, COMPUTED), SLOTS)
    earlier = jnp.tile(jnp.arange(EARLIER), (1, COMPUTED, 1))
    targets = jnp.arange(COMPUTED)[None] + EARLIER
    times = []
    for _ in range(1 + repeats):
        before = time.perf_counter()
        held = program(params, held, tokens, start, fill, earlier, targets)
        jax.block_until_ready(held)
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:])  # the first one compiles


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
