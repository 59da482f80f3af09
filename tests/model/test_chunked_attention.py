"""Attention in blocks equals the reference: values, gradients, every mask; and its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import attention_backends, attention_kernels
from grm_jax.model.attention import Places, attention
from grm_jax.model.attention_backends import choose, cross_sums, self_attention
from grm_jax.model.chunked_attention import Static, attention_sums, chunked_attention, normalise

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


@pytest.mark.parametrize("blocks", [(8, 8), (5, 16), (16, 4), (64, 64)])
@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_rows_over_themselves(kind, window, blocks, rng):
    q, k, v, g = arrays(rng)
    places = own_places(kind)
    # Padding queries read what they like; nobody reads them.
    real = places.mask(None).any(-1) if kind == "plain" else places.key_valid
    static = Static(window, CAP, own=True, queries=blocks[0], keys=blocks[1])
    mask = places.mask(window)
    want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=CAP), q, k, v, g, real
    )
    got = value_and_gradients(
        lambda q, k, v: chunked_attention(q, k, v, places, static), q, k, v, g, real
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 10])
def test_sums_over_two_sets_of_keys(window, rng):
    """A shared prompt, then the row's own tokens: positions decide, not slots."""
    q, k, v, g = arrays(rng, keys=LENGTH + 21)
    prompt, before = jnp.array([[21], [6]]), jnp.arange(21)
    position = prompt + jnp.arange(LENGTH)
    everywhere = jnp.concatenate([jnp.broadcast_to(before, (BATCH, 21)), position], axis=1)
    valid = jnp.concatenate([before < prompt, jnp.ones((BATCH, LENGTH), bool)], axis=1)
    mask = Places(position, everywhere, key_valid=valid).mask(window)
    first = Places(position, jnp.broadcast_to(before, (BATCH, 21)), key_valid=before < prompt)
    second = Places(position, position)

    def split(q, k, v):
        static = Static(window, CAP, own=False, queries=8, keys=8)
        a = attention_sums(q, k[:, :21], v[:, :21], first, static)
        b = attention_sums(q, k[:, 21:], v[:, 21:], second, static)
        return normalise((a[0] + b[0], a[1] + b[1]), q.dtype)

    real = jnp.ones((BATCH, LENGTH), bool)
    want = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=CAP), q, k, v, g, real
    )
    for a, b in zip(value_and_gradients(split, q, k, v, g, real), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_blocks_that_nobody_sees_are_skipped(rng):
    """Values in them are NaN: they would spread if they were multiplied, even by zero."""
    q, k, v, _ = arrays(rng)
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    static = Static(8, CAP, own=True, queries=8, keys=8)
    # Queries of slots 16..23 see keys 9..23: blocks 1 and 2.
    v = v.at[:, :8].set(jnp.nan).at[:, 24:].set(jnp.nan)
    out, total = attention_sums(q, k, v, Places(slots, slots), static)
    assert np.isfinite(np.asarray(out)[:, 16:24]).all()
    assert np.isnan(np.asarray(out)[:, 24:]).all()
    assert (np.asarray(total) > 0).all()


def test_a_query_without_keys_gets_zeros(rng):
    q, k, v, _ = arrays(rng)
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    places = Places(slots, slots, key_valid=slots >= 5)
    out = normalise(attention_sums(q, k, v, places, Static(None, CAP, False, 8, 8)), q.dtype)
    assert np.abs(np.asarray(out)[:, :5]).max() == 0
    assert np.isfinite(np.asarray(out)).all()


def test_bfloat16_is_as_near_as_the_reference(rng):
    exact = arrays(rng)
    q, k, v, g = (x.astype(jnp.bfloat16) for x in exact)
    places, real = own_places("plain"), jnp.ones((BATCH, LENGTH), bool)
    mask = places.mask(12)
    truth = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, softcap=CAP),
        *(x.astype(jnp.float32) for x in (q, k, v, g)), real,
    )  # fmt: skip
    static = Static(12, CAP, own=True, queries=8, keys=8)
    ways = (
        lambda q, k, v: chunked_attention(q, k, v, places, static),
        lambda q, k, v: attention(q, k, v, mask, softcap=CAP),
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


def test_memory_is_linear():
    """Nothing of 4,096 x 4,096 exists: a score matrix of the reference would be 256 MiB."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 2, 8), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    slots = jnp.arange(4096)[None]
    compute = self_attention(Places(slots, slots), window=None, softcap=50.0, backend="chunked")
    gradient = jax.grad(lambda q, k, v: compute(q, k, v).sum(), argnums=(0, 1, 2))
    analysis = jax.jit(gradient).lower(shape, keys, keys).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 48 * 2**20


def test_the_backends_agree_beyond_a_block(rng, monkeypatch):
    """The same call, chunked and reference, for a row and for a set of keys."""
    monkeypatch.setattr(attention_backends, "BLOCK", 8)
    q, k, v, _ = arrays(rng)
    places = own_places("packed")
    for window in (None, 5):
        settings = {"window": window, "softcap": CAP}
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
@pytest.mark.parametrize("window", [None, 70, 4096])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_splash_is_the_reference(kind, window, rng):
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
        lambda q, k, v: attention(q, k, v, mask, softcap=CAP), q, k, v, g, real
    )
    compute = attention_kernels.splash(places, window=window, softcap=CAP, interpret=True)
    for a, b in zip(value_and_gradients(compute, q, k, v, g, real), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))
