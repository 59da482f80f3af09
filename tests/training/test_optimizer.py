"""Schedules by hand, clipping, moments, and what Muon may touch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grm_jax.model.params import get_leaf, param_table
from grm_jax.model.storage import param_shardings
from grm_jax.training.optimizer import make_optimizer, schedule
from grm_jax.training.options import OptimizerConfig
from grm_jax.training.step import init_state, state_shardings


@pytest.fixture(scope="module")
def table(small):
    return param_table(small.replace(num_layers=2), num_labels=1)


@pytest.fixture(scope="module")
def params(small, make_params):
    return make_params(small.replace(num_layers=2), 0, num_labels=1)


def rates(steps: int, **options) -> list[float]:
    at = schedule(OptimizerConfig(learning_rate=1.0, **options), steps)
    return [float(at(step)) for step in range(steps + 1)]


def test_schedules_by_hand():
    assert rates(4) == [1.0] * 5
    assert rates(6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])
    linear = rates(4, schedule="linear", final_fraction=0.2)
    assert linear == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = rates(6, schedule="cosine", warmup_steps=2, final_fraction=0.1)
    half = [0.1 + 0.9 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)]
    assert cosine == pytest.approx([1 / 3, 2 / 3, *half])


def test_a_warmup_longer_than_the_run_is_a_warmup():
    assert rates(3, schedule="cosine", warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("warmup", [0, 1, 37, 400])
@pytest.mark.parametrize("shape", ["constant", "cosine", "linear"])
def test_schedules_are_their_formula(shape, warmup):
    """At every step, and beyond the last; a warm-up may be longer than the run."""
    peak, steps, final = 3e-5, 300, 0.05
    config = OptimizerConfig(
        learning_rate=peak, schedule=shape, warmup_steps=warmup, final_fraction=final
    )
    step = np.arange(500)
    gone = np.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    fraction = {
        "constant": np.ones(500),
        "cosine": final + (1 - final) * (1 + np.cos(np.pi * gone)) / 2,
        "linear": 1 - (1 - final) * gone,
    }[shape]
    expected = peak * np.where(step < warmup, (step + 1) / (warmup + 1), fraction)
    found = jax.vmap(schedule(config, steps))(jnp.arange(500))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * peak)


def update(params, table, grads, **options):
    optimizer = make_optimizer(OptimizerConfig(**options), 10, table)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)


def norm(tree) -> float:
    return float(optax.tree.norm(tree))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_are_float32_whatever_the_gradients(name, params, table):
    half = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), params)
    updates, state = update(params, table, half, name=name)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(updates))


def test_updates_go_downhill(params, table):
    grads = jax.tree.map(lambda x: jnp.cos(7 * x), params)
    for name in ("adamw", "muon", "adafactor"):
        updates, _ = update(params, table, grads, name=name)
        slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, updates)))
        assert float(slope) < 0, name


def test_the_global_norm_is_clipped(params, table):
    """Seen in Adam's first moment, (1 - b1) times the clipped gradient."""
    grads = jax.tree.map(jnp.ones_like, params)
    size = norm(grads)

    def first_moment(clip_norm: float) -> float:
        _, state = update(params, table, grads, clip_norm=clip_norm, b1=0.9)
        return norm(optax.tree.get(state, "mu")) / 0.1

    assert first_moment(0.5) == pytest.approx(0.5, rel=1e-4)
    assert first_moment(2 * size) == pytest.approx(size, rel=1e-4)
    assert first_moment(0.0) == pytest.approx(size, rel=1e-4), "0 turns it off"


