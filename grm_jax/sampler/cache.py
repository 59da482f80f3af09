"""Keys and values while sampling: prompts in pages that are stored once, new tokens by lane.

An example: two prompts, p of 6 tokens and q of 7, which begin with the same 4. Samples a and b are
drawn from p, sample c from q. Pages have S = 4 slots, rings T = 4; a chunk is C = 2 steps, and so
is a block of the stash. After 6 steps, one layer of one shard holds:

    pages [P, K, S, h]                   read by
      page 0    p0  p1  p2  p3           lanes 0, 1 and 2: both prompts begin with these tokens
      page 1    p4  p5  .   .            lanes 0 and 1
      page 2    q4  q5  q6  .            lane 2

    ring [N, K, T, h]
      slot      0   1   2   3
      lane 0    a4  a5  a2  a3           sample a, which began at step 0
      lane 1    b0  b1  .   .            sample b, which began at step 4
      lane 2    c2  c3  c0  c1           sample c, which began at step 2
                        ^ all lanes write this slot at the next step

    stash [B, K, C, h]
      block 0   a0  a1                   owned by lane 0: moved here before slots 0 and 1 were
      block 1   .   .                    written again, at steps 4 and 5
      block 2   .   .

The next chunk writes slots 2 and 3. So a2 a3 are moved to block 1 before it, and c0 c1 to block 2
(`stash_oldest`); b loses nothing. `attend` draws what the next token of sample a sees.

Every step reads the whole ring of every lane, which is therefore short, two chunks; older tokens
lie in the stash, where a lane has only as many blocks as it needs. So the memory and time that a
short critique takes do not depend on the longest one.

Keys are stored transposed ([h, slots]), the layout in which scores are computed.

Dimensions: D data-parallel shards, P pages, S slots of a page, R readers of a page, N lanes, M
pages of a prompt, A pages computed at once, T slots of a ring, B blocks of the stash, C tokens of a
block, K key/value heads, G query heads per key/value head, h size of a head, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.residuals import bits_of, numbers_of

# A layer has {"k": ..., "v": ...}. Where these are 8-bit integers, it also has a float32 scale for
# each vector: {"k_scale": [..., slots], "v_scale": [..., slots]}. A block of the model has that of
# each of its layers, by the layer's slot in the block ("local" and "global" in Gemma-2).
KeyValue = dict[str, jax.Array]
Block = dict[str, KeyValue]


@flax.struct.dataclass
class Pages:
    """The pages of prompts.

    Attributes:
      blocks: for each block of the model, keys [D, P, K, h, S] and values [D, P, K, S, h].
      last: [D, P, E] the final hidden state of the last token in each page.
    """

    blocks: tuple[Block, ...]
    last: jax.Array

    @property
    def size(self) -> int:
        """S, the slots of a page."""
        return _any_layer(self.blocks)["v"].shape[3]


class Ring(flax.struct.PyTreeNode):
    """The newest tokens of each lane.

    Attributes:
      blocks: for each block of the model, keys [D, N, K, h, T] and values [D, N, K, T, h].
      slot: a scalar, the slot that all lanes write next.
    """

    blocks: tuple[Block, ...]
    slot: jax.Array

    @property
    def capacity(self) -> int:
        """T, the slots of a ring."""
        return _any_layer(self.blocks)["v"].shape[3]


class Stash(flax.struct.PyTreeNode):
    """The older tokens of lanes, in blocks of the stash, each of which belongs to one lane.

    Attributes:
      blocks: for each block of the model, keys [D, B, K, h, C] and values [D, B, K, C, h].
    """

    blocks: tuple[Block, ...]

    @property
    def count(self) -> int:
        """B, the blocks of the stash in a shard."""
        return _any_layer(self.blocks)["v"].shape[1]

    @property
    def size(self) -> int:
        """C, the tokens of a block of the stash."""
        return _any_layer(self.blocks)["v"].shape[3]


def empty_pages(
    config: ModelConfig,
    shards: int,
    pages: int,
    size: int,
    *,
    int8: bool = False,
    on_cpu: bool = False,
) -> Pages:
    """Pages of `size` slots, `pages` of them in each shard.

    Args:
      on_cpu: keep the bits of bfloat16 numbers as uint16, which `as_numbers` reads. XLA's CPU
        compiler writes to an array of bfloat16 by converting all of it to float32 and back, and
        prefill writes a few of many pages.
    """
    blocks = _empty(config, (shards, pages, config.num_kv_heads), size, int8)
    dtype = jnp.dtype(config.compute_dtype)
    last = jnp.zeros((shards, pages, config.embed_dim), dtype)
    if on_cpu and dtype == jnp.bfloat16 and not int8:
        blocks = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint16), blocks)
    return Pages(blocks, last)


def empty_ring(
    config: ModelConfig,
    shards: int,
    lanes: int,
    capacity: int,
    *,
    int8: bool = False,
    on_cpu: bool = False,
) -> Ring:
    """Rings of `capacity` slots for the lanes of each shard.

    Args:
      on_cpu: keep bfloat16 numbers as float32. Every step writes one slot, and XLA's CPU compiler
        writes to an array of bfloat16 by converting all of it to float32 and back.
    """
    rows = shards, lanes, config.num_kv_heads
    blocks = _empty(config.replace(compute_dtype=ring_dtype(config, on_cpu)), rows, capacity, int8)
    return Ring(blocks, jnp.zeros((), jnp.int32))


def ring_dtype(config: ModelConfig, on_cpu: bool) -> str:
    """The dtype of the keys and values in a ring, unless they are 8-bit integers."""
    return "float32" if on_cpu else config.compute_dtype


def empty_stash(
    config: ModelConfig, shards: int, count: int, size: int, *, int8: bool = False
) -> Stash:
    """A stash of `count` blocks of `size` tokens in each shard."""
    return Stash(_empty(config, (shards, count, config.num_kv_heads), size, int8))


def _empty(config: ModelConfig, rows: tuple[int, ...], slots: int, int8: bool) -> tuple[Block, ...]:
    """Zeros for all layers; `rows` are the dimensions before the slots, [D, rows, K]."""
    dtype = jnp.int8 if int8 else jnp.dtype(config.compute_dtype)

    def layer() -> KeyValue:
        zeros = {
            "k": jnp.zeros((*rows, config.head_dim, slots), dtype),
            "v": jnp.zeros((*rows, slots, config.head_dim), dtype),
        }
        if int8:
            zeros |= {name: jnp.zeros((*rows, slots)) for name in ("k_scale", "v_scale")}
        return zeros

    return tuple({slot: layer() for slot in slots} for slots in config.blocks)


def _any_layer(blocks: Sequence[Block]) -> KeyValue:
    """One of the layers, which all have the same shapes."""
    return next(iter(blocks[0].values()))


def map_layers(update: Callable[..., KeyValue], *blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks whose every layer is `update` of that layer in each of the arguments."""
    return tuple(
        {slot: update(*(block[slot] for block in zipped)) for slot in zipped[0]}
        for zipped in zip(*blocks, strict=True)
    )


