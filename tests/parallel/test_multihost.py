"""Which environments are clusters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.parallel.multihost import any_of, detect, put_same

VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (VARIABLES, "JAX_*"),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2"}, None),  # in an allocation, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (SLURM | VARIABLES, "JAX_*"),
    ],
)
def test_detect(environment, found):
    assert detect(environment) == found


def test_half_a_cluster_is_refused():
    some = {"JAX_NUM_PROCESSES": "4"}
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set: give"):
        detect(some)


def test_one_process_needs_no_agreement(mesh_of):
    assert any_of(True) and not any_of(False)
    where = jax.sharding.NamedSharding(mesh_of(2, 2, 1), jax.sharding.PartitionSpec())
    put = put_same({"a": np.arange(3), "k": jax.random.key(1)}, where)
    assert put["a"].sharding == where
    assert (jax.random.key_data(put["k"]) == jax.random.key_data(jax.random.key(1))).all()
    assert isinstance(put["a"], jax.Array) and jnp.sum(put["a"]) == 3
