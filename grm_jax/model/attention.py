"""Attention: which keys a query may see, and the softmax over them, with or without a softcap.

Masks are functions of positions, never of cache slots or token ids, so padding on either side,
packing and caching can not change a result.

This file has the mathematics in plain arrays; `attention_backends` chooses how it is computed, and
`softmax_sums` has the softmax in parts, over one set of keys after the other.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h size
of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The score of a masked key: below any other score, and finite, so that the weights of a query
# with no visible key become uniform and not NaN. Such queries are padding; no output of theirs is
# read.
MASKED = -1e30

# The checkpoint name of what a rematerialised backward pass may keep of attention
# (`transformer.forward`).
SAVED = "attention"


def visible(
    query_pos: jax.Array,
    key_pos: jax.Array,
    *,
    window: int | None,
    query_segment: jax.Array | None = None,
    key_segment: jax.Array | None = None,
    key_valid: jax.Array | None = None,
) -> jax.Array:
    """Boolean mask [B, T, S]: causal, and within `window` positions (i - window < j <= i) if given.

    Args:
      query_pos: [B, T] positions of the queries within their sequences.
      key_pos: [B, S] positions of the keys.
      window: the sliding window, or None for a global layer.
      query_segment, key_segment: [B, T], [B, S] ids of packed sequences; a query sees only keys of
        its own sequence.
      key_valid: [B, S], False for padding.
    """
    distance = query_pos[:, :, None] - key_pos[:, None, :]  # [B, T, S]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if query_segment is not None and key_segment is not None:
        mask &= query_segment[:, :, None] == key_segment[:, None, :]
    if key_valid is not None:
        mask &= key_valid[:, None, :]
    return mask


class Places(NamedTuple):
    """Positions and segments of queries and keys: the arguments of `visible` except the window.

    Attributes:
      query_pos, key_pos: [B, T], [B, S] positions within the sequence.
      query_segment, key_segment: [B, T], [B, S] packed-sequence ids from 0, or None.
      key_valid: [B, S], False for padding, or None.
    """

    query_pos: jax.Array
    key_pos: jax.Array
    query_segment: jax.Array | None = None
    key_segment: jax.Array | None = None
    key_valid: jax.Array | None = None

    def mask(self, window: int | None) -> jax.Array:
        """The mask [B, T, S]; see `visible`."""
        return visible(
            self.query_pos,
            self.key_pos,
            window=window,
            query_segment=self.query_segment,
            key_segment=self.key_segment,
            key_valid=self.key_valid,
        )


def scores(q: jax.Array, k: jax.Array, mask: jax.Array, *, softcap: float | None) -> jax.Array:
    """Masked attention scores in float32, softcapped unless the softcap is None.

    Args:
      q: [B, T, K, G, h], already scaled.
      k: [B, S, K, h].
      mask: [B, T, S].

    Returns:
      [B, K, G, T, S], with `MASKED` where the mask is False.
    """
    raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    return jnp.where(mask[:, None, None], capped, MASKED)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, softcap: float | None
) -> jax.Array:
    """Softmax attention, with Gemma-2's softcap on the scores or without; the reference backend.

    Args:
      q: [B, T, K, G, h], already scaled by `query_scale` and rotated.
      k, v: [B, S, K, h].
      mask: [B, T, S].

    Returns:
      [B, T, K, G, h] in the dtype of q.
    """
    raw = scores(q, k, mask, softcap=softcap)  # [B, K, G, T, S]
    weights = jax.nn.softmax(raw, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
