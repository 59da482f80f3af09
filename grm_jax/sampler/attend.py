"""Attention while sampling: in prefill of pages, and in decoding of one new token of each lane.

A query attends to the pages of its prompt, to its lane's stash and ring, and to itself (`cache`
draws what these hold). The queries of all lanes that read a page are multiplied with its keys in
one matrix product: they are gathered into a grid [P, R] of pages and readers, and the results are
gathered back and summed over the pages of each lane. Each part (pages, stash, ring, itself) is a
triple of sums: numerator, total, and, for models without a softcap, the peak of its scores
(`softmax_sums`). The parts are brought to a common peak and add up to one exact softmax. Weights
and totals are rounded, added up and divided as in `chunked_attention`: in bfloat16, too, the
attention of a rollout is that of the trainer.

Positions decide what a query may see. A page has the position of its first token and the number of
its tokens; so has a block of the stash. The token that was written to the ring `age` steps before
the last one lies age + 1 positions before the new token. The example of `cache`, after a2 a3 were
moved to block 1: the new token of lane 0 is a6, at position 12, and the window is 8. 1 is visible:

               page 0        page 1        block 0  block 1  ring          itself
    token      p0 p1 p2 p3   p4 p5 .  .    a0 a1    a2 a3    a4 a5 a2 a3   a6
    position    0  1  2  3    4  5 .  .     6  7     8  9    10 11 .  .    12
    age                                                       1  0  3  2
    global      1  1  1  1    1  1  0  0    1  1     1  1     1  1  0  0    1
    local       0  0  0  0    0  1  0  0    1  1     1  1     1  1  0  0    1

Of the ring, lane 0 sees the 2 newest tokens, since 4 of its 6 are in the stash; the copies of a2 a3
in slots 2 and 3 are old.

Dimensions: as in `cache`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.attention import visible
from grm_jax.model.config import ModelConfig
from grm_jax.model.softmax_sums import (
    LOWEST,
    Sums,
    normalise,
    power_of_two,
    soft_weights,
    together,
)
from grm_jax.model.transformer import Attend
from grm_jax.sampler.cache import Pages, Ring, Stash, as_numbers, rows_of


@flax.struct.dataclass
class Layout:
    """Which lane reads which pages and blocks; the host makes it for each chunk.

    Attributes:
      start, fill: [D, P] the position of each page's first token, and the number of its tokens.
      reader: [D, P * R] the lanes that read each page, R of them; any lane where there are fewer.
      cell: [D, N, M] where each lane stands in `reader`, for each page of its prompt.
      used: [D, N, M] False where a lane's prompt has fewer pages.
      length: [D, N] the number of prompt tokens of each lane.
      stashed: [D, N] how many of each lane's drawn tokens are in the stash.
      owner: [D, B] the lane whose tokens each block of the stash holds; -1 for a free block.
      offset: [D, B] the index, among its owner's drawn tokens, of each block's first token.
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
    """x [lead, ..., slots] times scale [lead, slots]; x itself where the scale is None."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    return x * scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])


def _by_head(x: jax.Array, y: jax.Array) -> jax.Array:
    """The float32 products [b, K, G, t, n] of x [b, K, G, t, m] and y [b, K, m, n].

    As one batch of plain matrix products: XLA's CPU compiler has no program for some others in
    bfloat16, with several rows and heads whose dimensions are not next to each other.
    """
    rows, heads = y.shape[:2]
    flat = x.reshape(rows * heads, -1, x.shape[-1])
    out = jnp.matmul(
        flat, y.reshape(rows * heads, *y.shape[2:]), preferred_element_type=jnp.float32
    )
    return out.reshape(*x.shape[:-1], y.shape[-1])


def page_attend(
    config: ModelConfig, start: jax.Array, fill: jax.Array, earlier: jax.Array | None, size: int
) -> Attend:
    """Attention in prefill: pages being computed attend to themselves and to earlier pages.

    The forward pass runs on A pages of each shard, as rows [D * A, S].

    Args:
      start, fill: [D, A] the position of each page's first token, and the number of its tokens.
      earlier: [D, A, M] the M pages of the same prompt that stand before each page, the nearest
        last, or any page where the prompt has fewer; None where no page has an earlier one.
      size: S, the slots of a page.
    """
    shards, count = start.shape
    offsets = jnp.arange(size)
    positions = (start[..., None] + offsets).reshape(-1, size)  # [D * A, S]
    valid = (offsets < fill[..., None]).reshape(-1, size)  # [D * A, S]
    masks: dict[str, Any] = {}
    within_reach: dict[str, jax.Array] = {}
    for kind in config.kinds:
        window = config.window(kind)
        # [D * A, 1, 1, S, S], to broadcast over heads
        page_mask = visible(positions, positions, window=window, key_valid=valid)[:, None, None]
        earlier_mask = None
        if earlier is not None:
            # A window reaches back by window - 1 tokens: pages farther back are not even read.
            reach = earlier.shape[2] if window is None else -(-(window - 1) // size)
            within_reach[kind] = earlier[:, :, max(0, earlier.shape[2] - reach) :]
            slots = jnp.arange(-within_reach[kind].shape[2] * size, 0)
            key_pos = start.reshape(-1, 1) + slots  # [D * A, M * S]
            earlier_mask = visible(positions, key_pos, window=window, key_valid=key_pos >= 0)
            earlier_mask = earlier_mask[:, None, None]  # [D * A, 1, 1, S, M * S]
        masks[kind] = page_mask, earlier_mask
    dtype = jnp.dtype(config.compute_dtype)
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap, dtype=dtype)

    def attend(q, k, v, kind, layer_input):
        # With b = D * A rows of t = S tokens: q [b, t, K, G, h]; k, v [b, t, K, h].
        page_mask, earlier_mask = masks[kind]
        f32 = jnp.float32
        raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=f32)
        e, peak = weigh(raw, page_mask)
        total = jnp.sum(e, axis=-1, dtype=f32)  # [b, K, G, t], as the peak
        out = jnp.einsum("bkgts,bskh->btkgh", e, v, preferred_element_type=f32)
        sums = Sums(out, total, peak)
        if earlier is not None:
            kv, index = layer_input["pages"], within_reach[kind]
            gathered = {
                name: rows_of(array, index).reshape(-1, *index.shape[2:], *array.shape[2:])
                for name, array in kv.items()
            }  # [b, M, K, ...]
            gathered = as_numbers(gathered)
            # Join the M pages: keys [b, K, h, M * S], values [b, K, M * S, h], scales without h.
            keys = jnp.moveaxis(gathered.pop("k"), 1, 3).astype(q.dtype)
            keys = keys.reshape(*keys.shape[:3], -1)
            values = jnp.moveaxis(gathered.pop("v"), 1, 2).astype(v.dtype)
            values = values.reshape(*values.shape[:2], -1, values.shape[-1])
            scales = {
                name: jnp.moveaxis(array, 1, 2).reshape(*keys.shape[:2], -1)
                for name, array in gathered.items()
            }
            raw = _by_head(jnp.einsum("btkgh->bkgth", q), keys)
            raw = scaled(raw, scales.get("k_scale"))
            e, peak = weigh(raw, earlier_mask)  # [b, K, G, t, M * S]
            total = jnp.sum(e, axis=-1, dtype=f32)
            e = scaled(e, scales.get("v_scale")).astype(v.dtype)
            out = jnp.einsum("bkgth->btkgh", _by_head(e, values))
            sums = together(
                sums,
                Sums(out, total, peak),
                spread=lambda factor: jnp.moveaxis(factor, 3, 1)[..., None],
            )
        sums = Sums(sums.numerator, jnp.moveaxis(sums.total, 3, 1))
        out = normalise(sums, q.dtype)  # [b, t, K, G, h]
        rows = (shards, count)
        emitted = {"k": k.reshape(*rows, *k.shape[1:]), "v": v.reshape(*rows, *v.shape[1:])}
        return out, emitted  # emitted k, v: [D, A, S, K, h]

    return attend


def lane_attend(
    config: ModelConfig,
    layout: Layout,
    counts: jax.Array,
    pages: Pages,
    stash: Stash,
    ring: Ring,
    *,
    grid: bool = False,
) -> Attend:
    """Attention in decoding: one new token of each lane attends to pages, stash, ring and itself.

    The forward pass runs on [D, N].

    Args:
      counts: [D, N] how many tokens of each lane are in stash and ring (the new one is not).
      grid: each lane has B / N blocks of the stash to itself, those from n * B / N on, in the order
        of its tokens. What is added up for a lane, and in which order, then does not depend on
        the other lanes.
    """
    shards, count = layout.start.shape  # D, P
    readers, size = layout.reader.shape[1] // count, pages.size  # R, S
    position = layout.length + counts  # [D, N]
    reader_pos = rows_of(position, layout.reader).reshape(shards * count, readers)  # [D * P, R]
    page_pos = layout.start.reshape(-1, 1) + jnp.arange(size)  # [D * P, S]
    filled = jnp.arange(size) < layout.fill.reshape(-1, 1)  # [D * P, S]
    # The token in a slot was written `age` steps before the last one.
    age = (ring.slot - 1 - jnp.arange(ring.capacity)) % ring.capacity  # [T]
    held = counts - layout.stashed  # [D, N]
    owner = jnp.maximum(layout.owner, 0)  # [D, B]
    owner_pos = rows_of(position, owner).reshape(-1, 1)  # [D * B, 1]
    block_pos = (rows_of(layout.length, owner) + layout.offset).reshape(-1, 1)
    block_pos = block_pos + jnp.arange(stash.size)  # [D * B, C]
    in_use = jnp.broadcast_to(layout.owner.reshape(-1, 1) >= 0, block_pos.shape)
    lanes = jnp.arange(counts.shape[1])
    # [D, N, B]: 1 where the lane owns the block
    ownership = (layout.owner[:, None] == lanes[:, None]).astype(jnp.float32)
    masks = {}
    for kind in config.kinds:
        window = config.window(kind)
        in_page = visible(reader_pos, page_pos, window=window, key_valid=filled)  # [D * P, R, S]
        in_stash = visible(owner_pos, block_pos, window=window, key_valid=in_use)  # [D * B, 1, C]
        in_ring = age < held[..., None]  # [D, N, T]
        if window is not None:
            in_ring &= age + 1 < window
        masks[kind] = (
            in_page.reshape(shards, count, 1, readers, 1, size),
            in_stash.reshape(*layout.owner.shape, 1, 1, stash.size),
            in_ring[:, :, None, None, :],
        )
    dtype, f32 = jnp.dtype(config.compute_dtype), jnp.float32
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap, dtype=dtype)
    single = layout.cell.shape[2] == 1  # every prompt has one page

    def add_up(part: jax.Array) -> jax.Array:
        """Sums over the blocks of the stash that each lane owns: [D, B, ...] -> [D, N, ...]."""
        if grid:  # blocks that are not in use are masked, so 0
            return jnp.sum(part.reshape(*counts.shape, -1, *part.shape[2:]), axis=2)
        return jnp.einsum("dnb,db...->dn...", ownership, part, precision=jax.lax.Precision.HIGHEST)

    def highest(peak: jax.Array) -> jax.Array:
        """The highest peak of the blocks that each lane owns: [D, B, K, G] -> [D, N, K, G]."""
        if grid:
            return jnp.max(peak.reshape(*counts.shape, -1, *peak.shape[2:]), axis=2)
        owned = ownership[..., None, None] > 0
        return jnp.max(peak[:, None], axis=2, where=owned, initial=LOWEST)

    # Each of the following returns sums: a numerator [D, N, K, G, h], and [D, N, K, G] a total and,
    # without a softcap, a peak.

    @jax.named_scope("pages")
    def over_pages(q, kv, v_dtype, mask) -> Sums:
        """The sums over the pages of each lane's prompt."""
        queries = rows_of(q, layout.reader).reshape(shards, count, readers, *q.shape[2:])
        keys, values = kv["k"].astype(q.dtype), kv["v"].astype(v_dtype)
        raw = jnp.einsum("dprkgh,dpkhs->dpkrgs", queries, keys, preferred_element_type=f32)
        e, peak = weigh(scaled(raw, kv.get("k_scale")), mask)  # [D, P, K, R, G, S]
        weight = jnp.sum(e, axis=-1, dtype=f32).swapaxes(2, 3)  # [D, P, R, K, G]
        e = scaled(e, kv.get("v_scale")).astype(v_dtype)
        part = jnp.einsum("dpkrgs,dpksh->dpkrgh", e, values, preferred_element_type=f32)
        part = part.swapaxes(2, 3)  # [D, P, R, K, G, h]
        # From the grid of pages and readers back to lanes: [D, N, M, K, G, h], [D, N, M, K, G]
        part = rows_of(part.reshape(shards, count * readers, *q.shape[2:]), layout.cell)
        weight = rows_of(weight.reshape(shards, count * readers, *q.shape[2:4]), layout.cell)
        if peak is not None:
            peak = peak.swapaxes(2, 3).reshape(shards, count * readers, *q.shape[2:4])
            peak = rows_of(peak, layout.cell)
        if single:
            return Sums(part[:, :, 0], weight[:, :, 0], None if peak is None else peak[:, :, 0])
        used = layout.used[..., None, None]  # [D, N, M, 1, 1]
        if peak is not None:
            own = jnp.where(used, peak, LOWEST)
            peak = jnp.max(own, axis=2)
            factor = power_of_two(own - peak[:, :, None])
            part, weight = part * factor[..., None], weight * factor
        out = jnp.sum(jnp.where(used[..., None], part, 0.0), axis=2)
        return Sums(out, jnp.sum(jnp.where(used, weight, 0.0), axis=2), peak)

    @jax.named_scope("stash")
    def over_stash(q, kv, v_dtype, mask) -> Sums:
        """The sums over the stash blocks of each lane."""
        queries = rows_of(q, owner)  # [D, B, K, G, h]
        keys, values = kv["k"].astype(q.dtype), kv["v"].astype(v_dtype)
        raw = jnp.einsum("dbkgh,dbkhc->dbkgc", queries, keys, preferred_element_type=f32)
        e, peak = weigh(scaled(raw, kv.get("k_scale")), mask)  # [D, B, K, G, C]
        weight = jnp.sum(e, axis=-1, dtype=f32)  # [D, B, K, G]
        e = scaled(e, kv.get("v_scale")).astype(v_dtype)
        part = jnp.einsum("dbkgc,dbkch->dbkgh", e, values, preferred_element_type=f32)
        if peak is not None:
            own, peak = peak, highest(peak)
            factor = power_of_two(own - rows_of(peak, owner))
            part, weight = part * factor[..., None], weight * factor
        return Sums(add_up(part), add_up(weight), peak)

    @jax.named_scope("ring")
    def over_ring(q, kv, v_dtype, mask) -> Sums:
        """The sums over the ring of each lane."""
        keys, values = kv["k"], kv["v"]
        if "k_scale" in kv:
            keys, values = keys.astype(q.dtype), values.astype(v_dtype)
        # In the ring's own dtype: of bfloat16 numbers, products in float32 are the same.
        q = q.astype(keys.dtype)
        raw = jnp.einsum("dnkgh,dnkht->dnkgt", q, keys, preferred_element_type=f32)
        e, peak = weigh(scaled(raw, kv.get("k_scale")), mask)  # [D, N, K, G, T]
        total = jnp.sum(e, axis=-1, dtype=f32)
        e = scaled(e, kv.get("v_scale")).astype(v_dtype).astype(values.dtype)
        out = jnp.einsum("dnkgt,dnkth->dnkgh", e, values, preferred_element_type=f32)
        return Sums(out, total, peak)

    @jax.named_scope("itself")
    def over_itself(q, k, v) -> Sums:
        """The sums over the new token itself."""
        raw = jnp.einsum("dnkgh,dnkh->dnkg", q, k, preferred_element_type=f32)
        e, peak = weigh(raw, None, axis=())
        return Sums(e[..., None].astype(f32) * v[:, :, :, None, :], e, peak)

    def attend(q, k, v, kind, layer_input):
        # q [D, N, K, G, h]; k, v [D, N, K, h]: one token of each lane.
        page_mask, stash_mask, ring_mask = masks[kind]
        parts = [over_pages(q, layer_input["pages"], v.dtype, page_mask)]
        if stash.count:
            parts.append(over_stash(q, layer_input["stash"], v.dtype, stash_mask))
        parts.append(over_ring(q, layer_input["ring"], v.dtype, ring_mask))
        parts.append(over_itself(q, k, v))
        return normalise(together(*parts), q.dtype), {"k": k, "v": v}

    return attend


def layer_inputs(
    pages: Pages, stash: Stash | None = None, ring: Ring | None = None
) -> list[dict[str, Any]]:
    """What the functions above read in each layer, one entry a block, for `transformer.forward`."""
    no_blocks = [{}] * len(pages.blocks)
    stashes = stash.blocks if stash is not None else no_blocks
    rings = ring.blocks if ring is not None else no_blocks
    return [
        {slot: {"pages": p[slot], "stash": s.get(slot), "ring": r.get(slot)} for slot in p}
        for p, s, r in zip(pages.blocks, stashes, rings, strict=True)
    ]
