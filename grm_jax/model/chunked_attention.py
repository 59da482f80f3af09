"""Exact attention in memory linear in the length, forward and backward, on any device.

Gemma-2's softcap bounds the scores, so exp() needs no running maximum: attention over a set of keys
is a pair of plain sums,

    numerator_i = sum_j w_ij v_j,   total_i = sum_j w_ij,   w_ij = exp(cap tanh(q_i k_j / cap)),

which are added up over blocks of keys, and over sets of keys (a shared prompt, a completion).
Nothing of size [queries, keys] exists beyond one block: the backward pass computes the weights
again, a block of queries after the other,

    dw_ij = dnumerator_i v_j + dtotal_i,   ds_ij = w_ij dw_ij (1 - tanh^2).

Where there is one set of keys the division is done here, too: with out_i's own gradient, instead of
one that was divided and rounded, the two terms of dw cancel more exactly in bfloat16.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from grm_jax.model.attention import Places, check_softcap

Pair = tuple[jax.Array, jax.Array]


class Static(NamedTuple):
    """What a program depends on.

    Attributes:
      window: sliding window, or None for a global layer.
      own: queries and keys are the same slots of a row, whose positions rise by one within a
        segment: a query sees no later slot, and none that is `window` or more slots back. Blocks
        without anything to see are skipped.
      queries, keys: slots of a block.
    """

    window: int | None
    softcap: float
    own: bool
    queries: int
    keys: int


class Row(NamedTuple):
    """Positions [B, n] and segments [B, n] of slots; a key's segment is -1 where it is padding."""

    position: jax.Array
    segment: jax.Array


def attention_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> Pair:
    """(numerator [B, T, K, G, h], total [B, T, K, G]), float32; zeros for a query without keys.

    Args:
      q: [B, T, K, G, h], scaled and rotated.
      k, v: [B, S, K, h].
      places: where queries and keys stand.

    Raises ValueError for a softcap that does not bound exp().
    """
    numerator, total = cast(Pair, _sums(*_whole_blocks(q, k, v, places, static)))
    return numerator[:, : q.shape[1]], total[:, : q.shape[1]]


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> jax.Array:
    """numerator / total [B, T, K, G, h], in the dtype of q. Arguments of `attention_sums`."""
    out = cast(jax.Array, _attention(*_whole_blocks(q, k, v, places, static)))
    return out[:, : q.shape[1]]


def _whole_blocks(q, k, v, places: Places, static: Static):
    """The arguments of `_sums`: lengths padded to multiples of the blocks."""
    check_softcap(static.softcap)
    length, keys = q.shape[1], k.shape[1]
    static = static._replace(queries=min(static.queries, length), keys=min(static.keys, keys))
    query, key = _rows(places, q.shape[0])
    more, extra = -length % static.queries, -keys % static.keys
    return (
        static, _pad(q, more), _pad(k, extra), _pad(v, extra),
        Row(_pad(query.position, more), _pad(query.segment, more)),
        Row(_pad(key.position, extra), _pad(key.segment, extra, -1)),
    )  # fmt: skip


def _rows(places: Places, batch: int) -> tuple[Row, Row]:
    def segments(given: jax.Array | None, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like) if given is None else given

    key = segments(places.key_segment, places.key_pos)
    if places.key_valid is not None:
        key = jnp.where(places.key_valid, key, -1)
    query = segments(places.query_segment, places.query_pos)
    rows = (places.query_pos, query, places.key_pos, key)
    a, b, c, d = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows)
    return Row(a, b), Row(c, d)


