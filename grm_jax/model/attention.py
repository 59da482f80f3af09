"""Attention: which keys a query may see, and what it makes of them.

Masks are functions of positions, never of cache slots or token ids, so padding on either side,
packing and caching can not change a result.

Here is the mathematics, in plain arrays; `attention_backends` chooses how it is computed.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grm_jax.errors import UserError

# Below any softcapped score, and finite: a row with no visible key becomes uniform, not NaN. Such
# rows are padding and their outputs are never read.
MASKED = -1e30

# What a rematerialised backward pass may keep of attention, by name (`gemma2.Remat`).
SAVED = "attention"

# Up to this bound neither exp() of a softcapped score overflows float32, nor a sum of 2^20 of them
# times values of 100: 70 + log 2^20 + log 100 = 88.5, and the largest number is exp(88.7). So no
# maximum is subtracted. Gemma-2's cap is 50.
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
    """Boolean mask [B, T, S]: causal, within `window` positions (i - window < j <= i) if given.

    Args:
      query_pos: [B, T] positions within the sequence.
      key_pos: [B, S].
      window: sliding window, or None for a global layer.
      query_segment, key_segment: [B, T], [B, S] packed-sequence ids; only equal ones see another.
      key_valid: [B, S], False for padding.
    """
    distance = query_pos[:, :, None] - key_pos[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if query_segment is not None and key_segment is not None:
        mask &= query_segment[:, :, None] == key_segment[:, None, :]
    if key_valid is not None:
        mask &= key_valid[:, None, :]
    return mask


class Places(NamedTuple):
    """Where queries and keys stand: `visible`'s arguments but the window.

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
        """[B, T, S]; see `visible`."""
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
      [B, K, G, T, S].
    """
    raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    capped = softcap * jnp.tanh(raw / softcap)
    return jnp.where(mask[:, None, None], capped, MASKED)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, softcap: float
) -> jax.Array:
    """Softmax attention with Gemma-2's score softcap; the reference backend.

    Args:
      q: [B, T, K, G, h], already scaled by `query_scale` and rotated.
      k, v: [B, S, K, h].
      mask: [B, T, S].

    Returns:
      [B, T, K, G, h] in the dtype of q.
    """
    weights = jax.nn.softmax(scores(q, k, mask, softcap=softcap), axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


def soft_weights(
    raw: jax.Array, mask: jax.Array | None, *, softcap: float, dtype: Any
) -> jax.Array:
    """Unnormalised softmax weights exp(softcap(raw)) of float32 scores; 0 where masked.

    The softcap bounds the scores, so no maximum is subtracted, and weights over several sets of
    keys add up to one exact softmax. Raises ValueError for a softcap too large for that.

    Args:
      dtype: of the product with the values that they enter. Add up these rounded weights, in
        float32, for the softmax's norm: rounding then cancels in the quotient, and is the same
        wherever attention is computed in this way.
    """
    check_softcap(softcap)
    weights = jnp.exp(softcap * jnp.tanh(raw / softcap))
    return rounded(weights if mask is None else jnp.where(mask, weights, 0.0), dtype)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 x in `dtype`, rounded for good.

    XLA may keep excess precision: of x.astype(bfloat16).astype(float32) it can make x again, in one
    program and not in the next.
    """
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


def check_softcap(softcap: float) -> None:
    """Raise ValueError where a sum of softmax weights could overflow float32."""
    if softcap > MAX_SOFTCAP:
        raise UserError(
            f"attn_softcap={softcap} is above {MAX_SOFTCAP}: a sum of exp(score) could overflow"
        )
