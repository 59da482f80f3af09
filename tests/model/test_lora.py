"""Adapters: nothing at the start, the merged model's outputs, gradients to them alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.heads import logits
from grm_jax.model.linear import linear
from grm_jax.model.lora import adapter_table, attach, merge
from grm_jax.model.options import LoRAConfig
from grm_jax.model.params import (
    build_tree,
    count_params,
    get_leaf,
    init_params,
    param_table,
)
from grm_jax.model.transformer import encode, forward, self_attend
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.weights import decode_weights

LORA = LoRAConfig(rank=3, alpha=6.0)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def adapters(small):
    """Random in both factors, so that they change something."""
    table = adapter_table(param_table(small, num_labels=1), LORA)
    fresh = init_params(table, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), fresh)


def hidden(config, params):
    tokens = jnp.arange(24).reshape(2, 12) % config.vocab_size
    return encode(params, config, tokens, jnp.array([12, 7]))


def test_fresh_adapters_change_nothing(small, small_params):
    table = param_table(small)
    fresh = init_params(adapter_table(table, LORA), jax.random.key(0))
    found = hidden(small, attach(small_params, fresh, table, LORA.scale))
    np.testing.assert_array_equal(found, hidden(small, small_params))


def test_attached_is_merged(small, make_params, adapters):
    base, table = make_params(small, 0, num_labels=1), param_table(small, num_labels=1)
    attached = attach(base, adapters, table, LORA.scale)
    merged = merge(attached, KEY)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    found = hidden(small, attached)
    np.testing.assert_allclose(found, hidden(small, merged), atol=2e-4)
    assert np.abs(found - hidden(small, base)).max() > 0.1
    # Against the formula, for a matrix with two output and one with two input dimensions.
    for name, form in (("q", "dr,rhe->dhe"), ("o", "her,rd->hed")):
        w, factors = base["blocks"]["local"][name], adapters["blocks"]["local"][name]
        change = np.einsum("n" + form.replace(",", ",n").replace("->", "->n"), *factors.values())
        np.testing.assert_allclose(merged["blocks"]["local"][name], w + 2.0 * change, atol=1e-5)
    np.testing.assert_array_equal(merged["score"], adapters["score"])


def test_gradients_reach_the_adapters_and_not_what_they_change(small, make_params, adapters):
    base, table = make_params(small, 0, num_labels=1), param_table(small, num_labels=1)

    def total(base, adapters):
        params = attach(base, adapters, table, LORA.scale)
        return jnp.sum(hidden(small, params)) + jnp.sum(params["score"])

    frozen, trained = jax.grad(total, argnums=(0, 1))(base, adapters)
    assert not any(np.asarray(frozen["blocks"][kind]["q"]).any() for kind in ("local", "global"))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(trained))


def test_the_table_is_derived(small):
    table = param_table(small, num_labels=1)
    found = adapter_table(table, LoRAConfig(rank=2, targets=("q", "down")))
    by_path = {spec.path: spec for spec in found}
    n, d, f = small.num_blocks, small.embed_dim, small.hidden_dim
    assert by_path["blocks", "local", "down", "a"].shape == (n, f, 2)
    assert by_path["blocks", "local", "down", "b"].shape == (n, 2, d)
    assert by_path["blocks", "global", "q", "a"].axes == ("layers", "embed", None)
    assert by_path["blocks", "global", "q", "b"].axes == ("layers", None, "heads", "head")
    assert ("score",) in by_path and len(found) == 9
    each = 2 * (d + 4 * 8) + 2 * (f + d)
    assert count_params(found) == 2 * n * each + d


@pytest.mark.parametrize(("rows", "int8"), [(4, False), (1000, False), (4, True)])
def test_decoding_applies_the_adapters(rows, int8, small, small_params, one_device, adapters):
    """Beside weights of any form, which are those of the base."""
    table = param_table(small)
    attached = attach(small_params, adapters, table, LORA.scale)
    programs = Programs(one_device)
    found = decode_weights(programs, small, attached, rows, int8=int8)["blocks"]
    base = decode_weights(programs, small, small_params, rows, int8=int8)["blocks"]
    merged = merge(attached, KEY)["blocks"]
    for name, inputs in (("q", 1), ("o", 2), ("down", 1)):
        w, plain = merged["local"][name][1], base[1]["local"][name]
        x = jax.random.normal(KEY, (3, *w.shape[:inputs]))
        got = linear(x, found[1]["local"][name], inputs)
        change = jnp.tensordot(x, w - small_params["blocks"]["local"][name][1], inputs)
        np.testing.assert_allclose(got, linear(x, plain, inputs) + change, atol=1e-3)


SMALL_CHANGE = 1e-3  # of a weight; half a bfloat16 step is 2e-3 to 4e-3


def slightly_changed(small, small_params):
    """(base in bfloat16, adapters that add 0.1% to every matrix: of full rank)."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params)
    table = param_table(small)
    rank = LoRAConfig(rank=small.hidden_dim, alpha=small.hidden_dim)

    def factors(spec) -> jax.Array:
        w = get_leaf(base, spec.path[:-1]).astype(jnp.float32)
        split = {"o": 3}.get(spec.path[2], 2)  # after the layers and the inputs
        n, inputs = w.shape[0], int(np.prod(w.shape[1:split]))
        pad = small.hidden_dim - inputs
        if spec.path[-1] == "a":  # [I 0]
            eye = jnp.broadcast_to(jnp.eye(inputs, small.hidden_dim), (n, inputs, inputs + pad))
            return eye.reshape(*w.shape[:split], -1)
        flat = SMALL_CHANGE * w.reshape(n, inputs, -1)
        return jnp.pad(flat, ((0, 0), (0, pad), (0, 0))).reshape(n, -1, *w.shape[split:])

    return base, attach(base, build_tree(adapter_table(table, rank), factors), table, rank.scale)


