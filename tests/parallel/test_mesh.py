"""From logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grm_jax.model.config import SIZES, model_config
from grm_jax.model.params import param_table
from grm_jax.parallel import mesh

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that is not there; hosts are squares of 2 x 2 chips."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"


def slice_of(x: int, y: int, index: int = 0) -> list[Chip]:
    """The chips of an x by y slice in JAX's order: by host."""
    chips = []
    for host in range(x * y // 4):
        left, low = host % (x // 2) * 2, host // (x // 2) * 2
        for column, line in ((0, 0), (1, 0), (0, 1), (1, 1)):
            coords = (left + column, low + line, 0)
            name = (index * y + coords[1]) * x + coords[0]
            chips.append(Chip(name, index * x * y // 4 + host, coords, index))
    return chips


def test_partition_spec_follows_the_rules():
    assert mesh.partition_spec(("batch", "seq", None)) == PartitionSpec(
        ("replica", "fsdp"), "sequence", None
    )
    assert mesh.partition_spec(("layers", "embed", "heads", "head")) == PartitionSpec(
        None, ("fsdp", "sequence"), "tensor", None
    )


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule for logical axis 'width'"):
        mesh.partition_spec(("embed", "width"))


def test_two_dimensions_can_not_share_a_mesh_axis():
    with pytest.raises(ValueError, match=r"use mesh axes \['tensor'\] twice"):
        mesh.partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match=r"use mesh axes \['fsdp'"):
        mesh.partition_spec(("batch", "embed"))


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_has_a_sharding(size):
    for spec in param_table(model_config(size), num_labels=1):
        assert len(mesh.partition_spec(spec.axes)) == len(spec.shape)


def test_mesh_sizes():
    devices = jax.devices()[:1] * 8  # only counted
    with pytest.raises(ValueError, match="at most one mesh axis may be -1"):
        mesh.make_mesh(-1, -1, 1, devices)
    with pytest.raises(ValueError, match="needs a multiple of 3 devices, there are 8"):
        mesh.make_mesh(3, -1, 1, devices)
    with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
        mesh.make_mesh(1, 2, 2, devices)


def test_mesh_over_devices(cpus):
    found = mesh.make_mesh(1, -1, 2, cpus)
    assert dict(found.shape) == {"replica": 1, "fsdp": 2, "sequence": 1, "tensor": 2}
    x = jax.device_put(jax.numpy.zeros((4, 6)), mesh.sharding(found, ("embed", "mlp")))
    assert x.addressable_shards[0].data.shape == (2, 3)
    assert mesh.replicated(found).is_fully_replicated


def test_cpus_keep_their_order(cpus):
    found = mesh.make_mesh(2, 1, 2, cpus[::-1])
    assert found.devices.ravel().tolist() == cpus[::-1]


def test_axes_lie_along_the_torus():
    """A group of eight of an 8 x 8 torus is a ring: a whole row or column, whose ends meet."""
    devices = mesh.make_mesh(1, -1, 8, slice_of(8, 8)).devices
    assert devices.shape == (1, 8, 1, 8) and len({d.id for d in devices.flat}) == 64
    for group in (*devices[0, :, 0], *devices[0, :, 0].T):
        columns, lines = ({d.coords[i] for d in group} for i in range(2))
        assert (len(columns), len(lines)) in {(1, 8), (8, 1)}
    # An axis may be a part of one of the torus, then of neighbours.
    devices = mesh.make_mesh(2, 8, 4, slice_of(8, 8)).devices
    for group in devices.reshape(-1, 4):
        columns, lines = ({d.coords[i] for d in group} for i in range(2))
        assert max(columns) - min(columns) + max(lines) - min(lines) in {2, 3}


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [((2, 8, 1, 4), "replica"), ((1, 16, 1, 4), "fsdp"), ((1, 1, 1, 64), "tensor")],
)
def test_the_outermost_axes_cross_between_slices(sizes, crossing):
    chips = [*slice_of(4, 8), *slice_of(4, 8, 1)]
    replica, fsdp, sequence, tensor = sizes
    devices = mesh.make_mesh(replica, fsdp, tensor, chips, sequence=sequence).devices
    assert devices.shape == sizes and len({d.id for d in devices.flat}) == 64
    slices = np.vectorize(lambda chip: chip.slice_index)(devices)
    for axis, name in enumerate(mesh.AXES):
        changes = np.abs(np.diff(slices, axis=axis)).sum(axis=axis)
        assert (changes == (name == crossing)).all()


@pytest.mark.parametrize(("fsdp", "tensor"), [(64, 1), (8, 8), (16, 4), (1, 64)])
def test_processes_hold_the_rows_of_their_devices(fsdp, tensor):
    found = mesh.make_mesh(1, fsdp, tensor, slice_of(8, 8))
    held = {p: mesh.local_shards(found, p) for p in range(16)}
    assert {shard for shards in held.values() for shard in shards} == set(range(fsdp))
    for chip, shard in zip(found.devices.flat, np.repeat(np.arange(fsdp), tensor), strict=True):
        assert shard in held[chip.process_index]


def test_processes_that_share_a_part_of_their_rows_are_refused():
    chips = [Chip(i, i // 2, (i, 0, 0)) for i in range(6)]
    found = jax.sharding.Mesh(np.reshape(chips, (1, 2, 1, 3)), mesh.AXES)
    with pytest.raises(ValueError, match="share a part of their rows"):
        mesh.local_shards(found, 0)


INTERLEAVED = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from grm_jax.parallel import mesh, multihost
multihost.initialize("on")
devices = np.reshape(sorted(jax.devices(), key=lambda d: (d.id % 2, d.id)), (1, 4, 1, 1))
spread = jax.sharding.Mesh(devices, mesh.AXES)
assert mesh.local_shards(spread) == [jax.process_index(), 2 + jax.process_index()]
batch = {"x": np.arange(16)}
put = mesh.put_batch(mesh.own_rows(batch, spread, 2), spread, parts=2)["x"]
for shard in put.addressable_shards:
    expected = batch["x"].reshape(2, 8)[shard.index]
    np.testing.assert_array_equal(np.asarray(shard.data), expected)
print("held", mesh.local_rows(spread, 8))
"""


@pytest.mark.slow
def test_two_processes_whose_rows_are_no_neighbours():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    environment.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", INTERLEAVED],
            env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "held [0, 1, 4, 5]" in outputs[0][0] and "held [2, 3, 6, 7]" in outputs[1][0]


def test_constrain_pins_only_under_a_mesh_of_several(cpus):
    x = jax.numpy.zeros((4, 6))
    assert mesh.constrain(x, ("batch", "mlp")) is x
    with mesh.use_mesh(mesh.make_mesh(1, 2, 2, cpus)):
        pinned = jax.jit(lambda x: mesh.constrain(x, ("batch", "mlp")))(x)
    assert pinned.addressable_shards[0].data.shape == (2, 3)
    with mesh.use_mesh(mesh.make_mesh(1, 1, 1, cpus[:1])):
        assert mesh.constrain(x, ("batch", "mlp")) is x


def test_decoding_splits_heads_where_training_splits_rows(cpus):
    trained = mesh.make_mesh(1, 1, 2, cpus, sequence=2)
    found = mesh.decode_mesh(trained)
    assert dict(found.shape) == {"replica": 1, "fsdp": 1, "sequence": 1, "tensor": 4}
    assert found.devices.flat[:].tolist() == trained.devices.flat[:].tolist()
    plain = mesh.make_mesh(1, 2, 2, cpus)
    assert mesh.decode_mesh(plain) is plain


def test_rows_are_dealt_out_by_micro_batch(cpus):
    """Whole batches on one process: nothing moves, and every part spreads over all devices."""
    found = mesh.make_mesh(2, 2, 1, cpus)
    batch = {"x": np.arange(16).reshape(16, 1)}
    assert mesh.local_rows(found, 16) == list(range(16))
    np.testing.assert_array_equal(mesh.own_rows(batch, found, 2)["x"], batch["x"])
    put = mesh.put_batch(batch, found, parts=2)["x"]
    assert put.shape == (2, 8, 1) and put.addressable_shards[0].data.shape == (2, 2, 1)
    np.testing.assert_array_equal(np.asarray(put).ravel(), np.arange(16))
    assert mesh.put_batch({"x": put}, found, parts=2)["x"] is put
    with pytest.raises(ValueError, match=r"12 rows, which do not divide into 2 micro-batches"):
        mesh.put_batch({"x": np.zeros(12)}, found, parts=2)
