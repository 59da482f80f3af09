"""Exact attention whose memory is linear in the length, forward and backward, on any device.

Gemma-2's softcap bounds the scores, so exp() needs no running maximum: attention over a set of keys
is a pair of plain sums,

    numerator_i = sum_j w_ij v_j,   total_i = sum_j w_ij,   w_ij = exp(cap tanh(q_i k_j / cap)),

which are added up over blocks of keys, and over sets of keys (a shared prompt, a completion). No
array of size [queries, keys] is larger than one block: the backward pass computes the weights
again, one block of queries after the other,

    dw_ij = dnumerator_i v_j + dtotal_i,   ds_ij = w_ij (1 - tanh^2) dw_ij.

Where there is one set of keys, `chunked_attention` also does the division: both terms of dw are
then computed from the same rounded dnumerator, and cancel more exactly in bfloat16.

Inside this file heads come before slots, so that every product is a batch of plain matrix products.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h size
of a head; t queries and s keys of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grm_jax.model.attention import SAVED, Places, check_softcap, rounded
from grm_jax.model.linear import apart

Pair = tuple[jax.Array, jax.Array]  # (numerator, total)


class Static(NamedTuple):
    """What a compiled program depends on besides its arrays.

    Attributes:
      window: the sliding window, or None for a global layer.
      softcap: the softcap of the scores.
      own: whether queries and keys are the same slots of a row whose positions rise by one within a
        segment. A query then sees no later slot, and none that lies `window` or more slots back, so
        blocks of keys without a visible slot are skipped.
      queries, keys: how many queries, and how many keys, a block has.
    """

    window: int | None
    softcap: float
    own: bool
    queries: int
    keys: int


class Row(NamedTuple):
    """Positions [B, n] and segments [B, n] of n slots; padding among the keys has segment -1."""

    position: jax.Array
    segment: jax.Array


def attention_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> Pair:
    """(numerator [B, T, K, G, h], total [B, T, K, G]) in float32; zeros for queries without keys.

    Args:
      q: [B, T, K, G, h], scaled and rotated.
      k, v: [B, S, K, h].
      places: positions and segments of queries and keys.

    Raises UserError for a softcap that is too large to leave out the running maximum.
    """
    numerator, total = cast(Pair, _sums(*_whole_blocks(q, k, v, places, static)))
    slots = q.shape[1]
    return _slots_first(numerator)[:, :slots], jnp.moveaxis(total, 3, 1)[:, :slots]


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> jax.Array:
    """numerator / total [B, T, K, G, h], in the dtype of q. Takes `attention_sums`'s arguments."""
    out = cast(jax.Array, _attention(*_whole_blocks(q, k, v, places, static)))
    return _slots_first(out)[:, : q.shape[1]]


def normalise(sums: Pair, dtype: Any) -> jax.Array:
    """numerator [..., h] / total [...] in `dtype`, the dtype of the products with the values.

    A query that saw no key (total 0) gets zeros.
    """
    return cast(jax.Array, _normalise(jnp.dtype(dtype), *sums))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(dtype: Any, numerator: jax.Array, total: jax.Array) -> jax.Array:
    return _normalise_forward(dtype, numerator, total)[0]


def _normalise_forward(dtype: Any, numerator: jax.Array, total: jax.Array):
    inverse = checkpoint_name(_inverse(total), SAVED)
    out = checkpoint_name(numerator * inverse[..., None], SAVED)
    return out.astype(dtype), (out, inverse)


def _normalise_backward(dtype: Any, kept: Pair, dout: jax.Array) -> Pair:
    return _through_division(dout, *kept, dtype)


def _through_division(dout, out, inverse, dtype) -> Pair:
    """The gradients of numerator and total, in float32.

    The numerator's gradient is rounded to the dtype in which it enters products before the total's
    gradient is computed from it, so that the two still cancel.
    """
    dnumerator = (dout.astype(jnp.float32) * inverse[..., None]).astype(dtype).astype(jnp.float32)
    return dnumerator, -jnp.sum(dnumerator * out, axis=-1)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _inverse(total: jax.Array) -> jax.Array:
    """1 / total, and 1 where the total is 0."""
    return 1.0 / jnp.where(total > 0, total, 1.0)


