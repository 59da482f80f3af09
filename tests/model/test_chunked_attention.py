"""Attention in blocks equals the reference: values, gradients, every mask; and its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import attention_backends, attention_kernels
from grm_jax.model.attention import SAVED, Places, attention
from grm_jax.model.attention_backends import choose, cross_sums, self_attention
from grm_jax.model.chunked_attention import Static, attention_sums, chunked_attention
from grm_jax.model.softmax_sums import normalise, together

BATCH, LENGTH, KV, GROUP, HEAD = 2, 37, 2, 2, 8
CAP = 20.0


def arrays(rng, keys=LENGTH, dtype=jnp.float32):
    """Queries that make scores up to the cap, keys, values, and weights for a gradient."""
    q = rng.normal(size=(BATCH, LENGTH, KV, GROUP, HEAD)) * 6
    k, v = rng.normal(size=(2, BATCH, keys, KV, HEAD))
    return [jnp.asarray(x, dtype) for x in (q, k, v, rng.normal(size=q.shape))]


def own_places(kind: str) -> Places:
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    if kind == "plain":
        return Places(slots, slots)
    if kind == "padded":
        return Places(slots, slots, key_valid=slots < jnp.array([[LENGTH], [9]]))
    # Packed: segments of unequal lengths whose positions begin at 0; padding at the end.
    starts = jnp.array([[0, 11, 14, 30], [0, 5, 20, 21]])
    segment = jnp.sum(slots[:, :, None] >= starts[:, None], axis=-1) - 1
    position = slots - jnp.take_along_axis(starts, segment, axis=1)
    return Places(position, position, segment, segment, slots < jnp.array([[LENGTH], [33]]))


def value_and_gradients(compute, q, k, v, g, real):
    def total(q, k, v):
        out = compute(q, k, v)
        return jnp.sum(jnp.where(real[:, :, None, None, None], out * g, 0.0)), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return jnp.where(real[:, :, None, None, None], out, 0.0), *grads


@pytest.mark.parametrize(
    ("blocks", "cap"),
    [
        ((8, 8), CAP), ((5, 16), CAP), ((16, 4), CAP), ((64, 64), CAP),
        ((8, 8), None), ((5, 16), None), ((64, 64), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_rows_over_themselves(kind, window, blocks, cap, rng):
    q, k, v, g = arrays(rng)
    places = own_places(kind)
    # Padding queries read what they like; nobody reads them.
    real = places.mask(None).any(-1) if kind == "plain" else places.key_valid
    static = Static(window, cap, own=True, queries=blocks[0], keys=blocks[1])
    mask = places.mask(window)
    want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=cap), q, k, v, g, real
    )
    got = value_and_gradients(
        lambda q, k, v: chunked_attention(q, k, v, places, static), q, k, v, g, real
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize(("cap", "prompts", "owns"), [(CAP, 1, 1), (None, 9, 1), (None, 1, 9)])
def test_sums_over_two_sets_of_keys(cap, prompts, owns, window, rng):
    """A shared prompt, then the row's own tokens: positions decide, not slots. Without a cap, the
    peaks of the two sets lie far apart, up or down."""
    q, k, v, g = arrays(rng, keys=LENGTH + 21)
    k = jnp.concatenate([prompts * k[:, :21], owns * k[:, 21:]], axis=1)
    prompt, before = jnp.array([[21], [6]]), jnp.arange(21)
    position = prompt + jnp.arange(LENGTH)
    everywhere = jnp.concatenate([jnp.broadcast_to(before, (BATCH, 21)), position], axis=1)
    valid = jnp.concatenate([before < prompt, jnp.ones((BATCH, LENGTH), bool)], axis=1)
    mask = Places(position, everywhere, key_valid=valid).mask(window)
    first = Places(position, jnp.broadcast_to(before, (BATCH, 21)), key_valid=before < prompt)
    second = Places(position, position)

    def split(q, k, v):
        static = Static(window, cap, own=False, queries=8, keys=8)
        a = attention_sums(q, k[:, :21], v[:, :21], first, static)
        b = attention_sums(q, k[:, 21:], v[:, 21:], second, static)
        return normalise(together(a, b), q.dtype)

    real = jnp.ones((BATCH, LENGTH), bool)
    want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=cap), q, k, v, g, real
    )
    for a, b in zip(value_and_gradients(split, q, k, v, g, real), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def softmax_of_scores_in_float64(q, k, v, mask) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    raw = np.einsum("btkgh,bskh->bkgts", q, k)
    raw = np.where(np.asarray(mask)[:, None, None], raw, -np.inf)
    weights = np.exp(raw - raw.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bkgts,bskh->btkgh", weights, v)


@pytest.mark.parametrize("scale", [0.125, 1.0, 64.0])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_without_a_cap_it_is_the_softmax_of_scores_of_any_size(backend, scale, rng, monkeypatch):
    """Queries and keys of few bits, so that the scores themselves are exact: beyond 20, 150 and
    10,000. Most of the largest are negative in the first block."""
    monkeypatch.setattr(attention_backends, "BLOCK", 8)
    q, k, v, g = arrays(rng)
    q, k = jnp.round(q) * scale, jnp.round(k * 2)
    q = q.at[:, :, :, :, 0].set(10 * scale)
    k = k.at[:, :8, :, 0].add(-4.0)
    largest = np.abs(np.einsum("btkgh,bskh->bkgts", q, k)).max()
    assert largest > {0.125: 20, 1.0: 150, 64.0: 1e4}[scale]
    places, real = own_places("plain"), jnp.ones((BATCH, LENGTH), bool)
    compute = self_attention(places, window=20, softcap=None, backend=backend)
    out, *gradients = value_and_gradients(compute, q, k, v, g, real)
    expected = softmax_of_scores_in_float64(q, k, v, places.mask(20))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    mask = places.mask(20)
    _, *want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=None), q, k, v, g, real
    )
    for a, b in zip(gradients, want, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_a_rematerialised_backward_pass_keeps_the_peaks(rng):
    """As many products as with a softcap: the forward pass is not computed again for its peaks."""
    q, k, v, _ = arrays(rng)
    places = own_places("plain")

    def products(cap, compute) -> int:
        static = Static(None, cap, own=True, queries=64, keys=64)
        policy = jax.checkpoint_policies.save_only_these_names(SAVED)
        run = jax.checkpoint(lambda q, k, v: compute(static, q, k, v).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(q, k, v)).count("dot_general")

    def one(static, q, k, v):
        return chunked_attention(q, k, v, places, static)

    def two(static, q, k, v):
        parts = (attention_sums(q, k, v * x, places, static) for x in (1.0, 2.0))
        return normalise(together(*parts), q.dtype)

    assert products(None, one) == products(CAP, one) == 2 + 5
    assert products(None, two) == products(CAP, two) == 2 * (2 + 5)


def test_blocks_that_nobody_sees_are_skipped(rng):
    """Values in them are NaN: they would spread if they were multiplied, even by zero."""
    q, k, v, _ = arrays(rng)
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    static = Static(8, CAP, own=True, queries=8, keys=8)
    # Queries of slots 16..23 see keys 9..23: blocks 1 and 2.
    v = v.at[:, :8].set(jnp.nan).at[:, 24:].set(jnp.nan)
    out, total, _ = attention_sums(q, k, v, Places(slots, slots), static)
    assert np.isfinite(np.asarray(out)[:, 16:24]).all()
    assert np.isnan(np.asarray(out)[:, 24:]).all()
    assert (np.asarray(total) > 0).all()


@pytest.mark.parametrize("cap", [CAP, None])
def test_a_query_without_keys_gets_zeros_and_zero_gradients(cap, rng):
    q, k, v, g = arrays(rng)
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    places = Places(slots, slots, key_valid=slots >= 5)
    static, real = Static(None, cap, False, 8, 8), jnp.ones((BATCH, LENGTH), bool)
    for compute in (
        lambda q, k, v: normalise(attention_sums(q, k, v, places, static), q.dtype),
        lambda q, k, v: chunked_attention(q, k, v, places, static),
    ):
        out, dq, dk, dv = value_and_gradients(compute, q, k, v, g, real)
        assert not out[:, :5].any() and not dq[:, :5].any()
        assert not dk[:, :5].any() and not dv[:, :5].any()
        assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("cap", [CAP, None])
def test_bfloat16_is_as_near_as_the_reference(cap, rng):
    exact = arrays(rng)
    q, k, v, g = (x.astype(jnp.bfloat16) for x in exact)
    places, real = own_places("plain"), jnp.ones((BATCH, LENGTH), bool)
    mask = places.mask(12)
    truth = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=cap),
        *(x.astype(jnp.float32) for x in (q, k, v, g)), real,
    )  # fmt: skip
    static = Static(12, cap, own=True, queries=8, keys=8)
    ways = (
        lambda q, k, v: chunked_attention(q, k, v, places, static),
        lambda q, k, v: attention(q, k, v, mask, softcap=cap),
    )
    ours, reference = (
        [
            float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
            for a, b in zip(value_and_gradients(way, q, k, v, g, real), truth, strict=True)
        ]
        for way in ways
    )
    assert max(ours) < 0.02
    assert max(ours) < 1.5 * max(reference)


@pytest.mark.parametrize("cap", [50.0, None])
def test_memory_is_linear(cap):
    """Nothing of 4,096 x 4,096 exists: a score matrix of the reference would be 256 MiB."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 2, 8), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    slots = jnp.arange(4096)[None]
    compute = self_attention(Places(slots, slots), window=None, softcap=cap, backend="chunked")
    gradient = jax.grad(lambda q, k, v: compute(q, k, v).sum(), argnums=(0, 1, 2))
    analysis = jax.jit(gradient).lower(shape, keys, keys).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 48 * 2**20


