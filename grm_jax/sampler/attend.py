"""Attention while sampling: of pages being computed, and of one new token a lane.

A query attends to its prompt's pages, to its stash, to its ring and to itself (`cache` says what
lies where). The queries of all lanes that read a page meet its keys in one matrix product: they are
gathered into the grid [P, R] of ranks, and the results gathered back, a sum over a lane's pages.
The softcap bounds the scores, so weights need no running maximum and the parts add up to one exact
softmax (`attention.soft_weights`). Weights and totals are rounded, added up and divided as in
`chunked_attention`: in bfloat16, too, a rollout's attention is the trainer's.

What a query may see is decided by positions: a page says where it starts and how many tokens it
holds, the token written a steps ago lies a + 1 positions back (`visible` while a < count). So
padding, the sliding window, the ring's size and who shares what can not disturb each other.

Dimensions: as in `cache`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.attention import soft_weights, visible
from grm_jax.model.chunked_attention import normalise
from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Attend, Kind
from grm_jax.model.params import LAYER_KINDS
from grm_jax.sampler.cache import Pages, Ring, Stash, rows_of


@flax.struct.dataclass
class Layout:
    """Who reads what, made by the host for each chunk.

    Attributes:
      start, fill: [D, P] first position of a page, tokens in it.
      reader: [D, P * R] the lane at each rank of each page; any lane where there is none.
      cell: [D, N, M] page * R + rank of each of a lane's pages.
      used: [D, N, M] False where a lane has fewer pages.
      length: [D, N] prompt tokens of a lane. stashed: [D, N] those of its own tokens that are in
        the stash.
      owner: [D, B] whose tokens a block of the stash holds; of a free one, nobody's: -1.
      offset: [D, B] which of its owner's tokens is the block's first.
    """

    start: jax.Array
    fill: jax.Array
    reader: jax.Array
    cell: jax.Array
    used: jax.Array
    length: jax.Array
    stashed: jax.Array
    owner: jax.Array
    offset: jax.Array


def scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [lead, ..., slots] times scale [lead, slots]; x itself without one."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    return x * scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])


def page_attend(
    config: ModelConfig, start: jax.Array, fill: jax.Array, earlier: jax.Array | None, size: int
) -> Attend:
    """Attention of pages being computed over themselves and the prompt's earlier pages.

    The forward pass runs on [D * A, S].

    Args:
      start, fill: [D, A] first position and tokens of each page.
      earlier: [D, A, M] the M pages of the prompt that stand before each, the nearest last, or
        any page where the prompt has fewer; None if nothing is to be read but the page itself.
      size: S.
    """
    shards, count = start.shape
    offsets = jnp.arange(size)
    positions = (start[..., None] + offsets).reshape(-1, size)
    valid = (offsets < fill[..., None]).reshape(-1, size)
    masks: dict[str, Any] = {}
    reached: dict[str, jax.Array] = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        own = visible(positions, positions, window=window, key_valid=valid)[:, None, None]
        before = None
        if earlier is not None:
            # A window reaches over window - 1 tokens: farther pages are not even read.
            most = earlier.shape[2] if window is None else -(-(window - 1) // size)
            reached[kind] = earlier[:, :, max(0, earlier.shape[2] - most) :]
            slots = jnp.arange(-reached[kind].shape[2] * size, 0)
            places = start.reshape(-1, 1) + slots
            before = visible(positions, places, window=window, key_valid=places >= 0)
            before = before[:, None, None]
        masks[kind] = own, before
    dtype = jnp.dtype(config.compute_dtype)
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap, dtype=dtype)

    def attend(q, k, v, kind, layer_input):
        own, before = masks[kind]
        f32 = jnp.float32
        e = weigh(jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=f32), own)
        total = jnp.sum(e, axis=-1, dtype=f32)
        out = jnp.einsum("bkgts,bskh->btkgh", e, v, preferred_element_type=f32)
        if earlier is not None:
            kv, read = layer_input["pages"], reached[kind]
            found = {
                name: rows_of(array, read).reshape(-1, *read.shape[2:], *array.shape[2:])
                for name, array in kv.items()
            }
            # Pages one after the other: keys [B, K, h, M * S], values [B, K, M * S, h].
            keys = jnp.moveaxis(found.pop("k"), 1, 3).astype(q.dtype)
            keys = keys.reshape(*keys.shape[:3], -1)
            values = jnp.moveaxis(found.pop("v"), 1, 2).astype(v.dtype)
            values = values.reshape(*values.shape[:2], -1, values.shape[-1])
            scales = {
                name: jnp.moveaxis(array, 1, 2).reshape(*keys.shape[:2], -1)
                for name, array in found.items()
            }
            raw = jnp.einsum("btkgh,bkhs->bkgts", q, keys, preferred_element_type=f32)
            e = weigh(scaled(raw, scales.get("k_scale")), before)
            total += jnp.sum(e, axis=-1, dtype=f32)
            e = scaled(e, scales.get("v_scale")).astype(v.dtype)
            out += jnp.einsum("bkgts,bksh->btkgh", e, values, preferred_element_type=f32)
        out = normalise((out, jnp.moveaxis(total, 3, 1)), q.dtype)
        rows = (shards, count)
        emitted = {"k": k.reshape(*rows, *k.shape[1:]), "v": v.reshape(*rows, *v.shape[1:])}
        return out, emitted

    return attend


def lane_attend(
    config: ModelConfig,
    layout: Layout,
    counts: jax.Array,
    pages: Pages,
    stash: Stash,
    ring: Ring,
) -> Attend:
    """Attention of one new token a lane over pages, stash, ring and itself; runs on [D, N].

    Args:
      counts: [D, N] tokens of each lane that are in stash and ring (the new one is not).
    """
    shards, count = layout.start.shape
    ranks, size = layout.reader.shape[1] // count, pages.size
    position = layout.length + counts  # [D, N]
    reading = rows_of(position, layout.reader).reshape(shards * count, ranks)
    slots = layout.start.reshape(-1, 1) + jnp.arange(size)
    filled = jnp.arange(size) < layout.fill.reshape(-1, 1)
    # The token in a slot was written `age` steps before the last one.
    age = (ring.slot - 1 - jnp.arange(ring.capacity)) % ring.capacity
    held = counts - layout.stashed
    owner = jnp.maximum(layout.owner, 0)
    asking = rows_of(position, owner).reshape(-1, 1)
    drawn = (rows_of(layout.length, owner) + layout.offset).reshape(-1, 1)
    drawn = drawn + jnp.arange(stash.size)
    owned = jnp.broadcast_to(layout.owner.reshape(-1, 1) >= 0, drawn.shape)
    mine = (layout.owner[:, None] == jnp.arange(counts.shape[1])[:, None]).astype(jnp.float32)
    masks = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        in_page = visible(reading, slots, window=window, key_valid=filled)
        in_stash = visible(asking, drawn, window=window, key_valid=owned)
        in_ring = age < held[..., None]
        if window is not None:
            in_ring &= age + 1 < window
        masks[kind] = (
            in_page.reshape(shards, count, 1, ranks, 1, size),
            in_stash.reshape(*layout.owner.shape, 1, 1, stash.size),
            in_ring[:, :, None, None, :],
        )
    dtype = jnp.dtype(config.compute_dtype)
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap, dtype=dtype)
    single = layout.cell.shape[2] == 1

    def add_up(part: jax.Array) -> jax.Array:
        """Sums over each lane's blocks of the stash: [D, B, ...] -> [D, N, ...]."""
        return jnp.einsum("dnb,db...->dn...", mine, part, precision=jax.lax.Precision.HIGHEST)

    def attend(q, k, v, kind, layer_input):
        prompt, own_ring = layer_input["pages"], layer_input["ring"]
        page_mask, stash_mask, ring_mask = masks[kind]
        f32 = jnp.float32
        asked = rows_of(q, layout.reader).reshape(shards, count, ranks, *q.shape[2:])
        keys, values = prompt["k"].astype(q.dtype), prompt["v"].astype(v.dtype)
        raw = jnp.einsum("dprkgh,dpkhs->dpkrgs", asked, keys, preferred_element_type=f32)
        e = weigh(scaled(raw, prompt.get("k_scale")), page_mask)
        weight = jnp.sum(e, axis=-1, dtype=f32).swapaxes(2, 3)  # [D, P, R, K, G]
        e = scaled(e, prompt.get("v_scale")).astype(v.dtype)
        part = jnp.einsum("dpkrgs,dpksh->dpkrgh", e, values, preferred_element_type=f32)
        part = part.swapaxes(2, 3)
        part = rows_of(part.reshape(shards, count * ranks, *q.shape[2:]), layout.cell)
        weight = rows_of(weight.reshape(shards, count * ranks, *q.shape[2:4]), layout.cell)
        if single:
            out, total = part[:, :, 0], weight[:, :, 0]
        else:
            used = layout.used[..., None, None]
            out = jnp.sum(jnp.where(used[..., None], part, 0.0), axis=2)
            total = jnp.sum(jnp.where(used, weight, 0.0), axis=2)
        if stash.count:
            older = layer_input["stash"]
            keys, values = older["k"].astype(q.dtype), older["v"].astype(v.dtype)
            asked = rows_of(q, owner)
            raw = jnp.einsum("dbkgh,dbkhc->dbkgc", asked, keys, preferred_element_type=f32)
            e = weigh(scaled(raw, older.get("k_scale")), stash_mask)
            total += add_up(jnp.sum(e, axis=-1, dtype=f32))
            e = scaled(e, older.get("v_scale")).astype(v.dtype)
            part = jnp.einsum("dbkgc,dbkch->dbkgh", e, values, preferred_element_type=f32)
            out += add_up(part)
        keys, values = own_ring["k"].astype(q.dtype), own_ring["v"].astype(v.dtype)
        raw = jnp.einsum("dnkgh,dnkht->dnkgt", q, keys, preferred_element_type=f32)
        e = weigh(scaled(raw, own_ring.get("k_scale")), ring_mask)
        total += jnp.sum(e, axis=-1, dtype=f32)
        e = scaled(e, own_ring.get("v_scale")).astype(v.dtype)
        out += jnp.einsum("dnkgt,dnkth->dnkgh", e, values, preferred_element_type=f32)
        e = weigh(jnp.einsum("dnkgh,dnkh->dnkg", q, k, preferred_element_type=f32), None)
        total += e
        out += e[..., None].astype(f32) * v[:, :, :, None, :]
        return normalise((out, total), q.dtype), {"k": k, "v": v}

    return attend


def layer_inputs(
    pages: Pages, stash: Stash | None = None, ring: Ring | None = None
) -> list[dict[Kind, Any]]:
    """What the attends above read, one entry a block."""
    nothing = [{}] * len(pages.blocks)
    stashes = stash.blocks if stash is not None else nothing
    rings = ring.blocks if ring is not None else nothing
    return [
        {
            kind: {"pages": p[kind], "stash": s.get(kind), "ring": r.get(kind)}
            for kind in LAYER_KINDS
        }
        for p, s, r in zip(pages.blocks, stashes, rings, strict=True)
    ]
