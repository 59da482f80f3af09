"""Several processes as one run: joining them, waiting for each other, the same values everywhere.

Every process runs the same program on the same host values and holds a part of every array. Where
files are shared (the run directory is, on a network disk), the first process writes and the others
wait.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from grm_jax.errors import UserError

log = logging.getLogger("grm_jax")

Mode = Literal["auto", "on", "off"]
# Set by hand or by a launcher, all three; what JAX's own detection does not know.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(mode: Mode) -> None:
    """Join the other processes, before anything else is asked of JAX.

    Args:
      mode: "auto" joins when the environment speaks of a cluster (see `detect`); "on" always, and
        leaves it to JAX to find out which where the environment does not say; "off" never.

    Raises ValueError when the environment names a cluster only in part, and RuntimeError when the
    others can not be reached.
    """
    found = detect(os.environ)
    if mode == "off" or (mode == "auto" and found is None):
        return
    given: dict[str, Any] = {}
    if found == "JAX_*":
        given = {
            "coordinator_address": os.environ[VARIABLES[0]],
            "num_processes": int(os.environ[VARIABLES[1]]),
            "process_id": int(os.environ[VARIABLES[2]]),
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where there are CPUs alone
    jax.distributed.initialize(**given)


def detect(environment: Mapping[str, str]) -> str | None:
    """What speaks of a cluster: the JAX_* variables, Slurm, Open MPI, a TPU slice; None: nothing.

    Raises ValueError when some, but not all, of the JAX_* variables are set.
    """
    missing = [name for name in VARIABLES if name not in environment]
    if not missing:
        return "JAX_*"
    if len(missing) < len(VARIABLES):
        raise UserError(
            f"{', '.join(missing)} not set: give all of {', '.join(VARIABLES)}, or none"
        )

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if several("SLURM_NTASKS") and "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a TPU slice"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "TPU slices"
    if _tpu_vm() and environment.get("JAX_PLATFORMS", "tpu") != "cpu":
        return "a TPU VM"  # whether it is part of a slice, its metadata server tells JAX
    return None


def _tpu_vm() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_first(text: str) -> str:
    """The first process's text (at most 64 ASCII characters) in all of them; all must ask."""
    if jax.process_count() == 1:
        return text
    given = np.frombuffer(text.encode("ascii").ljust(64), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(given)).decode("ascii").rstrip()


def least_of(value: float) -> float:
    """The smallest of all processes' values; all of them must ask."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).min())


def put_same(tree: Any, where: Sharding) -> Any:
    """Host values that are equal in all processes, as arrays laid out by `where`."""
    if where.is_fully_addressable:
        return jax.device_put(tree, where)

    def put(value: Any) -> jax.Array:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = put(np.asarray(jax.random.key_data(value)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(put, tree)
