"""Keys and values while sampling: prompts in pages stored once, samples' own tokens in lanes.

One layer's memory (page of S = 4 tokens, ring of T = 4 tokens):

    pages   v[D, P, K, S, h]     page 0: p0 p1 p2 p3     read by every lane whose prompt has it
                                 page 1: p4 .  .  .
    lanes   v[D, N, K, T, h]     lane 0: a5 a6 a7 .      each lane's newest tokens, as a ring:
                                 lane 1: .  .  b5 .      all lanes write the same slot each step

A query attends to its pages, to its ring and to itself. The queries of all lanes that read a page
meet its keys in one matrix product: they are gathered into the grid [P, R] of ranks, and the
results gathered back, a sum over a lane's pages. The softcap bounds the scores, so weights need no
running maximum and the parts add up to one exact softmax (`attention.soft_weights`).

What a query may see is decided by positions: a page says where it starts and how many tokens it
holds, the token written a steps ago lies a + 1 positions back (`visible` while a < count). So
padding, the sliding window, the ring's size and who shares what can not disturb each other.

The caches are only read inside the forward pass; new keys and values come out of it and are written
in place. Keys are stored transposed ([h, slots]), the layout in which scores are computed.

Dimensions: D data-parallel shards, P pages, S page slots, R ranks, N lanes, M pages of a prompt,
T ring slots, K key/value heads, G query heads per key/value head, h head, E embed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.attention import soft_weights, visible
from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Attend, Kind
from grm_jax.model.params import LAYER_KINDS

# One layer's {"k": ..., "v": ...}; a block's {"local": KeyValue, "global": KeyValue}. As 8-bit
# integers, with float32 scales, one a vector: {"k_scale": [..., slots], "v_scale": [..., slots]}.
KeyValue = dict[str, jax.Array]
Block = dict[Kind, KeyValue]


@flax.struct.dataclass
class Pages:
    """Keys [D, P, K, h, S] and values [D, P, K, S, h] of prompts for each block; `last` [D, P, E]
    is the final hidden state of the last token in each page."""

    blocks: tuple[Block, ...]
    last: jax.Array

    @property
    def size(self) -> int:
        return self.blocks[0]["local"]["v"].shape[3]


class Ring(flax.struct.PyTreeNode):
    """Keys [D, N, K, h, T] and values [D, N, K, T, h] of drawn tokens for each block.

    `slot` is the scalar index that is written next.
    """

    blocks: tuple[Block, ...]
    slot: jax.Array

    @property
    def capacity(self) -> int:
        return self.blocks[0]["local"]["v"].shape[3]


@flax.struct.dataclass
class Layout:
    """Who reads what, made by the host for each chunk.

    Attributes:
      start, fill: [D, P] first position of a page, tokens in it.
      reader: [D, P * R] the lane at each rank of each page; any lane where there is none.
      cell: [D, N, M] page * R + rank of each of a lane's pages.
      used: [D, N, M] False where a lane has fewer pages.
      length: [D, N] prompt tokens of a lane.
    """

    start: jax.Array
    fill: jax.Array
    reader: jax.Array
    cell: jax.Array
    used: jax.Array
    length: jax.Array


def empty_pages(
    config: ModelConfig, shards: int, pages: int, size: int, *, int8: bool = False
) -> Pages:
    blocks = _empty(config, (shards, pages, config.num_kv_heads), size, int8)
    dtype = jnp.dtype(config.compute_dtype)
    return Pages(blocks, jnp.zeros((shards, pages, config.embed_dim), dtype))


def empty_ring(
    config: ModelConfig, shards: int, lanes: int, capacity: int, *, int8: bool = False
) -> Ring:
    blocks = _empty(config, (shards, lanes, config.num_kv_heads), capacity, int8)
    return Ring(blocks, jnp.zeros((), jnp.int32))


def _empty(config: ModelConfig, rows: tuple[int, ...], slots: int, int8: bool) -> tuple[Block, ...]:
    dtype = jnp.int8 if int8 else jnp.dtype(config.compute_dtype)

    def layer() -> KeyValue:
        made = {
            "k": jnp.zeros((*rows, config.head_dim, slots), dtype),
            "v": jnp.zeros((*rows, slots, config.head_dim), dtype),
        }
        if int8:
            made |= {name: jnp.zeros((*rows, slots)) for name in ("k_scale", "v_scale")}
        return made

    return tuple({kind: layer() for kind in LAYER_KINDS} for _ in range(config.num_blocks))


def map_layers(update: Callable[..., KeyValue], *blocks: Sequence[Block]) -> tuple[Block, ...]:
    """update(layer of each argument) for every layer."""
    return tuple(
        {kind: update(*(block[kind] for block in zipped)) for kind in LAYER_KINDS}
        for zipped in zip(*blocks, strict=True)
    )


def stored(new: KeyValue, like: KeyValue) -> KeyValue:
    """New keys and values [..., h] as `like` stores them: 8-bit integers get scales [...]."""
    if "k_scale" not in like:
        return new
    made = {}
    for name in ("k", "v"):
        x = new[name].astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / 127
        made[name] = jnp.round(x / scale[..., None]).astype(jnp.int8)
        made[f"{name}_scale"] = scale
    return made


def scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [lead, ..., slots] times scale [lead, slots]; x itself without one."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    return x * scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])


def resize_ring(ring: Ring, capacity: int) -> Ring:
    """The newest `capacity` tokens of each lane, in a ring of that size."""
    old = ring.capacity
    kept = min(old, capacity)
    index = (ring.slot - kept + jnp.arange(kept)) % old  # oldest kept ... newest
    more = capacity - kept

    def resize(layer: KeyValue) -> KeyValue:
        made = {}
        for name, array in layer.items():
            axis = 4 if name == "k" else 3
            room = [(0, more if i == axis else 0) for i in range(array.ndim)]
            made[name] = jnp.pad(jnp.take(array, index, axis=axis), room)
        return made

    slot = jnp.asarray(kept % capacity, jnp.int32)
    return Ring(map_layers(resize, ring.blocks), slot)


def write_ring(ring: Ring, new: Sequence[Block]) -> Ring:
    """Store the keys and values [D, N, K, h] that the forward pass emitted, and move on."""

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        made = {}
        for name, value in stored(one, layer).items():
            axis = 4 if name == "k" else 3
            made[name] = jax.lax.dynamic_update_slice_in_dim(
                layer[name], jnp.expand_dims(value, axis), ring.slot, axis
            )
        return made

    return Ring(map_layers(write, ring.blocks, new), (ring.slot + 1) % ring.capacity)


def write_pages(pages: Pages, new: Sequence[Block], last: jax.Array, targets: jax.Array) -> Pages:
    """Store computed pages: new k, v [D, A, S, K, h] and last [D, A, E] in pages `targets` [D, A].

    Targets out of range are dropped.
    """
    shard = jnp.arange(targets.shape[0])[:, None]

    def put(array: jax.Array, value: jax.Array) -> jax.Array:
        return array.at[shard, targets].set(value.astype(array.dtype), mode="drop")

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        made = {name: jnp.moveaxis(value, 2, 3) for name, value in stored(one, layer).items()}
        made["k"] = made["k"].swapaxes(3, 4)
        return {name: put(layer[name], value) for name, value in made.items()}

    return Pages(map_layers(write, pages.blocks, new), put(pages.last, last))


def rows_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[d, index[d]] for each shard: [D, X, ...], [D, ...] -> [D, ..., ...]."""
    return jax.vmap(lambda a, i: a.at[i].get(mode="promise_in_bounds"))(array, index)


