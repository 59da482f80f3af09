"""The dtype that a model is computed in, chosen by what the device is fast in.

Weights are multiplied, and activations are kept, in this dtype; products are added up in float32
whatever it is, and trained parameters and their moments are float32 besides (`linear`, `heads`).
`auto` takes the dtype of the checkpoint: bfloat16 for released Gemma-2 models, float32 for the
embedded world's. Accelerators are built for bfloat16. Some CPUs are, too, and others emulate it at
a fraction of float32's speed, so a CPU is measured, once a process.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.errors import UserError
from grm_jax.model.options import ComputeDtype
from grm_jax.parallel.multihost import any_of

log = logging.getLogger("grm_jax")

FASTER = 1.5  # how many times as fast as float32 a CPU must be in bfloat16 for auto to take it

# The product that is timed: large enough to be bound by arithmetic, small enough for the caches.
_ROWS, _IN, _OUT = 512, 768, 2048
_REPEATS = 8


def choose_dtype(requested: ComputeDtype, own: str, platform: str) -> str:
    """The dtype to compute a model in. A choice made by "auto" is logged once, with its reason.

    Args:
      requested: a dtype, or "auto" for the checkpoint's own where the device is fast in it.
      own: the checkpoint's dtype (`ModelConfig.dtype`).
      platform: the attribute of a JAX device.

    Raises UserError for an unknown dtype.
    """
    known = get_args(ComputeDtype)
    if requested not in known:
        raise UserError(f"unknown compute dtype {requested!r}; choose one of {', '.join(known)}")
    if requested != "auto":
        return requested
    if own != "bfloat16":
        _log_once("float32", "the checkpoint's own")
        return "float32"
    if platform != "cpu":
        _log_once("bfloat16", f"the checkpoint's own, on a {platform}")
        return "bfloat16"
    speedup = bfloat16_speedup()
    # All processes of a run must compute alike.
    dtype = "float32" if any_of(speedup < FASTER) else "bfloat16"
    _log_once(dtype, f"this CPU multiplies bfloat16 {speedup:.1f} times as fast as float32")
    return dtype


@functools.cache
def bfloat16_speedup() -> float:
    """How many times as fast as in float32 this machine's CPU multiplies in bfloat16.

    The two are timed in turn, and the fastest of each counts, so that other work on the machine
    does not decide. It takes about a fifth of a second.
    """
    products = [_product("float32"), _product("bfloat16")]
    seconds = [[_seconds(product) for product in products] for _ in range(_REPEATS)]
    wide, narrow = (min(column) for column in zip(*seconds, strict=True))
    return wide / narrow


def _product(dtype: str) -> Callable[[], jax.Array]:
    cpu = jax.local_devices(backend="cpu")[0]
    place = jax.sharding.SingleDeviceSharding(cpu)
    x, w = (
        jax.device_put(np.ones(shape, jnp.dtype(dtype)), place)
        for shape in ((_ROWS, _IN), (_IN, _OUT))
    )
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    compiled = jax.jit(matmul).lower(x, w).compile()
    jax.block_until_ready(compiled(x, w))
    return lambda: compiled(x, w)


def _seconds(function: Callable[[], jax.Array]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


@functools.cache
def _log_once(dtype: str, reason: str) -> None:
    log.info("compute dtype    %s (%s)", dtype, reason)