def test_muon_orthogonalises_block_matrices_and_nothing_else(params, table):
    """All singular values of an update are about equal, matrix by matrix and block by block."""
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    options = {"name": "muon", "learning_rate": 1.0, "adam_scale": 0.0, "clip_norm": 0.0}
    updates, _ = update(params, table, grads, **options)
    for spec in table:
        found = np.asarray(get_leaf(updates, spec.path))
        if not (spec.stacked and spec.inputs):
            assert not found.any(), spec.path
            continue
        outputs = [i for i in range(1, len(spec.shape)) if i not in spec.inputs]
        for block in found:
            matrix = block.transpose([i - 1 for i in (*spec.inputs, *outputs)])
            fan_in = int(np.prod([spec.shape[i] for i in spec.inputs]))
            singular = np.linalg.svd(matrix.reshape(fan_in, -1), compute_uv=False)
            # Five Newton-Schulz steps leave them within about 0.7..1.2, but for the very smallest.
            assert singular.max() < 2 * np.quantile(singular, 0.1), spec.path


def test_muon_without_gradient_moves_nothing(params, table):
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(params, table, zero, name="muon", learning_rate=1.0)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))


def test_muons_adam_part_learns_at_its_own_rate(params, table):
    grads = jax.tree.map(jnp.ones_like, params)
    options = {"name": "muon", "learning_rate": 1.0, "clip_norm": 0.0}
    a, _ = update(params, table, grads, adam_scale=0.3, **options)
    b, _ = update(params, table, grads, adam_scale=0.6, **options)
    for name in ("final_norm", "score", "embed"):
        np.testing.assert_allclose(np.asarray(b[name]), 2 * np.asarray(a[name]), rtol=1e-5)
        assert (np.asarray(a[name]) < 0).all()
    np.testing.assert_array_equal(
        np.asarray(a["blocks"]["local"]["q"]), np.asarray(b["blocks"]["local"]["q"])
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_weight_decay_shrinks(name, decayed, params, table):
    """All parameters or the matrices; Muon's part is matrices anyway, and its Adam has no decay."""
    zero = jax.tree.map(jnp.zeros_like, params)
    options = {"name": name, "learning_rate": 0.1, "weight_decay": 0.5, "decayed": decayed}
    updates, _ = update(params, table, zero, **options)
    rate = 0.5 if name == "adafactor" else 0.05
    for spec in table:
        matrix = spec.stacked if name == "muon" else spec.path == ("score",) or spec.stacked
        matrix &= not spec.path[-1].endswith("norm")
        decays = matrix or (decayed == "all" and name != "muon")
        expected = -rate * decays * np.asarray(get_leaf(params, spec.path))
        found = np.asarray(get_leaf(updates, spec.path))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8, err_msg=str(spec.path))


def test_an_unknown_name_lists_the_known(table):
    with pytest.raises(
        ValueError, match="unknown optimizer 'sgd'; choose adamw, muon or adafactor"
    ):
        make_optimizer(OptimizerConfig(name="sgd"), 1, table)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(name, params, table, mesh_of):
    mesh = mesh_of(1, 2, 2)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10, table)
    state = init_state(table, optimizer, mesh, params=params)
    planned = state_shardings(table, optimizer, mesh)
    where = {
        tuple(k.key for k in path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings(table, mesh))
    }
    moments = 0
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    for (path, leaf), plan in zip(leaves, jax.tree.leaves(planned.opt_state), strict=True):
        assert leaf.sharding.is_equivalent_to(plan, leaf.ndim)
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in where), None)
        if owner is None:
            assert leaf.size <= 3 and leaf.sharding.is_fully_replicated  # counts, constants
            continue
        moments += 1
        assert leaf.sharding.is_equivalent_to(where[owner], leaf.ndim), owner
    # Adam keeps two moments of a parameter, Muon one of a matrix.
    matrices = sum(spec.stacked and bool(spec.inputs) for spec in table)
    assert moments == 2 * len(table) - (matrices if name == "muon" else 0)
    embed = state.params["embed"]
    assert embed.addressable_shards[0].data.shape == (embed.shape[0] // 2, embed.shape[1] // 2)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_of_bfloat16_parameters_are_float32(name, table, params):
    """optax would follow the parameters; and the state keeps its dtypes from step to step."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10, table)
    state = optimizer.init(low)
    dtypes = [x.dtype for x in jax.tree.leaves(state)]
    assert jnp.bfloat16 not in dtypes
    updates, state = optimizer.update(low, state, low)
    assert [x.dtype for x in jax.tree.leaves(state)] == dtypes
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))
