"""Compiled programs, each compiled once ahead of its first call; and what sampling has cost."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from grm_jax.parallel.mesh import use_mesh
from grm_jax.parallel.multihost import put_same

log = logging.getLogger("grm_jax")


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compiled program: its name, its shape, and the seconds that compiling took."""

    name: str
    shape: Hashable
    seconds: float


class Programs:
    """Compiled programs by name and shape.

    Args:
      mesh: the mesh on which they run.

    Attributes:
      compilations: what was compiled so far.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.compilations: list[Compilation] = []
        self._programs: dict[tuple[str, Hashable], Any] = {}

    @property
    def on_cpu(self) -> bool:
        """Whether the devices of the mesh are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def put(self, tree: Any, sharding: Sharding) -> Any:
        """Host values, which are the same in every process, as device arrays with a sharding."""
        return put_same(tree, sharding)

    def run(
        self,
        name: str,
        shape: Hashable,
        function: Callable[..., Any],
        *args: Any,
        **how: Any,
    ) -> Any:
        """function(*args), compiled at the first call with this name and shape.

        Args:
          shape: everything that the program depends on besides its arguments' values.
          how: `donate`, the arguments whose memory may be reused, and `out_shardings`.
        """
        return self.compiled(name, shape, function, *args, **how)(*args)

    def compiled(
        self,
        name: str,
        shape: Hashable,
        function: Callable[..., Any],
        *args: Any,
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
    ) -> Any:
        """The compiled program that `run` calls; takes the same arguments."""
        program = self._programs.get((name, shape))
        if program is None:
            started = time.perf_counter()
            with use_mesh(self.mesh):
                jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
                program = self._programs[name, shape] = jitted.lower(*args).compile()
            seconds = time.perf_counter() - started
            self.compilations.append(Compilation(name, shape, seconds))
            log.debug("sampler: compiled %s %s in %.1f s", name, shape, seconds)
        return program


@dataclasses.dataclass
class SamplerStats:
    """The cost of sampling since the sampler was made.

    Attributes:
      prefill_tokens: the prompt tokens that were computed.
      shared_tokens: the prompt tokens that were in another prompt's pages already.
      decode_tokens: the tokens of samples that have ended.
      lane_steps: decode steps times lanes, whether a lane ran a sample or not.
      samples: the samples that have ended.
      dropped: the samples that were dropped before they began.
      cancelled: the samples that were cancelled after they began.
      prefill_seconds, decode_seconds: wall time on the host, without the time of compiling.
      cache_bytes: the largest plan's bytes of caches on a device.
    """

    prefill_tokens: int = 0
    shared_tokens: int = 0
    decode_tokens: int = 0
    lane_steps: int = 0
    samples: int = 0
    dropped: int = 0
    cancelled: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def occupancy(self) -> float:
        """The share of lane steps that drew a token of a sample."""
        return self.decode_tokens / max(1, self.lane_steps)

    @property
    def seconds(self) -> float:
        """The seconds of prefill and decoding."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """The tokens of ended samples for each second of prefill and decoding."""
        return self.decode_tokens / max(self.seconds, 1e-9)

    def line(self) -> dict[str, float]:
        """Values for a progress line: tokens per second, and the percentage of busy lanes."""
        return {"tokens/s": self.tokens_per_second, "lanes%": 100 * self.occupancy}
