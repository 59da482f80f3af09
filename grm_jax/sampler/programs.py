"""Compiled programs. Each is compiled once, ahead of its first call, and is counted and logged."""

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
