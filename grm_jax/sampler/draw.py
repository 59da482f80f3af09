"""Drawing the next token: filters, and the draw by two random numbers a token.

The vocabulary is cut into blocks of about sqrt(V) tokens. One random number selects a block by the
cumulative sums of the blocks' weights, another a token in it, so that the vocabulary is read once.
No noise is drawn per token, and nothing is sorted: filters find their thresholds by bisection over
the bits of float32.

A uniform float32 number has 23 bits, or 2^23 values, which is 33 for each of 256,000 tokens on
average. With one such number, tokens whose interval contains none of these values are never drawn:
for logits with a standard deviation of 2.5, 79,000 tokens with 0.18% of the probability. With two
numbers, a block has its probability to within 2^-23, and so has a token within its block; the
tokens that are never drawn have 7e-8 of the probability.

Dimensions: V vocabulary, n entries or blocks of it, after any leading dimensions [...].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.sampler.options import Filters


@flax.struct.dataclass
class Settings:
    """The settings of each lane [D, N], where they differ; as in `SamplingConfig`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def draw(
    z: jax.Array, uniform: jax.Array, temperature: jax.Array, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Next tokens [...] int32 and their log-probabilities under softmax(z / temperature).

    Args:
      z: [..., V] float32 softcapped logits.
      uniform: [..., 2] in [0, 1), two numbers for each token; see `pick`.
      temperature: a scalar. It is not read in greedy decoding, whose log-probabilities are those at
        temperature 1.
    """
    if not filters.greedy:
        z = z / temperature
    top, weights = _weights(z)
    if filters.greedy:
        chosen = jnp.argmax(z, axis=-1).astype(jnp.int32)
    else:
        chosen = pick(keep_top(weights, filters), uniform)
    return chosen, _logprob(z, chosen, top, weights)


def draw_each(z: jax.Array, uniform: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """As `draw`, with settings of its own for each distribution [...].

    A greedy and a random token are computed for all, and one of them is selected for each.
    """
    greedy = settings.temperature == 0  # [...]
    z = z / jnp.where(greedy, 1.0, settings.temperature)[..., None]
    top, weights = _weights(z)
    drawn = pick(keep_top_each(weights, settings), uniform)
    chosen = jnp.where(greedy, jnp.argmax(z, axis=-1).astype(jnp.int32), drawn)
    return chosen, _logprob(z, chosen, top, weights)


def _weights(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logits [..., 1] and exp(z - largest) [..., V]."""
    top = jnp.max(z, axis=-1, keepdims=True)
    return top, jnp.exp(z - top)


def _logprob(z: jax.Array, chosen: jax.Array, top: jax.Array, weights: jax.Array) -> jax.Array:
    """Log-probabilities [...] of the chosen tokens [...] under softmax(z)."""
    picked = jnp.take_along_axis(z, chosen[..., None], axis=-1)[..., 0]
    return picked - top[..., 0] - jnp.log(jnp.sum(weights, axis=-1))


def watched_logprobs(z: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [..., W] of tokens [W] under softmax(z), where z is [..., V]."""
    return jnp.take(z, tokens, axis=-1) - jax.nn.logsumexp(z, axis=-1, keepdims=True)


def pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """A token [...] int32, with a probability proportional to its weight.

    Args:
      weights: [..., V] float32 >= 0, not all 0.
      uniform: [..., 2] in [0, 1): the first selects a block of tokens, the second a token in it.
    """
    size = weights.shape[-1]
    block = 1 << math.ceil(math.log2(max(2.0, math.sqrt(size))))
    pad = [(0, 0)] * (weights.ndim - 1) + [(0, -size % block)]
    blocks = jnp.pad(weights, pad).reshape(*weights.shape[:-1], -1, block)  # [..., n, block]
    index = _inverse(jnp.sum(blocks, axis=-1), uniform[..., 0])  # [...]
    inside = jnp.take_along_axis(blocks, index[..., None, None], axis=-2)[..., 0, :]
    return (index * block + _inverse(inside, uniform[..., 1])).astype(jnp.int32)


def _inverse(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first entry [...] at which the running sum of weights [..., n] exceeds `uniform` [...]
    times their sum: inverse transform sampling.

    Running sums are rounded, and a parallel scan does not round them all in the same way, so that
    they may rise where a weight is 0, or exceed the last one. So entries of weight 0 are excluded,
    and where no entry qualifies, the last one with a positive weight is taken.
    """
    running = jnp.cumsum(weights, axis=-1)  # [..., n]
    positive = weights > 0
    passed = positive & (running > uniform[..., None] * running[..., -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)  # [...]
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


def keep_top(weights: jax.Array, filters: Filters) -> jax.Array:
    """Weights exp(z - max) [..., V], set to 0 for the tokens that are filtered out.

    The filters apply in the order top_k, top_p, min_p. Tokens that tie with the last one kept are
    kept too.
    """
    if filters.top_k and filters.top_k < weights.shape[-1]:
        weights = _keep_above(weights, _top_k_threshold(weights, filters.top_k))
    if filters.top_p < 1.0:
        weights = _keep_above(weights, _top_p_threshold(weights, filters.top_p))
    if filters.min_p > 0.0:
        weights = _keep_above(weights, filters.min_p)  # the largest weight is 1
    return weights


def keep_top_each(weights: jax.Array, settings: Settings) -> jax.Array:
    """As `keep_top`, with filters of its own for each row [V] of weights [..., V].

    Filters are only computed where any row has one. A row without filters is not changed by those
    of the others.
    """
    size = weights.shape[-1]
    filtered = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)  # [...]

    def keep(weights: jax.Array) -> jax.Array:
        count = jnp.where(settings.top_k == 0, size, jnp.minimum(settings.top_k, size))
        weights = _keep_above(weights, _top_k_threshold(weights, count))
        # With p = 1, rounded sums would leave out the rarest tokens.
        threshold = _top_p_threshold(weights, settings.top_p)
        nucleus = _keep_above(weights, threshold)
        weights = jnp.where(settings.top_p[..., None] < 1.0, nucleus, weights)
        return _keep_above(weights, settings.min_p[..., None])

    return jax.lax.cond(jnp.any(filtered), keep, lambda weights: weights, weights)


def _keep_above(weights: jax.Array, threshold: jax.Array | float) -> jax.Array:
    return jnp.where(weights >= threshold, weights, 0.0)


def _top_k_threshold(weights: jax.Array, count: jax.Array | int) -> jax.Array:
    """The weight [..., 1] of the token number `count`, from the likeliest on."""
    return _above(weights, lambda w, t: jnp.sum(w >= t, axis=-1) >= count)


def _top_p_threshold(weights: jax.Array, share: jax.Array | float) -> jax.Array:
    """The weight [..., 1] of the last of the likeliest tokens that have this share together."""
    enough = share * jnp.sum(weights, axis=-1)
    return _above(weights, lambda w, t: jnp.sum(jnp.where(w >= t, w, 0.0), axis=-1) >= enough)


def _above(weights: jax.Array, enough: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold [..., 1] such that the weights at or above it are still enough.

    Non-negative floats are ordered as their bits are, so 31 bisections find it exactly.

    Args:
      enough: whether the weights [..., V] at or above the threshold [..., 1] are enough: [...].
    """
    low = jnp.zeros(weights.shape[:-1], jnp.int32)  # the threshold 0 is always enough
    high = jnp.full(weights.shape[:-1], 0x7F800000, jnp.int32)  # infinity never is

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        satisfied = enough(weights, threshold)
        return jnp.where(satisfied, middle, low), jnp.where(satisfied, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[..., None]
