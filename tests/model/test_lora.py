"""Adapters: nothing at the start, the merged model's outputs, gradients to them alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.gemma2 import encode
from grm_jax.model.lora import LoRAConfig, adapter_table, attach, merge
from grm_jax.model.params import count_params, init_params, param_table
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.weights import decode_weights

LORA = LoRAConfig(rank=3, alpha=6.0)


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
    merged = merge(attached)
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


def test_decoding_uses_the_merged_weights(small, small_params):
    table = param_table(small)
    keys = iter(jax.random.split(jax.random.key(5), 200))
    some = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape),
        init_params(adapter_table(table, LORA), jax.random.key(0)),
    )
    attached = attach(small_params, some, table, LORA.scale)
    programs = Programs(make_mesh(1, 1, 1, jax.devices()[:1]))
    found = decode_weights(programs, small, attached, 4)
    expected = decode_weights(programs, small, merge(attached), 4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("given", [{"rank": -1}, {"targets": ()}, {"targets": ("qkv",)}])
def test_errors(given):
    with pytest.raises(ValueError, match="give rank >= 0 and targets among q, k, v"):
        LoRAConfig(**{"rank": 4} | given)