def stored(new: KeyValue, like: KeyValue) -> KeyValue:
    """New keys and values [..., h] in the form of the layer `like`.

    If that has 8-bit integers, they are rounded to these, with a scale [...] for each vector.
    """
    if "k_scale" not in like:
        return new
    quantised = {}
    for name in ("k", "v"):
        x = new[name].astype(jnp.float32)  # [..., h]
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / 127  # [...]
        quantised[name] = jnp.round(x / scale[..., None]).astype(jnp.int8)
        quantised[f"{name}_scale"] = scale
    return quantised


def as_numbers(layer: KeyValue) -> KeyValue:
    """Keys and values as numbers: a copy, as bfloat16, of the uint16 of `empty_pages`."""
    return {name: numbers_of(x) for name, x in layer.items()}


def write_ring(ring: Ring, new: Sequence[Block]) -> Ring:
    """Store the keys and values [D, N, K, h] that the forward pass emitted; advance the slot."""

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        return {
            name: jax.lax.dynamic_update_index_in_dim(
                layer[name], value.astype(layer[name].dtype), ring.slot, _slots(name)
            )
            for name, value in stored(one, layer).items()
        }

    return Ring(map_layers(write, ring.blocks, new), (ring.slot + 1) % ring.capacity)


def _slots(name: str) -> int:
    """The axis that runs over slots: of keys the last, of values and scales the fourth."""
    return 4 if name == "k" else 3


