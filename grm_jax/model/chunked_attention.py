"""Exact attention whose memory is linear in the length, forward and backward, on any device.

Attention over a set of keys is a triple of sums (`softmax_sums.Sums`),

    numerator_i = sum_j w_ij v_j,   total_i = sum_j w_ij,   peak_i,

with w_ij = exp(cap tanh(q_i k_j / cap)) and no peak where there is a softcap, and otherwise
w_ij = exp(q_i k_j) / 2^peak_i. The sums are added up over blocks of keys, and over sets of keys (a
shared prompt, a completion). No array of size [queries, keys] is larger than one block: the
backward pass computes the weights again, one block of queries after the other, with the peak of the
whole set, which is kept:

    dw_ij = dnumerator_i v_j + dtotal_i,   ds_ij = w_ij (1 - tanh^2) dw_ij,   without the tanh^2
                                                                              where uncapped.

A peak has no gradient: it does not change numerator / total.

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

from grm_jax.model.attention import SAVED, Places
from grm_jax.model.linear import apart
from grm_jax.model.softmax_sums import (
    LOWEST,
    Sums,
    check_softcap,
    inverse_of,
    rounded,
    soft_weights,
    through_division,
    together,
)


class Static(NamedTuple):
    """What a compiled program depends on besides its arrays.

    Attributes:
      window: the sliding window, or None for a global layer.
      softcap: the softcap of the scores, or None.
      own: whether queries and keys are the same slots of a row whose positions rise by one within a
        segment. A query then sees no later slot, and none that lies `window` or more slots back, so
        blocks of keys without a visible slot are skipped.
      queries, keys: how many queries, and how many keys, a block has.
    """

    window: int | None
    softcap: float | None
    own: bool
    queries: int
    keys: int


class Row(NamedTuple):
    """Positions [B, n] and segments [B, n] of n slots; padding among the keys has segment -1."""

    position: jax.Array
    segment: jax.Array


def attention_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> Sums:
    """Numerator [B, T, K, G, h], total and peak [B, T, K, G]; zeros for queries without keys.

    Args:
      q: [B, T, K, G, h], scaled and rotated.
      k, v: [B, S, K, h].
      places: positions and segments of queries and keys.

    Raises UserError for a softcap that is too large to leave out the peak.
    """
    numerator, total, peak = cast(Sums, _sums(*_whole_blocks(q, k, v, places, static)))
    slots = q.shape[1]
    return Sums(
        _slots_first(numerator)[:, :slots],
        jnp.moveaxis(total, 3, 1)[:, :slots],
        None if peak is None else jnp.moveaxis(peak, 3, 1)[:, :slots],
    )


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, static: Static
) -> jax.Array:
    """numerator / total [B, T, K, G, h], in the dtype of q. Takes `attention_sums`'s arguments."""
    out = cast(jax.Array, _attention(*_whole_blocks(q, k, v, places, static)))
    return _slots_first(out)[:, : q.shape[1]]


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