@pytest.mark.parametrize("rows", [4, 1000, None])
def test_small_changes_reach_the_products(rows, small, small_params, one_device):
    """In bfloat16 every output is rounded, and on average has its 0.1%: trained, and decoded from
    a matrix of either form."""
    base, changed = (x["blocks"] for x in slightly_changed(small, small_params))
    if rows is not None:
        config = small.replace(compute_dtype="bfloat16")
        programs = Programs(one_device)
        base, changed = (
            decode_weights(programs, config, x, rows)["blocks"]
            for x in slightly_changed(small, small_params)
        )
    for name, shape in (("q", (32,)), ("o", (4, 8)), ("down", (48,))):
        x = jax.random.normal(KEY, (200, *shape), jnp.bfloat16)
        y, moved = (
            np.asarray(linear(x, matrix_of(w, name), len(shape)), np.float64)
            for w in (base, changed)
        )
        change = np.sum((moved - y) * y) / np.sum(y * y)
        assert change == pytest.approx(SMALL_CHANGE, rel=0.2), name


def matrix_of(blocks, name: str):
    """A matrix of the first block, trained (stacked over blocks) or decoded (a tree a block)."""
    if isinstance(blocks, tuple):
        return blocks[0]["local"][name]
    return jax.tree.map(lambda x: x[0], blocks["local"][name])


def test_small_changes_reach_the_rollout(small, small_params, one_device):
    """A rollout with changes of 0.1% has the trainer's log-probabilities, not the base's."""
    base, changed = slightly_changed(small, small_params)
    config = small.replace(compute_dtype="bfloat16")
    tokens = jnp.arange(96).reshape(8, 12) % small.vocab_size
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)

    @functools.partial(jax.jit, static_argnums=1)
    def logprobs(params, decoding: bool = False) -> jax.Array:
        layer_inputs: Any = [dict.fromkeys(config.slots)] * config.num_blocks if decoding else None
        attend = self_attend(config, positions)
        hidden = forward(params, config, tokens, positions, attend, layer_inputs)[0]
        return jax.nn.log_softmax(logits(params, config, hidden))

    decoding = decode_weights(Programs(one_device), config, changed, 1000)
    rollout, trained = np.asarray(logprobs(decoding, True)), np.asarray(logprobs(changed))
    np.testing.assert_allclose(rollout, trained, atol=1e-5)
    assert np.abs(trained - logprobs(base)).max() > 0.01


@pytest.mark.slow
def test_small_changes_are_written(small, small_params):
    """By random rounding: on average every weight has its 0.1%."""
    base, changed = slightly_changed(small, small_params)
    written = merge(changed, KEY)
    for name in ("q", "down"):
        w, found = (x["blocks"]["local"][name].astype(jnp.float32) for x in (base, written))
        assert written["blocks"]["local"][name].dtype == jnp.bfloat16
        change = float(jnp.sum((found - w) * w) / jnp.sum(w * w))
        assert change == pytest.approx(SMALL_CHANGE, rel=0.2)


@pytest.mark.parametrize("given", [{"rank": -1}, {"targets": ()}, {"targets": ("qkv",)}])
def test_errors(given):
    with pytest.raises(ValueError, match="give rank >= 0 and targets among q, k, v"):
        LoRAConfig(**{"rank": 4} | given)
