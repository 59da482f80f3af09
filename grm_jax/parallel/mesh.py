"""The device mesh, and the one table from logical axes to mesh axes.

Mesh axes: `replica` (data parallel, parameters replicated), `fsdp` (data parallel, parameters
sharded), `tensor` (heads, feed-forward and vocabulary split).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is not here is an error, not a replicated dimension.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "seq": (),
    "tokens": ("replica", "fsdp"),  # all tokens of a batch, flattened
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "embed_replicated": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
}


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all (or the given) devices; one axis may be -1: what is left.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(
            f"at most one mesh axis may be -1, got {dict(zip(AXES, sizes, strict=True))}"
        )
    asked = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    fix = "change --mesh.replica, --mesh.fsdp or --mesh.tensor (-1 is what is left)"
    if -1 in sizes:
        known = -math.prod(sizes)
        if len(found) % known:
            raise ValueError(
                f"the mesh ({asked}) needs a multiple of {known} devices, there are {len(found)}; "
                f"{fix}"
            )
        sizes[sizes.index(-1)] = len(found) // known
    if math.prod(sizes) != len(found):
        raise ValueError(
            f"the mesh ({asked}) needs {math.prod(sizes)} devices, there are {len(found)}; {fix}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(found).reshape(sizes), AXES, axis_types=kinds)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of logical axes. Raises when two dimensions claim one mesh axis."""
    dims, used = [], set()
    for name in axes:
        if name is not None and name not in RULES:
            raise ValueError(f"no rule for logical axis {name!r}; add it to parallel.mesh.RULES")
        mesh_axes = RULES[name] if name is not None else ()
        clash = used & set(mesh_axes)
        if clash:
            raise ValueError(f"logical axes {tuple(axes)} use mesh axes {sorted(clash)} twice")
        used |= set(mesh_axes)
        dims.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*dims)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array with these logical axes on this mesh."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Make `mesh` the one that `constrain` refers to."""
    with jax.set_mesh(mesh):
        yield mesh


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pin an activation's layout on the current mesh; nothing to do on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def per_device(
    function: Callable[..., jax.Array],
    inputs: Sequence[Sequence[str | None]],
    output: Sequence[str | None],
) -> Callable[..., jax.Array]:
    """`function` on each device's part of its arguments, split by their logical axes.

    For code that the compiler can not split, such as kernels; nothing to do on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(partition_spec(axes) for axes in inputs),
        out_specs=partition_spec(output),
        check_vma=False,
    )


def token_shards() -> int:
    """Into how many parts the tokens of a batch are split on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["tokens"])


def data_parallel(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays [B, ...] (this process's part of the batch) as global arrays over the data axes.

    Raises ValueError when B does not divide by the data-parallel size.
    """
    data = sharding(mesh, ("batch",))
    ways = data_parallel(mesh)
    for name, value in batch.items():
        rows = value.shape[0] * jax.process_count()
        if rows % ways:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which {ways} data-parallel devices can not "
                "share evenly; change the batch size or the mesh"
            )
    return {
        name: jax.make_array_from_process_local_data(data, value) for name, value in batch.items()
    }