def _whole_blocks(q, k, v, places: Places, static: Static):
    """The arguments of `_sums`: `static` with blocks no longer than the rows; q [B, K, G, T, h], k
    and v [B, K, S, h] and both `Row`s, with lengths padded to multiples of the blocks."""
    check_softcap(static.softcap)
    length, keys = q.shape[1], k.shape[1]
    static = static._replace(queries=min(static.queries, length), keys=min(static.keys, keys))
    query, key = _rows(places, q.shape[0])
    more, extra = -length % static.queries, -keys % static.keys
    return (
        static,
        jnp.einsum("btkgh->bkgth", _pad(q, more)),
        *(jnp.einsum("bskh->bksh", _pad(x, extra)) for x in (k, v)),
        Row(_pad(query.position, more), _pad(query.segment, more)),
        Row(_pad(key.position, extra), _pad(key.segment, extra, -1)),
    )


def _slots_first(x: jax.Array) -> jax.Array:
    """[B, K, G, T, h] -> [B, T, K, G, h]."""
    return jnp.einsum("bkgth->btkgh", x)


def _rows(places: Places, batch: int) -> tuple[Row, Row]:
    """The rows of the queries [B, T] and of the keys [B, S]."""

    def segments(ids: jax.Array | None, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like) if ids is None else ids

    key = segments(places.key_segment, places.key_pos)
    if places.key_valid is not None:
        key = jnp.where(places.key_valid, key, -1)
    query = segments(places.query_segment, places.query_pos)
    rows = (places.query_pos, query, places.key_pos, key)
    a, b, c, d = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows)
    return Row(a, b), Row(c, d)


def _pad(x: jax.Array, extra: int, value: int = 0) -> jax.Array:
    """x [B, n, ...] with `extra` entries of `value` at the end of its second axis."""
    if not extra:
        return x
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _block(x: jax.Array, index: Any, size: int, axis: int) -> jax.Array:
    """Block `index` of `size` entries along an axis."""
    if x.shape[axis] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _row_block(row: Row, index: Any, size: int) -> Row:
    return Row(*(_block(x, index, size, 1) for x in row))


def _each(function: Callable[[Any, Any], tuple[Any, Any]], start: Any, count: int):
    """`lax.scan` over the block numbers 0..count-1; where there is one block, without a loop."""
    if count > 1:
        return jax.lax.scan(function, start, jnp.arange(count))
    end, out = function(start, 0)
    return end, jax.tree.map(lambda x: x[None], out)


def _over_keys(function: Callable[[Any, Any], Any], static: Static, i: Any, count: int, start: Any):
    """start, updated by function(j, state) for every block j of keys that query block i may see."""
    if count == 1:
        return function(0, start)
    low, high = 0, count
    if static.own:
        first, last = i * static.queries, (i + 1) * static.queries - 1
        high = jnp.minimum(last // static.keys + 1, count)
        if static.window is not None:
            low = jnp.maximum(0, first - static.window + 1) // static.keys
    return jax.lax.fori_loop(low, high, function, start)


def _weights(static: Static, q: jax.Array, k: jax.Array, query: Row, key: Row) -> Pair:
    """The weights w of a block and their derivative by the raw score, w (1 - tanh^2).

    Both are [B, K, G, t, s], and 0 where masked. w is in the dtype of k, which is that of the
    products that it enters; the derivative is in float32. The totals are sums of the rounded w,
    too: with exact weights, terms that should cancel would not.
    """
    raw = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    tanh = jnp.tanh(raw / static.softcap)
    distance = query.position[:, :, None] - key.position[:, None, :]
    mask = (distance >= 0) & (query.segment[:, :, None] == key.segment[:, None, :])
    if static.window is not None:
        mask &= distance < static.window
    weights = rounded(jnp.exp(static.softcap * tanh), k.dtype)
    slope = weights * (1.0 - tanh * tanh)
    w, slope = (jnp.where(mask[:, None, None], x, 0.0) for x in (weights, slope))
    return w.astype(k.dtype), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, query: Row, key: Row) -> Pair:
    """Numerator [B, K, G, T, h] and total [B, K, G, T]; lengths are multiples of the blocks."""
    blocks = k.shape[2] // static.keys

    def query_block(_, i: Any) -> tuple[None, Pair]:
        qi, query_i = _block(q, i, static.queries, 3), _row_block(query, i, static.queries)

        def add(j: Any, sums: Pair) -> Pair:
            kj, vj = (_block(x, j, static.keys, 2) for x in (k, v))  # [B, K, s, h]
            w, _ = _weights(static, qi, kj, query_i, _row_block(key, j, static.keys))
            out = jnp.einsum("bkgts,bksh->bkgth", w, vj, preferred_element_type=jnp.float32)
            return sums[0] + out, sums[1] + jnp.sum(w, axis=-1, dtype=jnp.float32)

        zeros = jnp.zeros(qi.shape, jnp.float32), jnp.zeros(qi.shape[:-1], jnp.float32)
        return None, _over_keys(add, static, i, blocks, zeros)

    _, (numerator, total) = _each(query_block, None, q.shape[3] // static.queries)
    return _join(numerator), _join(total)


def _sums_forward(static: Static, q, k, v, query: Row, key: Row):
    return _sums(static, q, k, v, query, key), (q, k, v, query, key)


def _sums_backward(static: Static, kept, cotangents):
    dnumerator, dtotal = cotangents
    return _gradients(static, kept, dnumerator.astype(kept[2].dtype), dtotal)


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, query: Row, key: Row) -> jax.Array:
    """`chunked_attention` with heads before slots, [B, K, G, T, h]; lengths are multiples of the
    blocks."""
    return _attention_forward(static, q, k, v, query, key)[0]