def _pad(x: jax.Array, extra: int, value: int = 0) -> jax.Array:
    if not extra:
        return x
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _block(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _reach(static: Static, i: jax.Array, blocks: int) -> tuple[jax.Array | int, jax.Array | int]:
    """First and one past the last block of keys that a block of queries may see."""
    if not static.own:
        return 0, blocks
    first, last = i * static.queries, (i + 1) * static.queries - 1
    low = 0 if static.window is None else jnp.maximum(0, first - static.window + 1) // static.keys
    return low, jnp.minimum(last // static.keys + 1, blocks)


def _weights(static: Static, q: jax.Array, k: jax.Array, query: Row, key: Row) -> Pair:
    """w and tanh(score / cap) of a block, [B, K, G, t, s]; w is 0 where masked.

    w is in the dtype of the products it enters (k's), tanh in float32. Totals and gradients take
    the rounded w too: with the exact one, terms that should cancel would not.
    """
    raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    tanh = jnp.tanh(raw / static.softcap)
    distance = query.position[:, :, None] - key.position[:, None, :]
    mask = (distance >= 0) & (query.segment[:, :, None] == key.segment[:, None, :])
    if static.window is not None:
        mask &= distance < static.window
    weights = jnp.where(mask[:, None, None], jnp.exp(static.softcap * tanh), 0.0)
    return weights.astype(k.dtype), tanh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, query: Row, key: Row) -> Pair:
    """`attention_sums` of lengths that are multiples of the blocks."""
    blocks = k.shape[1] // static.keys

    def one(i: jax.Array) -> Pair:
        qi, query_i = _take((q, query), i, static.queries)

        def add(j: jax.Array, sums: Pair) -> Pair:
            kj, vj, key_j = _take((k, v, key), j, static.keys)
            w, _ = _weights(static, qi, kj, query_i, key_j)
            out = jnp.einsum("bkgts,bskh->btkgh", w, vj, preferred_element_type=jnp.float32)
            return sums[0] + out, sums[1] + jnp.sum(w, axis=-1, dtype=jnp.float32)

        batch, size, kv, groups, _ = qi.shape
        zeros = (
            jnp.zeros(qi.shape, jnp.float32),
            jnp.zeros((batch, kv, groups, size), jnp.float32),
        )
        numerator, total = jax.lax.fori_loop(*_reach(static, i, blocks), add, zeros)
        return numerator, jnp.moveaxis(total, 3, 1)

    numerator, total = jax.lax.map(one, jnp.arange(q.shape[1] // static.queries))
    return _join(numerator), _join(total)


def _sums_forward(static: Static, q, k, v, query: Row, key: Row):
    return _sums(static, q, k, v, query, key), (q, k, v, query, key)


def _sums_backward(static: Static, kept, given):
    dnumerator, dtotal = given
    return _gradients(static, kept, dnumerator, dtotal, jnp.ones_like(dtotal))


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, query: Row, key: Row) -> jax.Array:
    """`chunked_attention` of lengths that are multiples of the blocks."""
    return _attention_forward(static, q, k, v, query, key)[0]


def _attention_forward(static: Static, q, k, v, query: Row, key: Row):
    numerator, total = cast(Pair, _sums(static, q, k, v, query, key))
    inverse = 1.0 / jnp.where(total > 0, total, 1.0)  # padding may see nothing
    out = numerator * inverse[..., None]
    return out.astype(q.dtype), (q, k, v, query, key, out, inverse)


def _attention_backward(static: Static, kept, dout):
    *inputs, out, inverse = kept
    delta = jnp.sum(dout.astype(jnp.float32) * out, axis=-1)
    return _gradients(static, inputs, dout, -delta, inverse)


_attention.defvjp(_attention_forward, _attention_backward)


def _gradients(static: Static, inputs, dnumerator, dtotal, scale):
    """Gradients of q, k, v (and None of the places) for weights w * scale [B, T, K, G]."""
    q, k, v, query, key = inputs
    blocks = k.shape[1] // static.keys
    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))

    def one(sums: Pair, i: jax.Array):
        given = (q, query, dnumerator.astype(v.dtype), dtotal, scale)
        qi, query_i, dn, *rest = _take(given, i, static.queries)
        dt, factor = (jnp.moveaxis(x, 1, 3)[..., None] for x in rest)

        def add(j: jax.Array, carry):
            dq, dk, dv = carry
            kj, vj, key_j = _take((k, v, key), j, static.keys)
            w, tanh = _weights(static, qi, kj, query_i, key_j)
            dw = jnp.einsum("btkgh,bskh->bkgts", dn, vj, preferred_element_type=jnp.float32) + dt
            ds = (w * factor * dw * (1.0 - tanh * tanh)).astype(q.dtype)
            f32 = {"preferred_element_type": jnp.float32}
            dq += jnp.einsum("bkgts,bskh->btkgh", ds, kj, **f32)
            dkj = jnp.einsum("bkgts,btkgh->bskh", ds, qi, **f32)
            dvj = jnp.einsum("bkgts,btkgh->bskh", (w * factor).astype(v.dtype), dn, **f32)
            return dq, _add(dk, dkj, j * static.keys), _add(dv, dvj, j * static.keys)

        start = (jnp.zeros(qi.shape, jnp.float32), *sums)
        dq, dk, dv = jax.lax.fori_loop(*_reach(static, i, blocks), add, start)
        return (dk, dv), dq.astype(q.dtype)

    (dk, dv), dq = jax.lax.scan(one, zeros, jnp.arange(q.shape[1] // static.queries))
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _take(tree, index: jax.Array, size: int):
    """A block along axis 1 of every array."""
    return jax.tree.map(lambda x: _block(x, index, size), tree)


def _add(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """x with `part` added to its slots from `start`."""
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis=1)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, size, ...] -> [B, blocks * size, ...]."""
    count, batch, size, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, count * size, *rest)
