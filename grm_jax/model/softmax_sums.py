"""A softmax over several sets of keys: sums over each set, which are added up and divided once.

Attention of a query over a set of keys, with scores s_j and values v_j, is kept as a triple `Sums`:

    numerator = sum_j w_j v_j,   total = sum_j w_j,   w_j = exp(s_j) / 2^peak

Over several sets, numerators and totals add up, and attention is numerator / total (`normalise`).

With a softcap, s_j = cap tanh(q k_j / cap) is bounded, no exp() overflows, and there is no peak:
it is None, and w_j = exp(s_j). Without one, s_j = q k_j can be of any size, and

    peak = max_j n_j,   n_j = ceil(s_j log2(e)),

over the keys that the query sees: an integer. The largest weight then lies between 1/2 and 1.
`together` multiplies the sums of each set by 2^(its peak - the highest peak) before it adds them.

Powers of two are exact, and rounding a number to bfloat16 and then multiplying it by one is
multiplying and then rounding. The weights are therefore computed as

    w_j = exp(s_j - n_j log(2)) * 2^(n_j - peak),

of which the first factor depends on the score alone: in bfloat16, too, the weights of a row are the
same numbers, however its keys are split into sets, and so in the sampler as in the trainer. (JAX's
exp2 is exp(x log(2)), which is not exact for integers.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grm_jax.errors import UserError
from grm_jax.model.attention import SAVED

# Up to this softcap no maximum has to be subtracted before exp(): neither exp() of one score
# overflows float32, nor a sum of 2^20 of them times values of 100: 70 + log 2^20 + log 100 = 88.5,
# and the largest float32 is exp(88.7). Gemma-2's cap is 50.
MAX_SOFTCAP = 70.0

# The peak of a query that sees no key of a set: below all others.
LOWEST = -(2**30)

# n_j log(2) is subtracted in two steps. The first constant has so few bits that its product with
# an n_j below 2^15 is exact, so that no precision is lost for large scores.
LOG2_E = 1.4426950408889634
LOG_2_HIGH = 0.693359375
LOG_2_LOW = -2.1219444005469057e-4

Pair = tuple[jax.Array, jax.Array]


class Sums(NamedTuple):
    """The sums of attention over a set of keys (see the top of this file).

    Attributes:
      numerator: [..., h] float32.
      total: [...] float32, 0 for a query that sees no key.
      peak: [...] int32, `LOWEST` for a query that sees no key; None with a softcap.
    """

    numerator: jax.Array
    total: jax.Array
    peak: jax.Array | None = None


def soft_weights(
    raw: jax.Array,
    mask: jax.Array | None,
    *,
    softcap: float | None,
    dtype: Any,
    axis: int | tuple[()] = -1,
    peak: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Unnormalised softmax weights [...] in `dtype`, 0 where masked, and their peak.

    Raises UserError for a softcap that is too large to leave out the peak.

    Args:
      raw: [...] float32 scores.
      mask: a shape that broadcasts to raw's, or None where every key is visible.
      softcap: the softcap, with which the peak is None; or None.
      dtype: what the weights are rounded to: the dtype of their product with the values. Add up
        these rounded weights, in float32, for the softmax's denominator: the rounding then cancels
        in the quotient, and is the same wherever attention is computed in this way.
      axis: the axis of the keys; () where every score is a set of its own.
      peak: a peak to use, not below that of the set, in the shape of raw without `axis`; None for
        the set's own.
    """
    check_softcap(softcap)
    if softcap is not None:
        weights = jnp.exp(softcap * jnp.tanh(raw / softcap))
    else:
        fraction, exponent = _split(raw)
        if peak is None:
            seen = exponent if mask is None else jnp.where(mask, exponent, LOWEST)
            peak = jnp.max(seen, axis=axis)
        weights = fraction * power_of_two(exponent - jnp.expand_dims(peak, axis))
    return rounded(weights if mask is None else jnp.where(mask, weights, 0.0), dtype), peak