@pytest.mark.parametrize("cap", [CAP, None])
def test_the_backends_agree_beyond_a_block(cap, rng, monkeypatch):
    """The same call, chunked and reference, for a row and for a set of keys."""
    monkeypatch.setattr(attention_backends, "BLOCK", 8)
    q, k, v, _ = arrays(rng)
    places = own_places("packed")
    for window in (None, 5):
        settings = {"window": window, "softcap": cap}
        a, b = (
            self_attention(places, backend=name, **settings)(q, k, v)
            for name in ("reference", "chunked")
        )
        np.testing.assert_allclose(a[places.key_valid], b[places.key_valid], atol=1e-5)
        a, b = (
            normalise(cross_sums(places, backend=name, **settings)(q, k, v), q.dtype)
            for name in ("reference", "chunked")
        )
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "platform", "kind", "found"),
    [
        ("auto", "cpu", "cpu", "chunked"),
        ("auto", "tpu", "TPU v5 lite", "splash"),
        ("auto", "gpu", "NVIDIA A100-SXM4-80GB", "chunked"),
        ("reference", "cpu", "cpu", "reference"),
        ("chunked", "tpu", "TPU v4", "chunked"),
    ],
)
def test_choice(asked, platform, kind, found):
    assert choose(asked, platform, kind) == found


