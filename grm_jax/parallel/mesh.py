"""The device mesh, and the one table from logical axes to mesh axes.

Mesh axes: `replica` (data parallel, parameters replicated), `fsdp` (data parallel, parameters
sharded), `sequence` (a row's tokens split between attention layers, heads within them; parameters
sharded), `tensor` (heads, feed-forward and vocabulary split).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grm_jax.errors import UserError

AXES = ("replica", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axes. An axis that is not here is an error, not a replicated dimension.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "replicas": ("replica",),  # a batch that is split no further
    "seq": ("sequence",),
    "tokens": ("replica", "fsdp", "sequence"),  # all tokens of a batch, flattened
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "sequence"),
    "embed_replicated": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "attention_heads": ("sequence", "tensor"),  # key/value heads where rows are whole
    "head": (),
    "mlp": ("tensor",),
}


def make_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """A mesh over all (or the given) devices; one axis may be -1: what is left.

    JAX chooses the order of the devices, so that on TPUs the axes lie along the torus; those that
    communicate most come last. Of several TPU slices, the first axes cross the slower network
    between them. CPUs keep the order that they have.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = [replica, fsdp, sequence, tensor]
    if sizes.count(-1) > 1:
        raise UserError(
            f"at most one mesh axis may be -1, got {dict(zip(AXES, sizes, strict=True))}"
        )
    asked = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    fix = "change --mesh.replica, .fsdp, .sequence or .tensor (-1 is what is left)"
    if -1 in sizes:
        known = -math.prod(sizes)
        if len(found) % known:
            raise UserError(
                f"the mesh ({asked}) needs a multiple of {known} devices, there are {len(found)}; "
                f"{fix}"
            )
        sizes[sizes.index(-1)] = len(found) // known
    if math.prod(sizes) != len(found):
        raise UserError(
            f"the mesh ({asked}) needs {math.prod(sizes)} devices, there are {len(found)}; {fix}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(_ordered(found, sizes), AXES, axis_types=kinds)


def _ordered(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of these sizes, axes along the network that connects them."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform != "tpu" or len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within, between, left = [], [], len(slices)
    for size in sizes:
        between.append(math.gcd(size, left))
        within.append(size // between[-1])
        left //= between[-1]
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


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


def decode_mesh(mesh: Mesh) -> Mesh:
    """The same devices for decoding, where there is no sequence to split: heads are, further."""
    replica, fsdp, sequence, tensor = mesh.devices.shape
    devices = mesh.devices.reshape(replica, fsdp, 1, sequence * tensor)
    return mesh if sequence == 1 else Mesh(devices, AXES, axis_types=mesh.axis_types)


def local_shards(mesh: Mesh, process: int | None = None) -> list[int]:
    """Which of the batch's `data_parallel` shards this (or the given) process's devices hold.

    They need not be neighbours: a host of a TPU slice is a square of the torus, not a stretch.

    Raises UserError when two processes share some of their shards, but not all: what one process
    reads would then not be what the other one needs.
    """
    ways = data_parallel(mesh)
    shards: dict[int, set[int]] = {}
    for device, index in sharding(mesh, ("batch",)).devices_indices_map((ways,)).items():
        shards.setdefault(device.process_index, set()).add(index[0].start or 0)
    if sum(map(len, set(map(frozenset, shards.values())))) != ways:
        raise UserError(
            f"the mesh {dict(mesh.shape)} lets processes share a part of their rows; let tensor * "
            "sequence divide the devices of a process, or be a multiple of them"
        )
    return sorted(shards[jax.process_index() if process is None else process])


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch this process's devices hold, in order.

    Raises UserError when the data-parallel devices can not share `rows` evenly.
    """
    ways = data_parallel(mesh)
    if rows % ways:
        raise UserError(
            f"a batch of {rows} rows can not be shared evenly by {ways} data-parallel devices; "
            "change the batch size or the mesh"
        )
    return np.arange(rows).reshape(ways, -1)[local_shards(mesh)].ravel().tolist()


def own_rows(batch: Mapping[str, np.ndarray], mesh: Mesh, parts: int = 1) -> dict[str, np.ndarray]:
    """This process's rows of a batch that every process has whole, for `put_batch`.

    Micro-batch m of the result holds rows of the m-th of `parts` equal stretches of the batch.
    """
    found = {}
    for name, value in batch.items():
        rows = value.shape[0]
        if rows % parts:
            raise ValueError(f"batch[{name!r}]: {rows} rows do not divide into {parts} parts")
        mine = local_rows(mesh, rows // parts)
        stretches = value.reshape(parts, rows // parts, *value.shape[1:])[:, mine]
        found[name] = stretches.reshape(-1, *value.shape[1:])
    return found


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, parts: int = 1
) -> dict[str, jax.Array]:
    """Host arrays, this process's rows of a batch [B, ...], as global arrays over the data axes.

    What is a jax.Array already is passed on as it is.

    Args:
      parts: with more than one, arrays [parts, B / parts, ...], each part spread over all devices.

    Raises ValueError when the rows do not divide evenly.
    """
    data = sharding(mesh, ("batch",) if parts == 1 else (None, "batch"))
    ways, mine = data_parallel(mesh), len(local_shards(mesh))
    put = {}
    for name, value in batch.items():
        if isinstance(value, jax.Array):  # it is there already
            put[name] = value
            continue
        here, rest = value.shape[0], value.shape[1:]
        if here % (parts * mine):
            raise UserError(
                f"batch[{name!r}] has {here * ways // mine} rows, which do not divide into {parts} "
                f"micro-batches that {ways} data-parallel devices can share evenly; change the "
                "batch size, the device batch or the mesh"
            )
        lead = () if parts == 1 else (parts,)
        local = value.reshape(*lead, here // parts, *rest)
        whole = (*lead, here // parts // mine * ways, *rest)
        put[name] = jax.make_array_from_process_local_data(data, local, whole)
    return put
