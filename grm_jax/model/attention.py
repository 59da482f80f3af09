"""Attention: which keys a query may see, and the softcapped softmax over them.

Masks are functions of positions, never of cache slots or token ids, so padding on either side,
packing and caching can not change a result.

This file has the mathematics in plain arrays; `attention_backends` chooses how it is computed.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h size
of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grm_jax.errors import UserError

# The score of a masked key: below any softcapped score, and finite, so that the weights of a query
# with no visible key become uniform and not NaN. Such queries are padding; no output of theirs is
# read.
MASKED = -1e30

# The checkpoint name of what a rematerialised backward pass may keep of attention (`gemma2.Remat`).
SAVED = "attention"

# Up to this softcap no maximum has to be subtracted before exp(): neither exp() of one score
# overflows float32, nor a sum of 2^20 of them times values of 100: 70 + log 2^20 + log 100 = 88.5,
# and the largest float32 is exp(88.7). Gemma-2's cap is 50.
MAX_SOFTCAP = 70.0


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


def scores(q: jax.Array, k: jax.Array, mask: jax.Array, *, softcap: float) -> jax.Array:
    """Softcapped, masked attention scores in float32.

    Args:
      q: [B, T, K, G, h], already scaled.
      k: [B, S, K, h].
      mask: [B, T, S].

    Returns:
      [B, K, G, T, S], with `MASKED` where the mask is False.
    """
    raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    capped = softcap * jnp.tanh(raw / softcap)
    return jnp.where(mask[:, None, None], capped, MASKED)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, softcap: float
) -> jax.Array:
    """Softmax attention with Gemma-2's softcap on the scores; the reference backend.

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


def soft_weights(
    raw: jax.Array, mask: jax.Array | None, *, softcap: float, dtype: Any
) -> jax.Array:
    """Unnormalised softmax weights exp(softcap * tanh(raw / softcap)); 0 where masked.

    The softcap bounds the scores, so no maximum is subtracted, and sums over several sets of keys
    add up to one exact softmax. Raises UserError for a softcap that is too large for that.

    Args:
      raw: [...] float32 scores.
      mask: a shape that broadcasts to raw's, or None where every key is visible.
      dtype: what the weights are rounded to: the dtype of their product with the values. Add up
        these rounded weights, in float32, for the softmax's denominator: the rounding then cancels
        in the quotient, and is the same wherever attention is computed in this way.
    """
    check_softcap(softcap)
    weights = jnp.exp(softcap * jnp.tanh(raw / softcap))
    return rounded(weights if mask is None else jnp.where(mask, weights, 0.0), dtype)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 x in `dtype`, rounded in a way that XLA may not undo.

    XLA may keep excess precision: it can turn x.astype(bfloat16).astype(float32) into x, in one
    program and not in the next.
    """
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, bits.nexp, bits.nmant).astype(dtype)


def check_softcap(softcap: float) -> None:
    """Raise UserError where a sum of softmax weights could overflow float32."""
    if softcap > MAX_SOFTCAP:
        raise UserError(
            f"attn_softcap={softcap} is above {MAX_SOFTCAP}: a sum of exp(score) could overflow"
        )