def page_attend(
    config: ModelConfig, start: jax.Array, fill: jax.Array, earlier: jax.Array | None, size: int
) -> Attend:
    """Attention of pages being computed over themselves and the prompt's earlier pages.

    The forward pass runs on [D * A, S].

    Args:
      start, fill: [D, A] first position and tokens of each page.
      earlier: [D, A, M] the prompt's pages by place (those before `start` are read); None if no
        page has one.
      size: S.
    """
    shards, count = start.shape
    offsets = jnp.arange(size)
    positions = (start[..., None] + offsets).reshape(-1, size)
    valid = (offsets < fill[..., None]).reshape(-1, size)
    masks: dict[str, Any] = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        own = visible(positions, positions, window=window, key_valid=valid)[:, None, None]
        before = None
        if earlier is not None:
            places = jnp.broadcast_to(
                jnp.arange(earlier.shape[2] * size), (shards * count, earlier.shape[2] * size)
            )
            complete = places < start.reshape(-1, 1)  # earlier pages are full
            before = visible(positions, places, window=window, key_valid=complete)[:, None, None]
        masks[kind] = own, before
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap)

    def attend(q, k, v, kind, layer_input):
        own, before = masks[kind]
        f32 = jnp.float32
        e = weigh(jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=f32), own)
        total = jnp.sum(e, axis=-1)
        out = jnp.einsum("bkgts,bskh->btkgh", e.astype(v.dtype), v, preferred_element_type=f32)
        if earlier is not None:
            kv = layer_input["pages"]
            found = {
                name: rows_of(array, earlier).reshape(-1, *earlier.shape[2:], *array.shape[2:])
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
            total += jnp.sum(e, axis=-1)
            e = scaled(e, scales.get("v_scale")).astype(v.dtype)
            out += jnp.einsum("bkgts,bksh->btkgh", e, values, preferred_element_type=f32)
        # Padding sees nothing at all in a local layer: 0 / 0 would be NaN.
        out = out / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
        rows = (shards, count)
        emitted = {"k": k.reshape(*rows, *k.shape[1:]), "v": v.reshape(*rows, *v.shape[1:])}
        return out.astype(q.dtype), emitted

    return attend


def lane_attend(
    config: ModelConfig, layout: Layout, counts: jax.Array, ring: Ring, size: int
) -> Attend:
    """Attention of one new token a lane over pages, ring and itself; runs on [D, N].

    Args:
      counts: [D, N] tokens of each lane that are in the ring (the new one is not).
      size: S.
    """
    shards, pages = layout.start.shape
    ranks = layout.reader.shape[1] // pages
    capacity = ring.capacity
    position = layout.length + counts  # [D, N]
    reading = rows_of(position, layout.reader).reshape(shards * pages, ranks)
    slots = layout.start.reshape(-1, 1) + jnp.arange(size)
    filled = jnp.arange(size) < layout.fill.reshape(-1, 1)
    # The token in a slot was written `age` steps before the last one.
    age = (ring.slot - 1 - jnp.arange(capacity)) % capacity
    masks = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        in_page = visible(reading, slots, window=window, key_valid=filled)
        in_ring = age < counts[..., None]
        if window is not None:
            in_ring &= age + 1 < window
        masks[kind] = (
            in_page.reshape(shards, pages, 1, ranks, 1, size),
            in_ring[:, :, None, None, :],
        )
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap)
    single = layout.cell.shape[2] == 1

    def attend(q, k, v, kind, layer_input):
        prompt, own_ring = layer_input["pages"], layer_input["ring"]
        page_mask, ring_mask = masks[kind]
        f32 = jnp.float32
        asked = rows_of(q, layout.reader).reshape(shards, pages, ranks, *q.shape[2:])
        keys, values = prompt["k"].astype(q.dtype), prompt["v"].astype(v.dtype)
        raw = jnp.einsum("dprkgh,dpkhs->dpkrgs", asked, keys, preferred_element_type=f32)
        e = weigh(scaled(raw, prompt.get("k_scale")), page_mask)
        weight = jnp.sum(e, axis=-1).swapaxes(2, 3)  # [D, P, R, K, G]
        e = scaled(e, prompt.get("v_scale")).astype(v.dtype)
        part = jnp.einsum("dpkrgs,dpksh->dprkgh", e, values, preferred_element_type=f32)
        part = rows_of(part.reshape(shards, pages * ranks, *q.shape[2:]), layout.cell)
        weight = rows_of(weight.reshape(shards, pages * ranks, *q.shape[2:4]), layout.cell)
        if single:
            out, total = part[:, :, 0], weight[:, :, 0]
        else:
            used = layout.used[..., None, None]
            out = jnp.sum(jnp.where(used[..., None], part, 0.0), axis=2)
            total = jnp.sum(jnp.where(used, weight, 0.0), axis=2)
        keys, values = own_ring["k"].astype(q.dtype), own_ring["v"].astype(v.dtype)
        raw = jnp.einsum("dnkgh,dnkht->dnkgt", q, keys, preferred_element_type=f32)
        e = weigh(scaled(raw, own_ring.get("k_scale")), ring_mask)
        total += jnp.sum(e, axis=-1)
        e = scaled(e, own_ring.get("v_scale")).astype(v.dtype)
        out += jnp.einsum("dnkgt,dnkth->dnkgh", e, values, preferred_element_type=f32)
        e = weigh(jnp.einsum("dnkgh,dnkh->dnkg", q, k, preferred_element_type=f32), None)
        total += e
        out += e[..., None] * v[:, :, :, None, :]
        return (out / total[..., None]).astype(q.dtype), {"k": k, "v": v}

    return attend


def layer_inputs(pages: Pages, ring: Ring | None = None) -> list[dict[Kind, Any]]:
    """What the attends above read, one entry a block."""
    rings = ring.blocks if ring is not None else [{}] * len(pages.blocks)
    return [
        {kind: {"pages": p[kind], "ring": r.get(kind)} for kind in LAYER_KINDS}
        for p, r in zip(pages.blocks, rings, strict=True)
    ]
