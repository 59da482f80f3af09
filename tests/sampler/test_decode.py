"""Drawing a token: temperature, filters, greedy; against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.sampler.draw import SamplingConfig, draw, keep_top


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def allowed(z: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Tokens that may be drawn: the k likeliest; of these the fewest with at least p together."""
    order = np.argsort(-z, kind="stable")
    order = order[: top_k or len(order)]
    mass = softmax(z[order].astype(np.float64))
    kept: list[int] = []
    for token, share in zip(order, mass, strict=True):
        kept.append(int(token))
        top_p -= share
        if top_p <= 0:
            break
    return set(kept)


@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([0.05, 0.3, 0.61, 0.9, 0.999, 1.0]),
)
def test_filters_keep_exactly_the_allowed_tokens(seed, top_k, top_p):
    z = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    kept = np.asarray(keep_top(jnp.asarray(z), top_k, top_p))
    assert set(np.flatnonzero(np.isfinite(kept))) == allowed(z, top_k, top_p)
    assert np.array_equal(kept[np.isfinite(kept)], z[np.isfinite(kept)])


def test_filters_work_row_by_row():
    z = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    kept = np.asarray(keep_top(jnp.asarray(z), 5, 0.8))
    for row, found in zip(z.reshape(-1, 12), kept.reshape(-1, 12), strict=True):
        assert set(np.flatnonzero(np.isfinite(found))) == allowed(row, 5, 0.8)


def drawn(z: np.ndarray, temperature: float, filters, count: int):
    """`count` tokens of one distribution, each with its own key, and their log-probabilities."""
    keys = jax.random.split(jax.random.key(0), (count, 1))
    rows = jnp.broadcast_to(jnp.asarray(z), (count, 1, len(z)))
    zero = jnp.zeros((count, 1), jnp.int32)
    tokens, logprobs = draw(rows, keys, zero, jnp.float32(temperature), filters)
    return np.asarray(tokens)[:, 0], np.asarray(logprobs)[:, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 4, 0.8)]
)
def test_frequencies_are_those_of_the_filtered_distribution(temperature, top_k, top_p):
    z = np.asarray([1.5, -0.5, 0.3, 2.0, -1.0, 0.9], np.float32)
    tokens, logprobs = drawn(z, temperature, (False, top_k, top_p), 20_000)
    kept = allowed(z / temperature, top_k, top_p)
    p = softmax((z / temperature).astype(np.float64))
    expected = np.asarray([share if t in kept else 0.0 for t, share in enumerate(p)])
    expected /= expected.sum()
    frequency = np.bincount(tokens, minlength=6) / len(tokens)
    assert np.abs(frequency - expected).max() < 4 * np.sqrt(0.25 / len(tokens))
    assert (frequency[expected == 0] == 0).all()
    # The log-probability stays that of the unfiltered distribution.
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)


def test_greedy_takes_the_largest_whatever_the_key():
    z = np.asarray([1.5, -0.5, 0.3, 2.0, -1.0, 0.9], np.float32)
    tokens, logprobs = drawn(z, 1.0, SamplingConfig(temperature=0).filters, 50)
    assert (tokens == 3).all()
    np.testing.assert_allclose(logprobs, np.log(softmax(z))[3], atol=1e-6)


def test_each_token_of_a_sample_has_its_own_noise():
    z = jnp.zeros((1, 1, 1000))
    keys = jax.random.split(jax.random.key(0), (1, 1))
    seen = {
        int(draw(z, keys, jnp.full((1, 1), t), jnp.float32(1), (False, 0, 1.0))[0][0, 0])
        for t in range(20)
    }
    assert len(seen) > 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is negative"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 is not in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
