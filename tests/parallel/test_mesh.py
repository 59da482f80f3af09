"""From logical axes to mesh axes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grm_jax.model.config import SIZES, model_config
from grm_jax.model.params import param_table
from grm_jax.parallel import mesh


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
    assert mesh.local_rows(found, 16) == slice(0, 16)
    np.testing.assert_array_equal(mesh.own_rows(batch, found, 2)["x"], batch["x"])
    put = mesh.put_batch(batch, found, parts=2)["x"]
    assert put.shape == (2, 8, 1) and put.addressable_shards[0].data.shape == (2, 2, 1)
    np.testing.assert_array_equal(np.asarray(put).ravel(), np.arange(16))
    assert mesh.put_batch({"x": put}, found, parts=2)["x"] is put
    with pytest.raises(ValueError, match=r"12 rows, which do not divide into 2 micro-batches"):
        mesh.put_batch({"x": np.zeros(12)}, found, parts=2)