def stash_oldest(stash: Stash, ring: Ring, held: jax.Array, targets: jax.Array) -> Stash:
    """Copy the oldest C tokens of each lane's ring into the stash.

    Args:
      held: [D, N] how many tokens each lane has in the ring.
      targets: [D, N] the block to which each lane's tokens are copied, or an index out of range for
        lanes whose tokens are not copied.
    """
    index = (ring.slot - held[..., None] + jnp.arange(stash.size)) % ring.capacity  # [D, N, C]

    def move(layer: KeyValue, source: KeyValue) -> KeyValue:
        updated = {}
        for name, array in source.items():
            shape = [1] * array.ndim
            shape[:2], shape[_slots(name)] = index.shape[:2], stash.size
            oldest = jnp.take_along_axis(array, index.reshape(shape), axis=_slots(name))
            updated[name] = _put(layer[name], targets, oldest)
        return updated

    return Stash(map_layers(move, stash.blocks, ring.blocks))


def grow_stash(stash: Stash, count: int) -> Stash:
    """The stash with zeros appended to it, so that it has `count` blocks."""

    def grow(layer: KeyValue) -> KeyValue:
        more = (0, count - stash.count)
        return {
            name: jnp.pad(array, [more if axis == 1 else (0, 0) for axis in range(array.ndim)])
            for name, array in layer.items()
        }

    return Stash(map_layers(grow, stash.blocks))


def take_rows(blocks: Sequence[Block], index: jax.Array) -> tuple[Block, ...]:
    """The lanes, or the blocks of the stash, whose indices in each shard are [D, rows]."""

    def take(layer: KeyValue) -> KeyValue:
        return {name: rows_of(array, index) for name, array in layer.items()}

    return map_layers(take, blocks)


def write_pages(pages: Pages, new: Sequence[Block], last: jax.Array, targets: jax.Array) -> Pages:
    """Store computed pages: new k, v [D, A, S, K, h] and last [D, A, E] in pages `targets` [D, A].

    Pages whose target is out of range are dropped.
    """

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        # [D, A, S, K, (h)] -> [D, A, K, S, (h)]
        moved = {name: jnp.moveaxis(value, 2, 3) for name, value in stored(one, layer).items()}
        moved["k"] = moved["k"].swapaxes(3, 4)  # [D, A, K, h, S]
        return {name: _put(layer[name], targets, value) for name, value in moved.items()}

    return Pages(map_layers(write, pages.blocks, new), _put(pages.last, targets, last))


def _put(array: jax.Array, targets: jax.Array, value: jax.Array) -> jax.Array:
    """The array with array[d, targets[d]] = value[d] for each shard d.

    Values whose target is out of range are dropped.
    """
    shard = jnp.arange(targets.shape[0])[:, None]
    if array.dtype == jnp.uint16:  # the bits of bfloat16
        value = bits_of(value.astype(jnp.bfloat16))
    return array.at[shard, targets].set(value.astype(array.dtype), mode="drop")


def rows_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[d, index[d]] for each shard d: [D, X, ...] and [D, I...] -> [D, I..., ...].

    Every index must be in range.
    """
    return jax.vmap(lambda a, i: a.at[i].get(mode="promise_in_bounds"))(array, index)
