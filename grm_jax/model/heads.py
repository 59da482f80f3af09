"""The two heads: softcapped log-probabilities over the vocabulary, and a scalar.

A float32 row of logits over 256k words is 1 MB: they are made for a chunk of tokens at a time and
again in the backward pass, so `[tokens, vocabulary]` never exists for a batch.

Dimensions: M tokens (any leading shape, flattened), D embed, V vocabulary, B batch, C labels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import constrain, token_shards


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Softcapped float32 logits [..., V] of hidden [..., D] through the tied embedding.

    Decoding may hold the embedding a second time in a faster form, as params["head"].
    """
    if "head" in params:
        raw = params["head"].apply(hidden, 1)
        return config.final_softcap * jnp.tanh(raw / config.final_softcap)
    embed = params["embed"].astype(hidden.dtype)
    return config.final_softcap * _tanh(hidden, embed, config.final_softcap)


def _tanh(hidden: jax.Array, embed: jax.Array, softcap: float) -> jax.Array:
    """Logits / softcap, within -1 and 1."""
    raw = jnp.einsum("...d,vd->...v", hidden, embed, preferred_element_type=jnp.float32)
    return jnp.tanh(raw / softcap)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float,
    chunk: int = 2048,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """log softmax(logits / temperature)[target], and the entropy of that distribution.

    Args:
      hidden: [..., D]; give only the tokens whose log-probability is wanted (not the prompt's).
      targets: [...] token ids.
      temperature: the one the tokens were sampled at; required, because the trainer's and the
        sampler's must agree. It has no gradient.
      chunk: tokens whose logits a device holds at once.

    Returns:
      float32 log-probabilities [...], and entropies [...] in nats or None. Both have gradients.
    """
    total = targets.size
    # Each device cuts its own tokens into chunks: a chunk is spread over the mesh like a batch.
    ways = token_shards()
    ways = ways if total % ways == 0 else 1
    rows = total // ways
    steps = max(1, -(-rows // chunk))
    size = -(-rows // steps)
    x, ids = hidden.reshape(ways, rows, -1), targets.reshape(ways, rows)
    extra = steps * size - rows
    x, ids = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), jnp.pad(ids, ((0, 0), (0, extra)))
    x = x.reshape(ways, steps, size, x.shape[-1]).swapaxes(0, 1)
    ids = ids.reshape(ways, steps, size).swapaxes(0, 1)
    static = _Static(config.final_softcap, with_entropy)
    x, warmth = constrain(x, (None, "tokens", None, None)), jnp.asarray(temperature, jnp.float32)
    found = _logprobs(static, x, params["embed"], ids, warmth)
    both = cast(tuple[jax.Array, jax.Array], found)
    logprob, entropy = (
        y.swapaxes(0, 1).reshape(ways, -1)[:, :rows].reshape(targets.shape) for y in both
    )
    return logprob, entropy if with_entropy else None


class _Static(NamedTuple):
    softcap: float
    with_entropy: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    static: _Static, hidden: jax.Array, embed: jax.Array, ids: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies (or zeros) [n, W, c] of hidden [n, W, c, D], ids [n, W, c].

    n chunks, one after the other, of W device's c tokens. The embedding is cast (and gathered) once
    for all chunks; in the backward pass its gradient is summed in float32, by each device for its
    own tokens, and over devices once. The backward pass makes logits again; those of a single
    chunk, whose memory is allowed, it keeps.
    """
    return _logprobs_forward(static, hidden, embed, ids, temperature)[0]


def _logprobs_forward(static: _Static, hidden, embed, ids, temperature):
    words = _whole(embed, hidden.dtype)
    keep = hidden.shape[0] == 1

    def chunk(_, given):
        h, t = given
        tanh = _tanh(h, words, static.softcap)
        z = static.softcap * tanh / temperature
        norm = jax.nn.logsumexp(z, axis=-1)
        picked = jnp.sum(jnp.where(_is_target(z, t), z, 0.0), axis=-1)
        entropy = jnp.zeros_like(norm)
        if static.with_entropy:
            entropy = norm - jnp.sum(jnp.exp(z - norm[..., None]) * z, axis=-1)
        return None, (picked - norm, entropy, norm, tanh if keep else None)

    _, (logprob, entropy, *kept) = jax.lax.scan(chunk, None, (hidden, ids))
    return (logprob, entropy), (hidden, embed, ids, temperature, entropy, *kept)


def _logprobs_backward(static: _Static, kept, given):
    hidden, embed, ids, temperature, entropy, norm, tanh = kept
    words = _whole(embed, hidden.dtype)
    ways = hidden.shape[1]

    def chunk(dwords: jax.Array, given):
        h, t, norm, entropy, tanh, g, g_entropy = given
        if tanh is None:
            tanh = _tanh(h, words, static.softcap)
        z = static.softcap * tanh / temperature - norm[..., None]
        p = jnp.exp(z)
        # d logprob / dz = [target] - p;  d entropy / dz = -p (log p + entropy)
        dz = jnp.where(_is_target(z, t), g[..., None], 0.0) - g[..., None] * p
        if static.with_entropy:
            dz -= g_entropy[..., None] * p * (z + entropy[..., None])
        draw = (dz * (1.0 - tanh * tanh) / temperature).astype(h.dtype)
        dh = jnp.einsum("wcv,vd->wcd", draw, words, preferred_element_type=jnp.float32)
        dwords += jnp.einsum("wcv,wcd->wvd", draw, h, preferred_element_type=jnp.float32)
        return dwords, dh.astype(h.dtype)

    zeros = constrain(jnp.zeros((ways, *embed.shape), jnp.float32), ("tokens", "vocab", None))
    dwords, dhidden = jax.lax.scan(chunk, zeros, (hidden, ids, norm, entropy, tanh, *given))
    return dhidden, jnp.sum(dwords, axis=0).astype(embed.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _whole(embed: jax.Array, dtype: Any) -> jax.Array:
    """The embedding in the compute dtype, no longer split over the data axes."""
    return constrain(embed.astype(dtype), ("vocab", None))


def _is_target(z: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == ids[..., None]


@functools.partial(jax.jit, static_argnames="num")
def take_rows(hidden: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """hidden[b, start[b] : start[b] + num] for each row: [B, T, D] -> [B, num, D].

    Indices past the end repeat the last token; their losses are masked by the caller.
    """
    index = jnp.minimum(start[:, None] + jnp.arange(num), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)


def scalar(params: Params, hidden: jax.Array, ends: jax.Array) -> jax.Array:
    """The scalar head at the last token of each sequence: float32 [B, S, C].

    As `Gemma2ForSequenceClassification`: a linear map of the final-norm state of the last
    token that is not padding, without a softcap.

    Args:
      hidden: [B, T, D].
      ends: [B, S] slots of the last tokens of a row's S sequences.
    """
    last = jnp.take_along_axis(hidden, ends[..., None], axis=1).astype(jnp.float32)
    return jnp.einsum("bsd,dc->bsc", last, params["score"].astype(jnp.float32))
