"""Keys and values while sampling: the prompt's stored once, the samples' own apart.

P prompts with R samples each decode together. A layer's memory looks like this for one prompt of
5 tokens (padded to S = 8), R = 2 samples, 3 tokens drawn so far (capacity T = 4):

    prompt  v[P, K, S, h]      p0 p1 p2 p3 p4  .  .  .      read by both samples, never repeated
    suffix  v[P, R, K, T, h]   a5 a6 a7  .                  sample 0
                               b5 b6 b7  .                  sample 1

The query of a new token (position 8) attends to the prompt, to its own suffix, and to itself. The
caches are only read inside the forward pass; the new keys and values come out of it and are written
in place. Keys are stored transposed ([h, slots]), the layout in which scores are computed.

What a query may see is decided by positions: prompt slot s holds position s (valid while
s < length), suffix slot t holds position length + t. So padding, the sliding window and the
capacity can not disturb each other.

Dimensions: P prompts, S prompt slots, R samples a prompt, T suffix slots, K key/value heads,
G query heads per key/value head, h head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.attention import attention, soft_weights, visible
from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Attend, Kind
from grm_jax.model.params import LAYER_KINDS

# One layer's {"k": ..., "v": ...}; a block's {"local": KeyValue, "global": KeyValue}.
KeyValue = dict[str, jax.Array]
Block = dict[Kind, KeyValue]


@flax.struct.dataclass
class PromptCache:
    """Keys [P, K, h, S] and values [P, K, S, h] of P prompts for each block; lengths [P]."""

    blocks: tuple[Block, ...]
    lengths: jax.Array

    @property
    def slots(self) -> int:
        return self.blocks[0]["local"]["v"].shape[2]


@flax.struct.dataclass
class SuffixCache:
    """Keys [P, R, K, h, T] and values [P, R, K, T, h] of drawn tokens for each block."""

    blocks: tuple[Block, ...]

    @property
    def capacity(self) -> int:
        return self.blocks[0]["local"]["v"].shape[3]


def prompt_cache(config: ModelConfig, emitted: Block, lengths: jax.Array) -> PromptCache:
    """The cache of what `prefill_attend` emitted (leaves stacked over blocks)."""
    blocks = tuple(jax.tree.map(lambda x, i=i: x[i], emitted) for i in range(config.num_blocks))
    return PromptCache(blocks, lengths)


def empty_suffix(config: ModelConfig, prompts: int, samples: int, capacity: int) -> SuffixCache:
    """A suffix cache of zeros with room for `capacity` tokens a sample."""
    rows = (prompts, samples, config.num_kv_heads)
    dtype = jnp.dtype(config.compute_dtype)

    def layer() -> KeyValue:
        return {
            "k": jnp.zeros((*rows, config.head_dim, capacity), dtype),
            "v": jnp.zeros((*rows, capacity, config.head_dim), dtype),
        }

    return SuffixCache(
        tuple({kind: layer() for kind in LAYER_KINDS} for _ in range(config.num_blocks))
    )


def _map_layers(update: Callable[..., KeyValue], *blocks: Sequence[Block]) -> tuple[Block, ...]:
    """update(layer of each argument) for every layer."""
    return tuple(
        {kind: update(*(block[kind] for block in zipped)) for kind in LAYER_KINDS}
        for zipped in zip(*blocks, strict=True)
    )


def grow_suffix(suffix: SuffixCache, capacity: int) -> SuffixCache:
    """The same cache with room for `capacity` tokens."""
    more, keep = (0, capacity - suffix.capacity), (0, 0)

    def grow(layer: KeyValue) -> KeyValue:
        return {
            "k": jnp.pad(layer["k"], (keep, keep, keep, keep, more)),
            "v": jnp.pad(layer["v"], (keep, keep, keep, more, keep)),
        }

    return SuffixCache(_map_layers(grow, suffix.blocks))


def write_suffix(suffix: SuffixCache, new: Sequence[Block], slot: jax.Array) -> SuffixCache:
    """Store the keys and values [P, R, K, h] that the forward pass emitted in `slot`."""
    put = jax.lax.dynamic_update_slice_in_dim

    def write(layer: KeyValue, one: KeyValue) -> KeyValue:
        return {
            "k": put(layer["k"], one["k"][..., :, None], slot, axis=4),
            "v": put(layer["v"], one["v"][..., None, :], slot, axis=3),
        }

    return SuffixCache(_map_layers(write, suffix.blocks, new))


def prefill_attend(config: ModelConfig, positions: jax.Array, valid: jax.Array) -> Attend:
    """Attention of prompts [P, S] over themselves that also emits their keys and values."""
    masks = {
        kind: visible(
            positions,
            positions,
            window=config.sliding_window if kind == "local" else None,
            key_valid=valid,
        )
        for kind in LAYER_KINDS
    }

    def attend(q, k, v, kind, layer_input):
        del layer_input
        out = attention(q, k, v, masks[kind], softcap=config.attn_softcap)
        return out, {"k": k.transpose(0, 2, 3, 1), "v": v.swapaxes(1, 2)}

    return attend


def decode_attend(
    config: ModelConfig,
    lengths: jax.Array,
    positions: jax.Array,
    slot: jax.Array,
    prompt_slots: int,
    capacity: int,
) -> Attend:
    """Attention of one new token a sample over prompt, suffix and itself.

    The forward pass runs on [P, R]: its token dimension holds the R samples of a prompt, so all
    their queries meet the prompt's keys in one matrix product of R * G rows.

    Args:
      lengths: [P] prompt lengths.
      positions: [P, R] positions of the new tokens.
      slot: suffix slots below it are filled.
      prompt_slots, capacity: S and T.
    """
    prompt_pos = jnp.broadcast_to(jnp.arange(prompt_slots), (lengths.shape[0], prompt_slots))
    suffix_index = jnp.arange(capacity)
    suffix_pos = lengths[:, None] + suffix_index  # [P, T]
    masks = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        in_prompt = visible(
            positions, prompt_pos, window=window, key_valid=prompt_pos < lengths[:, None]
        )
        in_suffix = visible(
            positions,
            suffix_pos,
            window=window,
            key_valid=jnp.broadcast_to(suffix_index < slot, suffix_pos.shape),
        )
        # [P, 1, R, 1, S] and [P, R, 1, 1, T]: broadcast over K and G.
        masks[kind] = in_prompt[:, None, :, None, :], in_suffix[:, :, None, None, :]

    # The three parts of the keys add up to one exact softmax.
    weigh = functools.partial(soft_weights, softcap=config.attn_softcap)

    def attend(q, k, v, kind, layer_input):
        prompt, suffix = layer_input["prompt"], layer_input["suffix"]
        prompt_mask, suffix_mask = masks[kind]
        f32 = jnp.float32
        p = jnp.einsum("prkgh,pkhs->pkrgs", q, prompt["k"], preferred_element_type=f32)
        s = jnp.einsum("prkgh,prkht->prkgt", q, suffix["k"], preferred_element_type=f32)
        own = jnp.einsum("prkgh,prkh->prkg", q, k, preferred_element_type=f32)
        p, s, own = weigh(p, prompt_mask), weigh(s, suffix_mask), weigh(own, None)
        total = jnp.sum(p, axis=-1).swapaxes(1, 2) + jnp.sum(s, axis=-1) + own  # [P, R, K, G]
        out = jnp.einsum(
            "pkrgs,pksh->pkrgh", p.astype(v.dtype), prompt["v"], preferred_element_type=f32
        ).swapaxes(1, 2)
        out += jnp.einsum(
            "prkgt,prkth->prkgh", s.astype(v.dtype), suffix["v"], preferred_element_type=f32
        )
        out += own[..., None] * v[:, :, :, None, :]
        return (out / total[..., None]).astype(q.dtype), {"k": k, "v": v}

    return attend


def layer_inputs(prompt: PromptCache, suffix: SuffixCache) -> list[dict[Kind, Any]]:
    """What `decode_attend` reads, one entry a block."""
    return [
        {kind: {"prompt": p[kind], "suffix": s[kind]} for kind in LAYER_KINDS}
        for p, s in zip(prompt.blocks, suffix.blocks, strict=True)
    ]
