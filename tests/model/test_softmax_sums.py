"""A softmax in parts: weights and their peaks, and parts that add up to the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.softmax_sums import (
    LOWEST,
    MAX_SOFTCAP,
    Sums,
    normalise,
    power_of_two,
    soft_weights,
    together,
)

MASK = np.asarray([[True] * 5, [True, False] * 2 + [True], [False] * 5])


def test_with_a_softcap_weights_are_the_softmax_without_its_norm():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)) * 200, jnp.float32)
    weights, peak = soft_weights(raw, jnp.asarray(MASK), softcap=50.0, dtype=jnp.float32)
    expected = np.exp(50 * np.tanh(np.asarray(raw, np.float64) / 50)) * MASK
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert peak is None


def test_a_softcap_that_could_overflow_is_refused():
    """Sums over 128k keys of the largest scores are finite at the bound, values of 100 included."""
    with pytest.raises(ValueError, match=rf"attn_softcap=100.0 is above {MAX_SOFTCAP}"):
        soft_weights(jnp.ones(3), None, softcap=100.0, dtype=jnp.float32)
    highest = jnp.full(128 * 1024, 1e6)
    weights, _ = soft_weights(highest, None, softcap=MAX_SOFTCAP, dtype=jnp.float32)
    assert jnp.isfinite(jnp.sum(weights)) and jnp.isfinite(jnp.sum(100.0 * weights))


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 1e4])
def test_without_a_softcap_weights_are_in_units_of_their_peak(size):
    """Precisely: the error does not grow with the scores. A masked key does not set the peak."""
    raw = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * np.float32(size)
    raw = np.where(MASK, raw, 10 * size)
    weights, peak = soft_weights(
        jnp.asarray(raw), jnp.asarray(MASK), softcap=None, dtype=jnp.float32
    )
    assert peak is not None and peak.dtype == jnp.int32
    exact = np.where(MASK, raw.astype(np.float64), -np.inf)[:2]
    top = np.ceil(np.max(exact, axis=1) * np.log2(np.e))
    assert peak.tolist() == [*top.astype(int).tolist(), LOWEST]
    expected = np.exp(exact - top[:, None] * np.log(2))
    np.testing.assert_allclose(weights[:2], expected, rtol=4e-7, atol=1e-37)
    assert (weights[:2].max(axis=1) >= 0.499).all() and not weights[2].any()


def test_scores_of_any_size_give_finite_weights_and_gradients():
    """Also where a masked score is far above the visible ones."""

    def total(raw, visible):
        weights, _ = soft_weights(raw, raw <= visible, softcap=None, dtype=jnp.float32)
        return jnp.sum(weights)

    everything = [1e30, -1e30, 3e38, 5.0, -2e7, 1e8]
    # 2^128, by which the masked weight of the third row would be larger, is infinite.
    rows = ((everything, 3e38), ([1e4, 2.0, 1.0, 3e5], 9.0), ([128.5 * np.log(2), 0.5], 9.0))
    for raw, visible in rows:
        raw = jnp.asarray(raw)
        value, gradient = jax.value_and_grad(total)(raw, visible)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert not gradient[raw > visible].any()


def test_powers_of_two_are_exact():
    exponents = np.arange(-126, 1)
    assert power_of_two(jnp.asarray(exponents)).tolist() == np.ldexp(1.0, exponents).tolist()
    assert power_of_two(jnp.asarray([-127, -1000, LOWEST, LOWEST - 2**24])).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1.0, 20.0, 300.0])
def test_weights_do_not_depend_on_how_keys_are_split(size, dtype):
    """To the bit, after they are brought to one peak; in separate programs."""
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)) * size, jnp.float32)
    run = jax.jit(lambda raw: soft_weights(raw, None, softcap=None, dtype=dtype))
    whole, peak = run(raw)
    for part, columns in ((raw[:, :7], slice(7)), (raw[:, 7:], slice(7, None))):
        weights, own = run(part)
        assert (own <= peak).all() and (own < peak).any()
        scaled = weights.astype(jnp.float32) * power_of_two(own - peak)[:, None]
        np.testing.assert_array_equal(scaled, whole[:, columns].astype(jnp.float32))


def split_attention(raw, values, mask, cuts):
    """Attention [rows, h] of raw scores [rows, keys], over the sets of keys between the cuts."""
    parts = []
    for begin, end in zip((0, *cuts), (*cuts, raw.shape[1]), strict=True):
        weights, peak = soft_weights(
            raw[:, begin:end], mask[:, begin:end], softcap=None, dtype=jnp.float32
        )
        parts.append(Sums(weights @ values[begin:end], weights.sum(-1), peak))
    return normalise(together(*parts), jnp.float32)


def test_parts_whose_peaks_lie_far_apart_add_up(rng):
    """Row 0: the first part is negligible, its factor is 0. Row 1: the last. Row 2: they are near.
    Row 3 sees no key of the second part. Row 4 sees none at all."""
    raw = rng.normal(size=(5, 12)).astype(np.float32)
    raw[0, :4] -= 3000
    raw[1, 8:] -= 200
    raw[2, 4:8] += 20
    mask = np.ones((5, 12), bool)
    mask[3, 4:8] = mask[4] = False
    values, weight = rng.normal(size=(12, 3)), rng.normal(size=(5, 3)) + 1
    exact = np.where(mask, raw.astype(np.float64), -np.inf)[:4]
    softmax = np.exp(exact - exact.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    out = softmax @ values
    slope = softmax * ((weight[:4, None] * (values - out[:, None])).sum(-1))

    def total(raw):
        out = split_attention(raw, jnp.asarray(values, jnp.float32), mask, (4, 8))
        return jnp.sum(out * weight), out

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(raw))
    np.testing.assert_allclose(found[:4], out, atol=2e-6)
    np.testing.assert_allclose(gradient[:4], slope, atol=1e-5)
    assert not found[4].any() and not gradient[4].any()
