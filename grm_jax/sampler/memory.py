"""How much of a device's memory a rollout may give to its caches.

    free now - decoding weights - a prefill's activations, less a tenth

Planned from shapes before anything is allocated: fewer samples run at once rather than too many.

Dimensions: D embed, F hidden, H heads, K key/value heads, h head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import param_table
from grm_jax.parallel.mesh import data_parallel
from grm_jax.parallel.multihost import least_of
from grm_jax.sampler.plan import EngineConfig

MARGIN = 0.9  # the rest is for fragments and what compilers add


class CacheBudget:
    """The engine's sizes with a limit for caches, where the user or the devices set one."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, mesh: Mesh):
        self._model, self._engine, self._mesh = model, engine, mesh
        self.forget()

    def forget(self) -> None:
        """Ask the devices again, at the next call, what they have free. Until then the first answer
        holds: a plan that changed with every free byte would compile again and again.
        """
        self._asked, self._free = False, None

    def within(self, longest: int, *, laid_out: bool = False) -> EngineConfig:
        """Settings for prompts of at most `longest` tokens; `laid_out` as in `cache_room`."""
        if self._engine.cache_bytes is not None:
            return self._engine
        if not self._asked:
            self._asked, self._free = True, free_bytes(self._mesh)
        if self._free is None:
            return self._engine
        room = cache_room(
            self._model, self._engine, self._mesh, longest, self._free, laid_out=laid_out
        )
        return dataclasses.replace(self._engine, cache_bytes=room)


def free_bytes(mesh: Mesh) -> float | None:
    """Memory that nothing holds, on the fullest device of the mesh; None where devices do not tell
    (a CPU). All processes must ask."""
    here = jax.process_index()
    told = [d.memory_stats() for d in mesh.devices.flat if d.process_index == here]
    if not all(told):
        return None
    return least_of(min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in told))


def cache_room(
    model: ModelConfig,
    engine: EngineConfig,
    mesh: Mesh,
    length: int,
    free: float,
    *,
    laid_out: bool = False,
) -> int:
    """Bytes of caches a device has room for.

    Args:
      mesh: for decoding.
      length: of the longest prompt.
      free: bytes before the rollout.
      laid_out: the decoding weights are there already (`weights.take`), and not in `free`.
    """
    weights = 0.0 if laid_out else decode_weight_bytes(model, mesh)
    at_once = max(engine.page, engine.prefill_tokens // data_parallel(mesh))
    activations = prefill_bytes(model, mesh, at_once, length)
    return max(0, int(MARGIN * free - weights - activations))


def decode_weight_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """Weights of decoding on one device: split over the tensor axis alone, in the compute dtype."""
    width = jnp.dtype(model.compute_dtype).itemsize
    split = ("vocab", "heads", "kv_heads", "mlp")
    return float(
        sum(
            math.prod(spec.shape) * width
            / (mesh.shape["tensor"] if any(axis in split for axis in spec.axes) else 1)
            for spec in param_table(model)
        )
    )  # fmt: skip


def prefill_bytes(model: ModelConfig, mesh: Mesh, tokens: int, length: int) -> float:
    """Activations of computing `tokens` prompt tokens at once, after prompts of `length`."""
    c, width = model, jnp.dtype(model.compute_dtype).itemsize
    tensor = mesh.shape["tensor"]
    linear = tokens * (4 * c.embed_dim + 3 * c.hidden_dim / tensor) * width
    scores = 2 * tokens * length * c.num_heads / tensor * 4
    return linear + scores