def _weights(
    static: Static, q: jax.Array, k: jax.Array, query: Row, key: Row, peak: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The weights w of a block, their derivative by the raw score, w (1 - tanh^2), and their peak.

    The first two are [B, K, G, t, s], and 0 where masked. w is in the dtype of k, which is that of
    the products that it enters; the derivative is in float32. The totals are sums of the rounded w,
    too: with exact weights, terms that should cancel would not. The peak is [B, K, G, t], the given
    one or, for None, the block's own; with a softcap it is None.
    """
    raw = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    tanh = None if static.softcap is None else jnp.tanh(raw / static.softcap)
    distance = query.position[:, :, None] - key.position[:, None, :]
    mask = (distance >= 0) & (query.segment[:, :, None] == key.segment[:, None, :])
    if static.window is not None:
        mask &= distance < static.window
    mask = mask[:, None, None]
    if static.softcap is None or tanh is None:
        w, peak = soft_weights(raw, mask, softcap=None, dtype=k.dtype, peak=peak)
        return w, w.astype(jnp.float32), peak
    weights = rounded(jnp.exp(static.softcap * tanh), k.dtype)
    slope = weights * (1.0 - tanh * tanh)
    w, slope = (jnp.where(mask, x, 0.0) for x in (weights, slope))
    return w.astype(k.dtype), slope, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, query: Row, key: Row) -> Sums:
    """Numerator [B, K, G, T, h], total and peak [B, K, G, T]; lengths are multiples of the
    blocks."""
    blocks = k.shape[2] // static.keys

    def query_block(_, i: Any) -> tuple[None, Sums]:
        qi, query_i = _block(q, i, static.queries, 3), _row_block(query, i, static.queries)

        def add(j: Any, sums: Sums) -> Sums:
            kj, vj = (_block(x, j, static.keys, 2) for x in (k, v))  # [B, K, s, h]
            key_j = _row_block(key, j, static.keys)
            w, _, peak = _weights(static, qi, kj, query_i, key_j, None)
            out = jnp.einsum("bkgts,bksh->bkgth", w, vj, preferred_element_type=jnp.float32)
            return together(sums, Sums(out, jnp.sum(w, axis=-1, dtype=jnp.float32), peak))

        start = Sums(
            jnp.zeros(qi.shape, jnp.float32),
            jnp.zeros(qi.shape[:-1], jnp.float32),
            jnp.full(qi.shape[:-1], LOWEST, jnp.int32) if static.softcap is None else None,
        )
        return None, _over_keys(add, static, i, blocks, start)

    _, sums = _each(query_block, None, q.shape[3] // static.queries)
    return jax.tree.map(_join, sums)


def _sums_forward(static: Static, q, k, v, query: Row, key: Row):
    sums = cast(Sums, _sums(static, q, k, v, query, key))
    sums = sums._replace(peak=_saved(sums.peak))
    return sums, (q, k, v, query, key, sums.peak)


def _saved(peak: jax.Array | None) -> jax.Array | None:
    """A peak under the name of what a rematerialised backward pass may keep."""
    return None if peak is None else checkpoint_name(peak, SAVED)


def _sums_backward(static: Static, kept, cotangents: Sums):
    dnumerator = cotangents.numerator.astype(kept[2].dtype)
    return _gradients(static, kept, dnumerator, cotangents.total)


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, query: Row, key: Row) -> jax.Array:
    """`chunked_attention` with heads before slots, [B, K, G, T, h]; lengths are multiples of the
    blocks."""
    return _attention_forward(static, q, k, v, query, key)[0]


def _attention_forward(static: Static, q, k, v, query: Row, key: Row):
    numerator, total, peak = cast(Sums, _sums(static, q, k, v, query, key))
    inverse = checkpoint_name(inverse_of(total), SAVED)
    out = checkpoint_name(numerator * inverse[..., None], SAVED)
    return out.astype(q.dtype), (q, k, v, query, key, _saved(peak), out, inverse)


def _attention_backward(static: Static, kept, dout):
    *inputs, out, inverse = kept
    dtype = inputs[2].dtype
    dnumerator, dtotal = through_division(dout, out, inverse, dtype)
    return _gradients(static, inputs, dnumerator.astype(dtype), dtotal)


_attention.defvjp(_attention_forward, _attention_backward)


def _gradients(static: Static, inputs, dnumerator, dtotal):
    """The gradients of q, k and v, and None for the two rows of positions and segments."""
    q, k, v, query, key, peak = inputs
    blocks = k.shape[2] // static.keys
    f32 = {"preferred_element_type": jnp.float32}

    def query_block(sums: tuple[jax.Array, jax.Array], i: Any):
        qi, dn = (_block(x, i, static.queries, 3) for x in (q, dnumerator))  # [B, K, G, t, h]
        dt = _block(dtotal, i, static.queries, 3)[..., None]  # [B, K, G, t, 1]
        query_i = _row_block(query, i, static.queries)
        peak_i = None if peak is None else _block(peak, i, static.queries, 3)  # [B, K, G, t]

        def add(j: Any, carry):
            dq, dk, dv = carry
            kj, vj = (_block(x, j, static.keys, 2) for x in (k, v))
            key_j = _row_block(key, j, static.keys)
            w, slope, _ = _weights(static, qi, kj, query_i, key_j, peak_i)
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
