"""Completions beside one prompt are rows of their own: values, gradients, padding, windows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate, collate_groups
from grm_jax.model.batch import completion_logprobs, group_logprobs

# Prompts shorter and longer than the window of 6, completions likewise; padding in both.
PROMPTS = (2, 5, 9, 12)
COMPLETIONS = ((1, 9, 4), (10, 2, 3), (7, 7, 7), (1, 1, 10))


@pytest.fixture(scope="module")
def both():
    """The same rollouts as groups and as rows."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(4, 40, n).tolist()) for n in PROMPTS]
    groups = [[tuple(rng.integers(4, 40, n).tolist()) for n in g] for g in COMPLETIONS]
    rows = [Example(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    return (
        collate_groups(prompts, groups, length=13, completion=11),
        collate(rows, length=24, completion=11),
    )


def gradient(logprobs, config, batch, **settings):
    def total(params):
        found, _ = logprobs(params, config, batch, temperature=0.7, chunk=999, **settings)
        # Unequal weights, so that no two tokens can change places.
        weights = jnp.cos(jnp.arange(found.size)).reshape(found.shape) * batch["mask"]
        return jnp.sum(found * weights), found

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def compare(config, params, both, atol, **settings):
    groups, rows = both
    (_, expected), right = gradient(completion_logprobs, config, rows, remat="none")(params)
    (_, found), grads = gradient(group_logprobs, config, groups, **settings)(params)
    assert found.shape == (4, 3, 11)
    mask = groups["mask"] > 0
    np.testing.assert_allclose(found[mask], expected.reshape(found.shape)[mask], atol=atol)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_equals_separate_rows(remat, small, small_params, both):
    compare(small, small_params, both, 2e-5, remat=remat)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_without_a_softcap(backend, small, small_params, both):
    """With scores beyond 20: the peaks over the prompt and over the completion differ."""
    config = small.replace(attn_softcap=None, query_pre_attn_scalar=1.0, attention=backend)
    compare(config, small_params, both, 2e-4, remat="block")


def test_one_completion_and_many_heads(small, make_params, both):
    config = small.replace(num_kv_heads=4, sliding_window=3)
    compare(config, make_params(config, 1), both, 2e-5, remat="none")


def test_padding_is_never_read(small, small_params, both):
    groups, _ = both
    changed = dict(groups)
    prompt_slot = np.arange(13) >= groups["lengths"][:, None]
    changed["prompts"] = np.where(prompt_slot, 7, groups["prompts"])
    changed["targets"] = np.where(groups["mask"] > 0, groups["targets"], 9)
    run = gradient(group_logprobs, small, groups, remat="none")
    again = gradient(group_logprobs, small, changed, remat="none")
    mask = groups["mask"] > 0
    np.testing.assert_array_equal(
        np.asarray(run(small_params)[0][1])[mask], np.asarray(again(small_params)[0][1])[mask]
    )


def test_completions_do_not_see_each_other(small, small_params, both):
    groups, _ = both
    changed = groups | {"targets": groups["targets"].copy()}
    changed["targets"][:, 0] = 11
    settings = dict(temperature=1.0, remat="none", chunk=999)
    before, _ = group_logprobs(small_params, small, groups, **settings)
    after, _ = group_logprobs(small_params, small, changed, **settings)
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert np.abs(np.asarray(before[:, 0, 1:] - after[:, 0, 1:])).max() > 0.1
