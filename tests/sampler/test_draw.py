"""Drawing a token: temperature, filters, greedy; against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from grm_jax.sampler.draw import Settings, draw, draw_each, keep_top, pick
from grm_jax.sampler.options import Filters, SamplingConfig


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def allowed(z: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> set[int]:
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
    return {token for token in kept if np.exp(z[token] - z.max()) >= min_p}


def weights(z: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(np.exp(z - z.max(-1, keepdims=True)))


@given(
    st.integers(0, 10**6),
    st.integers(0, 13),
    st.sampled_from([0.05, 0.3, 0.61, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.2, 0.9]),
)
def test_filters_keep_exactly_the_allowed_tokens(seed, top_k, top_p, min_p):
    z = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    given = weights(z)
    kept = np.asarray(keep_top(given, Filters(False, top_k, top_p, min_p)))
    assert set(np.flatnonzero(kept)) == allowed(z, top_k, top_p, min_p)
    assert np.array_equal(kept[kept > 0], np.asarray(given)[kept > 0])


def test_words_that_tie_with_the_last_one_kept_are_kept():
    kept = np.asarray(keep_top(jnp.asarray([0.5, 1.0, 0.5, 0.1]), Filters(False, 2, 1.0, 0.0)))
    assert kept.tolist() == [0.5, 1.0, 0.5, 0.0]


def test_filters_work_row_by_row():
    z = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    kept = np.asarray(keep_top(weights(z), Filters(False, 5, 0.8, 0.0)))
    for row, found in zip(z.reshape(-1, 12), kept.reshape(-1, 12), strict=True):
        assert set(np.flatnonzero(found)) == allowed(row, 5, 0.8)


@given(
    # Few sizes, since each is compiled: below, at and above powers of two, one word, no square.
    st.sampled_from([1, 2, 3, 7, 16, 17, 100, 255, 256, 257, 300]),
    st.integers(0, 10**6),
)
def test_pick_is_the_inverse_of_two_cumulative_distributions(size, seed):
    """Of blocks of words, then of a block's words; a word of weight 0 is never picked."""
    rng = np.random.default_rng(seed)
    w = rng.random(size) * (rng.random(size) < 0.3)
    w[rng.integers(size)] = 0.5
    edges = [[a, b] for a in (0.0, 1 - 2**-24) for b in (0.0, 1 - 2**-24)]
    uniform = np.concatenate([rng.random((20, 2)), edges]).astype(np.float32)
    rows = jnp.broadcast_to(jnp.asarray(w, jnp.float32), (len(uniform), size))
    found = np.asarray(pick(rows, jnp.asarray(uniform)))
    assert (w[found] > 0).all()
    block = 2 ** int(np.ceil(np.log2(max(2, np.sqrt(size)))))
    blocks = np.pad(w, (0, -size % block)).reshape(-1, block)
    index, word = np.divmod(found, block)
    for weights, chosen, u in (
        (np.tile(blocks.sum(1), (len(found), 1)), index, uniform[:, 0]),
        (blocks[index], word, uniform[:, 1]),
    ):
        cumulative = np.cumsum(weights, axis=1)
        own, after = (
            np.take_along_axis(x, chosen[:, None], 1)[:, 0] for x in (weights, cumulative)
        )
        place = u * cumulative[:, -1]
        assert (after - own - 1e-4 <= place).all()
        assert (place <= after + 1e-4).all()


def drawn(z: np.ndarray, temperature: float, filters: Filters, count: int):
    """`count` tokens of one distribution and their log-probabilities."""
    uniform = jax.random.uniform(jax.random.key(0), (count, 1, 2))
    rows = jnp.broadcast_to(jnp.asarray(z), (count, 1, len(z)))
    tokens, logprobs = draw(rows, uniform, jnp.float32(temperature), filters)
    return np.asarray(tokens)[:, 0], np.asarray(logprobs)[:, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 4, 0.8)]
)
def test_frequencies_are_those_of_the_filtered_distribution(temperature, top_k, top_p):
    z = np.asarray([1.5, -0.5, 0.3, 2.0, -1.0, 0.9], np.float32)
    tokens, logprobs = drawn(z, temperature, Filters(False, top_k, top_p, 0.0), 20_000)
    kept = allowed(z / temperature, top_k, top_p)
    p = softmax((z / temperature).astype(np.float64))
    expected = np.asarray([share if t in kept else 0.0 for t, share in enumerate(p)])
    expected /= expected.sum()
    frequency = np.bincount(tokens, minlength=6) / len(tokens)
    assert np.abs(frequency - expected).max() < 4 * np.sqrt(0.25 / len(tokens))
    assert (frequency[expected == 0] == 0).all()
    # The log-probability stays that of the unfiltered distribution.
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)


