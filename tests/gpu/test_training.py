"""Gradient steps on a GPU: the CPU's numbers, donated memory, and what is kept in host memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.batch import completion_logprobs
from grm_jax.model.params import param_table
from grm_jax.parallel.mesh import make_mesh
from grm_jax.training.losses import sft_loss
from grm_jax.training.optimizer import OptimizerConfig, make_optimizer
from grm_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.gpu

ROWS, TOKENS, LEARNED = 4, 64, 32


@pytest.fixture(scope="module")
def batch(model):
    rows = np.random.default_rng(0).integers(4, model.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    return {
        "tokens": rows,
        "lengths": np.full(ROWS, TOKENS, np.int32),
        "starts": np.full(ROWS, TOKENS - LEARNED, np.int32),
        "targets": rows[:, TOKENS - LEARNED :],
        "mask": np.ones((ROWS, LEARNED), np.float32),
    }


def take_steps(config, params, batch, device, *, remat="none", steps=2):
    """(losses, gradient norms, the state before the last step, the state after it)."""

    def loss_fn(params, frozen, batch):
        del frozen
        logprobs, _ = completion_logprobs(
            params, config, batch, temperature=1.0, remat=remat, chunk=1024
        )
        return sft_loss(logprobs, batch["mask"])

    table, mesh = param_table(config), make_mesh(1, 1, 1, [device])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, table)
    step = make_train_step(loss_fn, optimizer, table, mesh)
    state = init_state(table, optimizer, mesh, params=jax.device_put(params, device))
    losses, norms = [], []
    for _ in range(steps):
        before = state
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, before, state


@pytest.fixture(scope="module")
def taken(model, params, batch, gpu):
    """Two steps in float32 on the device under test."""
    with jax.default_matmul_precision("highest"):
        return take_steps(model.replace(compute_dtype="float32"), params, batch, gpu)


def test_steps_are_those_of_the_cpu(taken, model, params, batch):
    config = model.replace(compute_dtype="float32")
    (_, cpu, *_) = jax.devices("cpu")
    expected, expected_norms, *_ = take_steps(config, params, batch, cpu)
    losses, norms, *_ = taken
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-3)
    assert losses[1] < losses[0]  # the second step's loss depends on the first one's update


def test_the_state_before_a_step_is_given_to_it(taken, gpu):
    """Otherwise parameters and moments would be in memory twice."""
    *_, before, state = taken
    large = [leaf for leaf in jax.tree.leaves(before) if leaf.size > 1]
    assert large and all(leaf.is_deleted() for leaf in large)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert {leaf.device for leaf in jax.tree.leaves(state.params)} == {gpu}


def test_inputs_of_layers_in_host_memory_change_no_gradient(taken, model, params, batch, gpu):
    """As with --remat offload."""
    config = model.replace(compute_dtype="float32")
    with jax.default_matmul_precision("highest"):
        found, found_norms, *_ = take_steps(config, params, batch, gpu, remat="offload", steps=1)
    np.testing.assert_allclose(found, taken[0][:1], rtol=1e-5)
    np.testing.assert_allclose(found_norms, taken[1][:1], rtol=1e-4)


def test_weights_go_to_host_memory_and_come_back(params, gpu):
    """Where the reference policy is kept with --rl.offload-reference."""
    on_device = jax.tree.map(lambda w: w.sharding.with_memory_kind("device"), params)
    on_host = jax.tree.map(lambda w: w.sharding.with_memory_kind("pinned_host"), params)
    away = jax.device_put(params, on_host)
    assert {w.sharding.memory_kind for w in jax.tree.leaves(away)} == {"pinned_host"}
    back = jax.device_put(away, on_device)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert one.sharding.memory_kind == "device"
        assert jnp.array_equal(one, other)