def _split(raw: jax.Array) -> Pair:
    """exp(raw) as a fraction, float32 from 1/2 to 1, and an int32 exponent of 2.

    Scores of more than 10^7 do not overflow either, but are not told apart.
    """
    exponent = jnp.ceil(jax.lax.stop_gradient(raw) * LOG2_E)
    exponent = jnp.clip(exponent, -(2.0**24), 2.0**24)
    rest = (raw - exponent * LOG_2_HIGH) - exponent * LOG_2_LOW
    return jnp.exp(jnp.clip(rest, -1.0, 1.0)), exponent.astype(jnp.int32)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly, in float32, for int32 exponents up to 0; 0 for those below -126.

    Larger ones, which occur where a key is masked, give 1.
    """
    biased = jnp.clip(exponent, -127, 0) + 127
    return jax.lax.bitcast_convert_type(jnp.left_shift(biased, 23), jnp.float32)


def together(
    *parts: Sums, spread: Callable[[jax.Array], jax.Array] = lambda factor: factor[..., None]
) -> Sums:
    """The sums over all keys of several sets, all with a peak or all without one.

    Args:
      spread: brings factors in the shape of a total into a shape that broadcasts to a numerator's.
    """
    peaks = [part.peak for part in parts if part.peak is not None]
    peak = None
    if peaks:
        peak = functools.reduce(jnp.maximum, peaks)
        factors = [power_of_two(own - peak) for own in peaks]
        parts = tuple(
            Sums(part.numerator * spread(factor), part.total * factor)
            for part, factor in zip(parts, factors, strict=True)
        )
    numerator, total, _ = parts[0]
    for part in parts[1:]:
        numerator, total = numerator + part.numerator, total + part.total
    return Sums(numerator, total, peak)


def normalise(sums: Sums, dtype: Any) -> jax.Array:
    """numerator [..., h] / total [...] in `dtype`, the dtype of the products with the values.

    A query that saw no key (total 0) gets zeros.
    """
    return cast(jax.Array, _normalise(jnp.dtype(dtype), sums.numerator, sums.total))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(dtype: Any, numerator: jax.Array, total: jax.Array) -> jax.Array:
    return _normalise_forward(dtype, numerator, total)[0]


def _normalise_forward(dtype: Any, numerator: jax.Array, total: jax.Array):
    inverse = checkpoint_name(inverse_of(total), SAVED)
    out = checkpoint_name(numerator * inverse[..., None], SAVED)
    return out.astype(dtype), (out, inverse)


def _normalise_backward(dtype: Any, kept: Pair, dout: jax.Array) -> Pair:
    return through_division(dout, *kept, dtype)


def through_division(dout: jax.Array, out: jax.Array, inverse: jax.Array, dtype: Any) -> Pair:
    """The gradients of numerator and total, in float32.

    The numerator's gradient is rounded to the dtype in which it enters products before the total's
    gradient is computed from it, so that the two still cancel.
    """
    dnumerator = (dout.astype(jnp.float32) * inverse[..., None]).astype(dtype).astype(jnp.float32)
    return dnumerator, -jnp.sum(dnumerator * out, axis=-1)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def inverse_of(total: jax.Array) -> jax.Array:
    """1 / total, and 1 where the total is 0."""
    return 1.0 / jnp.where(total > 0, total, 1.0)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 x in `dtype`, rounded in a way that XLA may not undo.

    XLA may keep excess precision: it can turn x.astype(bfloat16).astype(float32) into x, in one
    program and not in the next.
    """
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, bits.nexp, bits.nmant).astype(dtype)


def check_softcap(softcap: float | None) -> None:
    """Raise UserError where a sum of softmax weights without a peak could overflow float32."""
    if softcap is not None and softcap > MAX_SOFTCAP:
        raise UserError(
            f"attn_softcap={softcap} is above {MAX_SOFTCAP}: a sum of exp(score) could overflow"
        )
