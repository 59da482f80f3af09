"""Masks as functions of positions, and rows that see nothing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.attention import attention, visible


def test_window_counts_the_token_itself():
    positions = jnp.arange(6)[None]
    mask = np.asarray(visible(positions, positions, window=3))[0]
    assert [np.flatnonzero(row).tolist() for row in mask] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5],
    ]  # fmt: skip
    everything = np.asarray(visible(positions, positions, window=None))[0]
    assert (everything == np.tril(np.ones((6, 6), bool))).all()


def test_mask_reads_positions_not_slots():
    """Keys in any order of slots, queries that start late, padding and segments."""
    keys = jnp.array([[4, 0, 2, 1, 3]])
    mask = np.asarray(visible(jnp.array([[3]]), keys, window=3))[0, 0]
    assert np.asarray(keys)[0][mask].tolist() == [2, 1, 3]
    valid = jnp.array([[True, True, True, True, False]])
    mask = np.asarray(visible(jnp.array([[3]]), keys, window=3, key_valid=valid))[0, 0]
    assert np.asarray(keys)[0][mask].tolist() == [2, 1]
    segments = jnp.array([[0, 0, 1, 0, 0]])
    mask = np.asarray(
        visible(
            jnp.array([[3]]),
            keys,
            window=3,
            query_segment=jnp.array([[0]]),
            key_segment=segments,
        )
    )[0, 0]
    assert np.asarray(keys)[0][mask].tolist() == [1, 3]


@pytest.mark.parametrize("softcap", [5.0, None])
def test_a_row_that_sees_nothing_is_finite(softcap):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 2, 1, 2, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 3, 1, 4)).astype(np.float32)
    mask = jnp.array([[[False] * 3, [True, False, False]]])
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    out = np.asarray(attention(q, k, v, mask, softcap=softcap))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0, 1, 0], np.stack([v[0, 0, 0]] * 2), rtol=1e-6)