def _attention_forward(static: Static, q, k, v, query: Row, key: Row):
    numerator, total = cast(Pair, _sums(static, q, k, v, query, key))
    inverse = checkpoint_name(_inverse(total), SAVED)
    out = checkpoint_name(numerator * inverse[..., None], SAVED)
    return out.astype(q.dtype), (q, k, v, query, key, out, inverse)


def _attention_backward(static: Static, kept, dout):
    *inputs, out, inverse = kept
    dtype = inputs[2].dtype
    dnumerator, dtotal = _through_division(dout, out, inverse, dtype)
    return _gradients(static, inputs, dnumerator.astype(dtype), dtotal)


_attention.defvjp(_attention_forward, _attention_backward)


def _gradients(static: Static, inputs, dnumerator, dtotal):
    """The gradients of q, k and v, and None for the two rows of positions and segments."""
    q, k, v, query, key = inputs
    blocks = k.shape[2] // static.keys
    f32 = {"preferred_element_type": jnp.float32}

    def query_block(sums: Pair, i: Any):
        qi, dn = (_block(x, i, static.queries, 3) for x in (q, dnumerator))  # [B, K, G, t, h]
        dt = _block(dtotal, i, static.queries, 3)[..., None]  # [B, K, G, t, 1]
        query_i = _row_block(query, i, static.queries)

        def add(j: Any, carry):
            dq, dk, dv = carry
            kj, vj = (_block(x, j, static.keys, 2) for x in (k, v))
            w, slope = _weights(static, qi, kj, query_i, _row_block(key, j, static.keys))
            dw = jnp.einsum("bkgth,bksh->bkgts", dn, vj, **f32) + dt  # [B, K, G, t, s]
            ds = (slope * dw).astype(q.dtype)
            dq += jnp.einsum("bkgts,bksh->bkgth", ds, kj, **f32)
            dkj = jnp.einsum("bkgth,bkgts->bkhs", qi, ds, **f32)
            dvj = jnp.einsum("bkgth,bkgts->bkhs", dn, w, **f32)
            dkj, dvj = (jnp.einsum("bkhs->bksh", apart(x)) for x in (dkj, dvj))
            return dq, _add(dk, dkj, j * static.keys), _add(dv, dvj, j * static.keys)

        start = (jnp.zeros(qi.shape, jnp.float32), *sums)
        dq, dk, dv = _over_keys(add, static, i, blocks, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = _each(query_block, zeros, q.shape[3] // static.queries)
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _add(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    """x [B, K, S, h] with `part` [B, K, s, h] added to its slots from `start` on."""
    if x.shape == part.shape:
        return x + part
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis=2)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, t, ...] -> [B, K, G, blocks * t, ...]."""
    if blocks.shape[0] == 1:
        return blocks[0]
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