def test_a_vocabulary_of_256k():
    """Sums of many small weights stay right: the two halves of the vocabulary come out even."""
    z = np.random.default_rng(0).normal(size=256_000).astype(np.float32)
    tokens, logprobs = drawn(z, 1.0, Filters(False, 0, 1.0, 0.0), 400)
    p = softmax(z.astype(np.float64))
    assert abs((tokens < 128_000).mean() - p[:128_000].sum()) < 0.1
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-4)


WIDE = (np.random.default_rng(0).normal(size=256_000) * 2.5).astype(np.float32)
"""Logits with an entropy of 9.3 nats, as of a model that hesitates."""


def picked(z: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Words of one distribution [V] for uniforms [count, 2]."""
    many = jax.jit(lambda w, u: jax.lax.map(lambda one: pick(w, one), u, batch_size=1000))
    return np.asarray(many(weights(z), jnp.asarray(uniform, jnp.float32)))


def test_rare_words_of_256k_can_be_drawn():
    """Those that lie between two of the 2^23 places of a single uniform: a third of the words."""
    p = softmax(WIDE.astype(np.float64))
    after = np.cumsum(p)
    between = np.flatnonzero(np.ceil((after - p) * 2**23) >= after * 2**23)
    assert len(between) > 70_000
    blocks = p.reshape(-1, 512)
    centre = np.cumsum(blocks, axis=1) - blocks / 2
    second = (centre / blocks.sum(1, keepdims=True)).reshape(-1)
    first = np.repeat(np.cumsum(blocks.sum(1)) - blocks.sum(1) / 2, 512)
    places = np.round(np.stack([first, second], 1) * 2**23) / 2**23
    # In a twentieth of them, less than 2^-21 of their block, rounding decides.
    reachable = between[(blocks / blocks.sum(1, keepdims=True)).reshape(-1)[between] > 2**-21]
    assert len(reachable) > 0.9 * len(between)
    chosen = np.random.default_rng(1).choice(reachable, 3000, replace=False)
    assert np.array_equal(picked(WIDE, places[chosen]), chosen)


def test_draws_of_256k_have_the_softmax_distribution():
    """Chi-square over words grouped by place and by probability."""
    p = softmax(WIDE.astype(np.float64))
    tokens = picked(WIDE, jax.random.uniform(jax.random.key(1), (50_000, 2)))
    order = np.argsort(p)
    share = np.empty(len(p), int)
    share[order] = (np.cumsum(p[order]) * 200).astype(int)  # about 0.5% of the mass each
    for group in (np.arange(len(p)) // 512, np.arange(len(p)) % 512, share):
        expected = np.bincount(group, weights=p) * len(tokens)
        seen = np.bincount(group[tokens], minlength=len(expected))
        kept = expected > 0
        statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
        assert 0.001 < chi2.sf(statistic, kept.sum() - 1) < 0.999


def test_greedy_takes_the_largest_whatever_the_key():
    z = np.asarray([1.5, -0.5, 0.3, 2.0, -1.0, 0.9], np.float32)
    tokens, logprobs = drawn(z, 1.0, SamplingConfig(temperature=0).filters, 50)
    assert (tokens == 3).all()
    np.testing.assert_allclose(logprobs, np.log(softmax(z))[3], atol=1e-6)


ROWS = [
    SamplingConfig(),
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.3),
    SamplingConfig(top_k=3),
    SamplingConfig(temperature=2.0, top_p=0.6),
    SamplingConfig(min_p=0.2),
    SamplingConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05),
    SamplingConfig(temperature=0, top_k=1),
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3]], ids=["some filtered", "none filtered"])
def test_distributions_may_differ_in_their_settings(rows):
    """Each gets the token and the log-probability that it gets by itself."""
    z = np.random.default_rng(0).normal(size=(200, len(rows), 50)).astype(np.float32) * 3
    uniform = np.random.default_rng(1).random((200, len(rows), 2), np.float32)
    names = ("temperature", "top_k", "top_p", "min_p")
    settings = Settings(**{n: jnp.asarray([getattr(row, n) for row in rows]) for n in names})
    tokens, logprobs = draw_each(jnp.asarray(z), jnp.asarray(uniform), settings)
    for n, row in enumerate(rows):
        alone = jnp.asarray(z[:, n]), jnp.asarray(uniform[:, n]), jnp.float32(row.temperature)
        expected, logprob = draw(*alone, row.filters)
        assert np.array_equal(tokens[:, n], expected)
        np.testing.assert_allclose(logprobs[:, n], logprob, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is negative"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 is not in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p=1.0 is not in \[0, 1\)"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
