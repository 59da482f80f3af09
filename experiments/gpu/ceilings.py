"""What the device is and reaches: matrix products and memory, beside its data sheet; and which of
the optional packages are there."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))

import jax
import jax.numpy as jnp
import numpy as np
from device import read_bandwidth
from part import Report, about_jax, parser

from grm_jax.parallel.devices import find_device

OPTIONAL = {
    "torch": "the sampler's peer",
    "transformers": "the sampler's peer",
    "tokamax": "a fused attention kernel",
}


class Sizes(NamedTuple):
    """The side of a square product, and the bytes of a transfer."""

    side: int
    transfer: int


FULL, DRY = Sizes(8192, 2**30), Sizes(256, 2**20)


def main() -> None:
    told = parser(__doc__).parse_args()
    sizes = DRY if told.dry else FULL
    report = Report(told)
    report.about(**about_jax())
    device = jax.devices()[0]
    sheet = find_device(device.device_kind)

    def row(what: str, reached: float, unit: str, data_sheet: float | None = None) -> None:
        share = reached / data_sheet if data_sheet else None
        report.row(
            what=what, reached=significant(reached), unit=unit, data_sheet=data_sheet,
            share=None if share is None else round(share, 2),
        )  # fmt: skip

    stats = device.memory_stats() or {}
    if stats:
        row("memory for JAX", stats["bytes_limit"] / 2**30, "GiB", sheet and sheet.memory / 2**30)
    read = read_bandwidth() / 1e9
    row("reading an array once", read, "GB/s", sheet and sheet.bandwidth / 1e9)
    for dtype in (jnp.bfloat16, jnp.float32):
        a, b = jax.random.normal(jax.random.key(0), (2, sizes.side, sizes.side), dtype)
        seconds = median_seconds(jax.jit(jnp.matmul), a, b)
        peak = sheet.flops / 1e12 if sheet and dtype == jnp.bfloat16 else None
        name = f"a product of side {sizes.side}, {jnp.dtype(dtype).name}"
        row(name, 2 * sizes.side**3 / seconds / 1e12, "TFLOP/s", peak)
    host = np.ones(sizes.transfer, np.int8)
    seconds = median_seconds(lambda: jax.device_put(host, device))
    row("from the host to the device", sizes.transfer / seconds / 1e9, "GB/s")
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            report.note(f"{name} is not installed ({what}): what needs it is left out.")


def median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    """Seconds of a call whose result is there, after a first one that is not counted."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def significant(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