@pytest.mark.parametrize(
    ("asked", "platform", "kind", "message"),
    [
        ("splash", "cpu", "cpu", "attention=splash needs a TPU, not cpu"),
        ("tokamax", "gpu", "NVIDIA A100", "need an H100, H200 or B200, not NVIDIA A100"),
        ("flash", "cpu", "cpu", "unknown attention backend 'flash'; choose auto or reference"),
    ],
)
def test_a_backend_that_can_not_run_is_refused(asked, platform, kind, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, platform, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "cap"), [(None, CAP), (70, CAP), (4096, CAP), (70, None)])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_splash_is_the_reference(kind, window, cap, rng):
    """The TPU kernel, interpreted on this machine: values and gradients, beyond a block."""
    shape = (1, 300, 2, 2, 128)
    q, g = (jnp.asarray(rng.normal(size=shape) * s, jnp.float32) for s in (2.0, 1.0))
    k, v = jnp.asarray(rng.normal(size=(2, 1, 300, 2, 128)), jnp.float32)
    slots = jnp.arange(300)[None]
    segments = None if kind == "plain" else (slots >= 130).astype(jnp.int32)
    position = slots if segments is None else jnp.where(slots >= 130, slots - 130, slots)
    places = Places(position, position, segments, segments)
    mask = places.mask(window)
    real = jnp.ones((1, 300), bool)
    want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=cap), q, k, v, g, real
    )
    compute = attention_kernels.splash(places, window=window, softcap=cap, interpret=True)
    for a, b in zip(value_and_gradients(compute, q, k, v, g, real), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))
