"""The gradient step: micro-batches, meshes, empty parts, frozen inputs."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grm_jax.data.collate import Example, collate, collate_groups
from grm_jax.model.batch import completion_logprobs, group_logprobs, row_scores
from grm_jax.model.params import param_table
from grm_jax.sampler.options import SamplingConfig
from grm_jax.training.losses import bce_loss, sft_loss
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.options import RL, OptimizerConfig
from grm_jax.training.rl import by_length, policy_objective
from grm_jax.training.setup import Setup
from grm_jax.training.step import init_state, make_train_step, zeros_of

ROWS = 8
CONFIG = RL(kl_coef=0.3, sampling=SamplingConfig(temperature=0.8))


@pytest.fixture(scope="module")
def batch(model, params):
    """Completions of 1 to 12 tokens: parts of the batch have very unequal token counts."""
    rng = np.random.default_rng(0)
    lengths = [12, 11, 12, 10, 1, 2, 1, 3]
    examples = [
        Example(
            tuple(rng.integers(4, 40, rng.integers(2, 9)).tolist()),
            tuple(rng.integers(4, 40, n).tolist()),
            float(i % 2),
        )
        for i, n in enumerate(lengths)
    ]
    return collate(examples, length=24, completion=12)


@pytest.fixture(scope="module")
def rollouts(model, params):
    """Groups of two completions of 1 to 12 tokens; parts of the batch are very unequal."""
    rng = np.random.default_rng(0)
    lengths = [(12, 11), (12, 10), (11, 12), (9, 12), (1, 2), (1, 3), (2, 2), (1, 1)]
    batch = collate_groups(
        [rng.integers(4, 40, rng.integers(2, 9)).tolist() for _ in lengths],
        [[rng.integers(4, 40, n).tolist() for n in pair] for pair in lengths],
        length=8,
        completion=12,
    )
    batch["advantages"] = rng.normal(size=(ROWS, 2)).astype(np.float32)
    # Near the policy's own: some ratios are beyond the clip, some are not.
    logprobs, _ = group_logprobs(params, model, batch, temperature=0.8, remat="none", chunk=999)
    batch["old"] = np.asarray(logprobs) + 0.2 * rng.normal(size=(ROWS, 2, 12)).astype(np.float32)
    return batch


@pytest.fixture(scope="module")
def reference(model, make_params):
    return make_params(model, 1)


def language_model_loss(model):
    def loss_fn(params, frozen, batch):
        del frozen
        logprobs, _ = completion_logprobs(
            params, model, batch, temperature=1.0, remat="none", chunk=1 << 20
        )
        return sft_loss(logprobs, batch["mask"])

    return loss_fn


def rollout_loss(model, aggregation="sequence"):
    run = types.SimpleNamespace(model=model, setup=Setup(remat="none", logprob_chunk=1 << 20))
    return policy_objective(run, dataclasses.replace(CONFIG, aggregation=aggregation))  # pyright: ignore[reportArgumentType]


def reference_logprobs(model, params, batch):
    found, _ = group_logprobs(params, model, batch, temperature=0.8, remat="none", chunk=999)
    return np.asarray(found)


def stepped(loss_fn, table, mesh, params, frozen, batch, *, micro_batches=1, optimizer=None):
    """Parameters and metrics after one step; plain descent by default, so gradients are seen."""
    optimizer = optimizer or optax.sgd(1.0)
    step = make_train_step(loss_fn, optimizer, table, mesh, micro_batches=micro_batches)
    return run_step(step, init_state(table, optimizer, mesh, params=params), frozen, batch)


def run_step(step, state, frozen, batch):
    state, metrics = step(state, frozen, batch)
    assert int(state.step) == 1
    return jax.device_get(state.params), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def rl_step(model, params, reference, table, one_device):
    """(batch, reference policy, parts=1, mesh=one device, aggregation) -> parameters, metrics.

    Steps are kept: compiling them is what takes time.
    """

    @functools.cache
    def compiled(mesh, parts, aggregation):
        loss_fn = rollout_loss(model, aggregation)
        return make_train_step(
            loss_fn, optax.sgd(1.0), table, mesh, micro_batches=parts, cut=by_length
        )

    def run(batch, frozen=None, *, parts=1, mesh=one_device, aggregation="sequence"):
        batch = batch | {"reference": reference_logprobs(model, frozen or reference, batch)}
        state = init_state(table, optax.sgd(1.0), mesh, params=params)
        return run_step(compiled(mesh, parts, aggregation), state, None, batch)

    return run


def close(found, expected, before, relative=1e-5) -> None:
    """Equal up to a share of the largest change of a parameter."""
    assert change(found, expected) <= relative * change(before, expected)


def change(before, after) -> float:
    moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), before, after)
    return max(jax.tree.leaves(moved))


@pytest.mark.parametrize(("aggregation", "splits"), [("sequence", (2, 4)), ("token", (4,))])
def test_parts_of_unequal_token_counts_give_the_gradient_of_the_whole(
    aggregation, splits, params, rollouts, rl_step
):
    whole, metrics = rl_step(rollouts, aggregation=aggregation)
    assert change(params, whole) > 1e-2
    assert 0 < metrics["clip_fraction"] < 1
    for parts in splits:
        split, same = rl_step(rollouts, parts=parts, aggregation=aggregation)
        close(split, whole, params)
        assert same == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_supervised_parts_too(model, params, table, batch, one_device):
    loss_fn = language_model_loss(model)
    whole, metrics = stepped(loss_fn, table, one_device, params, None, batch)
    split, same = stepped(loss_fn, table, one_device, params, None, batch, micro_batches=4)
    assert change(params, whole) > 1e-2
    close(split, whole, params)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_part_without_rollouts_adds_nothing(params, rollouts, rl_step):
    empty = rollouts | {"mask": rollouts["mask"] * (np.arange(ROWS) < 4)[:, None, None]}
    expected, metrics = rl_step(empty)
    found, same = rl_step(empty, parts=2)
    close(found, expected, params)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert change(rl_step(rollouts)[0], found) > 1e-3


def test_the_skipped_branch_really_is_skipped(model, params, rollouts):
    """It is zero even where the computation would give NaN."""
    loss_fn = rollout_loss(model)
    poisoned = rollouts | {"reference": rollouts["old"] * np.nan}

    @jax.jit
    def gradient(mask):
        data = {name: jnp.asarray(value) for name, value in poisoned.items()} | {"mask": mask}

        def compute(batch):
            return jax.value_and_grad(
                lambda p: ((found := loss_fn(p, None, batch)).total, found), has_aux=True
            )(params)

        (total, loss), grads = by_length(compute, zeros_of(compute, data), data)
        return total, loss, grads

    total, loss, grads = gradient(jnp.zeros_like(rollouts["mask"]))
    for leaf in jax.tree.leaves((total, loss, grads)):
        assert not np.asarray(leaf).any()
    assert np.isnan(float(gradient(jnp.asarray(rollouts["mask"]))[0]))


def test_the_gradient_is_traced_once_for_each_length_and_for_the_zeros(
    model, params, rollouts, one_device
):
    traced = []

    def loss_fn(p, frozen, batch):
        traced.append(batch["mask"].shape)
        return rollout_loss(model, "sequence")(p, frozen, batch)

    table, mesh = param_table(model), one_device
    step = make_train_step(loss_fn, optax.sgd(1.0), table, mesh, micro_batches=2, cut=by_length)
    batch = rollouts | {"reference": np.zeros_like(rollouts["mask"])}
    run_step(step, init_state(table, optax.sgd(1.0), mesh, params=params), None, batch)
    assert len(traced) == 3


def test_a_step_without_any_rollout_changes_nothing(params, rollouts, rl_step):
    found, metrics = rl_step(rollouts | {"mask": np.zeros_like(rollouts["mask"])})
    assert change(params, found) == 0.0
    assert metrics["grad_norm"] == 0.0


def test_the_reference_is_frozen_and_matters(params, rollouts, rl_step):
    near, at_itself = rl_step(rollouts, params)
    far, apart = rl_step(rollouts)
    assert change(near, far) > 1e-3
    assert at_itself["kl"] == pytest.approx(0.0, abs=1e-6) and apart["kl"] > 0.01


def test_logprob_gap_is_the_mean_distance_of_old_and_new(model, params, rollouts, rl_step):
    logprobs, _ = group_logprobs(params, model, rollouts, temperature=0.8, remat="none", chunk=999)
    old, mask = np.asarray(logprobs), rollouts["mask"]
    _, metrics = rl_step(rollouts | {"old": old * mask + 5.0 * (1 - mask)})
    assert metrics["logprob_gap"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0.0
    _, metrics = rl_step(rollouts | {"old": old + 0.25})
    assert metrics["logprob_gap"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_four_devices_take_the_same_step_as_one(shape, params, rollouts, rl_step, mesh_of):
    alone, metrics = rl_step(rollouts)
    found, same = rl_step(rollouts, parts=2, mesh=mesh_of(*shape))
    close(found, alone, params)
    assert same == pytest.approx(metrics, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_muon_on_four_devices(model, params, table, batch, one_device, mesh_of):
    optimizer = make_optimizer(OptimizerConfig(name="muon", learning_rate=1e-2), 10, table)
    loss_fn = language_model_loss(model)
    alone, _ = stepped(loss_fn, table, one_device, params, None, batch, optimizer=optimizer)
    found, _ = stepped(loss_fn, table, mesh_of(1, 2, 2), params, None, batch, optimizer=optimizer)
    # Newton-Schulz iterations magnify rounding.
    close(found, alone, params, 1e-3)


def test_a_scalar_head_on_four_devices(model, make_params, batch, one_device, mesh_of):
    table = param_table(model, num_labels=1)
    weights = make_params(model, 3, num_labels=1)

    def loss_fn(params, frozen, batch):
        del frozen
        scores = row_scores(params, model, batch["tokens"], batch["lengths"])
        return bce_loss(scores, batch["labels"], batch["mask"][:, 0])

    alone, _ = stepped(loss_fn, table, one_device, weights, None, batch)
    found, _ = stepped(loss_fn, table, mesh_of(2, 2, 1), weights, None, batch, micro_batches=2)
    close(found, alone, weights)


def test_remat_changes_nothing(model, params, table, batch, one_device):
    def loss_fn(remat):
        def run(params, frozen, batch):
            del frozen
            logprobs, _ = completion_logprobs(
                params, model, batch, temperature=1.0, remat=remat, chunk=7
            )
            return sft_loss(logprobs, batch["mask"])

        return run

    plain, _ = stepped(language_model_loss(model), table, one_device, params, None, batch)
    for remat in ("block", "block_save_attention", "offload"):
        found, _ = stepped(loss_fn(remat), table, one_device, params, None, batch)
        close(found, plain, params)


def test_given_parameters_are_copied_since_the_state_is_donated(
    model, params, table, batch, one_device
):
    before = jax.device_get(params)
    stepped(language_model_loss(model), table, one_device, params, None, batch)
    assert change(params, before) == 0.0


def test_errors(model, params, table, batch, one_device, mesh_of):
    with pytest.raises(ValueError, match="8 rows, which do not divide into 3 micro-batches"):
        stepped(language_model_loss(model), table, one_device, params, None, batch, micro_batches=3)
    odd = {name: value[:3] for name, value in batch.items()}
    with pytest.raises(ValueError, match="has 3 rows, which do not divide into 1 micro-batches"):
        stepped(language_model_loss(model), table, mesh_of(2, 2, 1), params, None, odd)
    with pytest.raises(ValueError, match="init_state needs a key or params"):
        init_state(table, optax.sgd(1.0), one_device)


def test_a_fresh_state_is_the_same_on_every_mesh(table, one_device, mesh_of):
    key = jax.random.key(3)
    alone = init_state(table, optax.sgd(1.0), one_device, key=key)
    split = init_state(table, optax.sgd(1.0), mesh_of(1, 2, 2), key=key)
    assert change(alone.params, jax.device_get(split.params)) == 0.0
