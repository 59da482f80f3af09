"""Keys and values while sampling: prompts in pages stored once, samples' own tokens by lane.

One layer's memory (pages of S = 4 tokens, rings of T = 4, the stash in blocks of C = 2):

    pages   v[D, P, K, S, h]     page 0: p0 p1 p2 p3     read by every lane whose prompt has it
                                 page 1: p4 .  .  .
    stash   v[D, B, K, C, h]     block 0: a0 a1          a lane's older tokens; it has as many
                                 block 1: a2 a3          blocks as it needs
    ring    v[D, N, K, T, h]     lane 0: a7 a4 a5 a6     each lane's newest tokens: all lanes write
                                 lane 1: b1 .  .  b0     the same slot each step

All lanes' rings are read at every step, so they are short, two chunks of decoding; between chunks
what lies further back is moved into the stash (`stash_oldest`). A short critique does not pay for
the longest one.

Keys are stored transposed ([h, slots]), the layout in which scores are computed.

Dimensions: D data-parallel shards, P pages, S page slots, R ranks, N lanes, M pages of a prompt,
T ring slots, B stash blocks, C tokens of a stash block, K key/value heads, G query heads per
key/value head, h head, E embed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Kind
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
    """Keys [D, N, K, h, T] and values [D, N, K, T, h] of the tokens drawn last for each block.

    `slot` is the scalar index that is written next.
    """

    blocks: tuple[Block, ...]
    slot: jax.Array

    @property
    def capacity(self) -> int:
        return self.blocks[0]["local"]["v"].shape[3]


class Stash(flax.struct.PyTreeNode):
    """Keys [D, B, K, h, C] and values [D, B, K, C, h] of tokens drawn earlier for each block."""

    blocks: tuple[Block, ...]

    @property
    def count(self) -> int:
        return self.blocks[0]["local"]["v"].shape[1]

    @property
    def size(self) -> int:
        return self.blocks[0]["local"]["v"].shape[3]


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


def empty_stash(
    config: ModelConfig, shards: int, count: int, size: int, *, int8: bool = False
) -> Stash:
    return Stash(_empty(config, (shards, count, config.num_kv_heads), size, int8))


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


def write_ring(ring: Ring, new: Sequence[Block]) -> Ring:
    """Store the keys and values [D, N, K, h] that the forward pass emitted, and move on."""

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        return {
            name: jax.lax.dynamic_update_index_in_dim(layer[name], value, ring.slot, _slots(name))
            for name, value in stored(one, layer).items()
        }

    return Ring(map_layers(write, ring.blocks, new), (ring.slot + 1) % ring.capacity)


def _slots(name: str) -> int:
    """The axis of slots."""
    return 4 if name == "k" else 3


def stash_oldest(stash: Stash, ring: Ring, held: jax.Array, targets: jax.Array) -> Stash:
    """Copy the oldest C tokens of each lane's ring into the stash.

    Args:
      held: [D, N] tokens a lane has in the ring.
      targets: [D, N] the block they go to; out of range for lanes that keep theirs.
    """
    index = (ring.slot - held[..., None] + jnp.arange(stash.size)) % ring.capacity  # [D, N, C]

    def move(layer: KeyValue, source: KeyValue) -> KeyValue:
        made = {}
        for name, array in source.items():
            shape = [1] * array.ndim
            shape[:2], shape[_slots(name)] = index.shape[:2], stash.size
            oldest = jnp.take_along_axis(array, index.reshape(shape), axis=_slots(name))
            made[name] = _put(layer[name], targets, oldest)
        return made

    return Stash(map_layers(move, stash.blocks, ring.blocks))


def grow_stash(stash: Stash, count: int) -> Stash:
    """The same blocks and free ones behind, `count` in all."""

    def grow(layer: KeyValue) -> KeyValue:
        more = (0, count - stash.count)
        return {
            name: jnp.pad(array, [more if axis == 1 else (0, 0) for axis in range(array.ndim)])
            for name, array in layer.items()
        }

    return Stash(map_layers(grow, stash.blocks))


def take_rows(blocks: Sequence[Block], index: jax.Array) -> tuple[Block, ...]:
    """Of each shard the lanes, or blocks of the stash, [D, rows]."""

    def take(layer: KeyValue) -> KeyValue:
        return {name: rows_of(array, index) for name, array in layer.items()}

    return map_layers(take, blocks)


def write_pages(pages: Pages, new: Sequence[Block], last: jax.Array, targets: jax.Array) -> Pages:
    """Store computed pages: new k, v [D, A, S, K, h] and last [D, A, E] in pages `targets` [D, A].

    Targets out of range are dropped.
    """

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        made = {name: jnp.moveaxis(value, 2, 3) for name, value in stored(one, layer).items()}
        made["k"] = made["k"].swapaxes(3, 4)
        return {name: _put(layer[name], targets, value) for name, value in made.items()}

    return Pages(map_layers(write, pages.blocks, new), _put(pages.last, targets, last))


def _put(array: jax.Array, targets: jax.Array, value: jax.Array) -> jax.Array:
    """array[d, targets[d]] = value[d] for each shard; targets out of range are dropped."""
    shard = jnp.arange(targets.shape[0])[:, None]
    return array.at[shard, targets].set(value.astype(array.dtype), mode="drop")


def rows_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[d, index[d]] for each shard: [D, X, ...], [D, ...] -> [D, ..., ...]."""
    return jax.vmap(lambda a, i: a.at[i].get(mode="promise_in_bounds"))(array, index)
