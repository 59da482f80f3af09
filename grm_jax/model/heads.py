"""The two heads: softcapped log-probabilities over the vocabulary, and a scalar.

The float32 logits of one token over a vocabulary of 256,000 are 1 MB. They are computed for a chunk
of tokens at a time, and again in the backward pass, so the logits of a batch never exist at once.

Dimensions: B batch, T tokens, D embedding, V vocabulary, C labels of the scalar head, S packed
sequences of a row; and, inside `token_logprobs`, W devices that split the tokens, n chunks a
device, c tokens a chunk.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import constrain, token_shards


@jax.named_scope("head")
def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Softcapped float32 logits [..., V] of hidden [..., D] through the tied embedding.

    Where params has a "head", it is the embedding in a form that is faster to decode with
    (`sampler.weights`), and is used in its place.
    """
    if "head" in params:
        raw = params["head"].apply(hidden, 1)  # [..., V]
        return config.final_softcap * jnp.tanh(raw / config.final_softcap)
    embed = params["embed"].astype(hidden.dtype)
    return config.final_softcap * _tanh(hidden, embed, config.final_softcap)


def _tanh(hidden: jax.Array, embed: jax.Array, softcap: float) -> jax.Array:
    """Softcapped logits [..., V] divided by the softcap, between -1 and 1."""
    raw = jnp.einsum("...d,vd->...v", hidden, embed, preferred_element_type=jnp.float32)
    return jnp.tanh(raw / softcap)


@jax.named_scope("head")
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
      hidden: [..., D], only of the tokens whose log-probability is wanted, not of the prompt.
      targets: [...] token ids.
      temperature: the temperature at which the tokens were sampled. It has no default, because the
        trainer's and the sampler's must agree, and no gradient.
      chunk: how many tokens' logits a device holds at once.

    Returns:
      float32 log-probabilities [...], and entropies [...] in nats or None. Both have gradients.
    """
    total = targets.size
    # Each device cuts its own tokens into chunks: a chunk is split over the mesh like a batch.
    ways = token_shards()  # W
    ways = ways if total % ways == 0 else 1
    rows = total // ways
    steps = max(1, -(-rows // chunk))  # n
    size = -(-rows // steps)  # c
    x, ids = hidden.reshape(ways, rows, -1), targets.reshape(ways, rows)  # [W, rows, D], [W, rows]
    extra = steps * size - rows
    x, ids = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), jnp.pad(ids, ((0, 0), (0, extra)))
    x = x.reshape(ways, steps, size, x.shape[-1]).swapaxes(0, 1)  # [n, W, c, D]
    ids = ids.reshape(ways, steps, size).swapaxes(0, 1)  # [n, W, c]
    static = _Static(config.final_softcap, with_entropy)
    x = constrain(x, (None, "tokens", None, None))
    divisor = jnp.asarray(temperature, jnp.float32)
    outputs = cast(
        tuple[jax.Array, jax.Array], _logprobs(static, x, params["embed"], ids, divisor)
    )  # both [n, W, c]
    logprob, entropy = (
        y.swapaxes(0, 1).reshape(ways, -1)[:, :rows].reshape(targets.shape) for y in outputs
    )
    return logprob, entropy if with_entropy else None


class _Static(NamedTuple):
    """What `_logprobs` depends on besides its arrays."""

    softcap: float
    with_entropy: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    static: _Static, hidden: jax.Array, embed: jax.Array, ids: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies (or zeros) [n, W, c] of hidden [n, W, c, D], ids [n, W, c].

    The n chunks are computed one after the other. The embedding [V, D] is cast, and gathered from
    the devices, once for all chunks. In the backward pass each device sums the embedding's gradient
    over its own tokens in float32, and the sums are added over devices once. The backward pass
    computes the logits again; only where there is a single chunk are they kept, since one chunk's
    memory is allowed for anyway.
    """
    return _logprobs_forward(static, hidden, embed, ids, temperature)[0]


def _logprobs_forward(static: _Static, hidden, embed, ids, temperature):
    embedding = _gathered(embed, hidden.dtype)
    keep = hidden.shape[0] == 1

    def chunk(_, chunk_inputs):
        h, t = chunk_inputs  # [W, c, D], [W, c]
        tanh = _tanh(h, embedding, static.softcap)  # [W, c, V]
        z = static.softcap * tanh / temperature
        norm = jax.nn.logsumexp(z, axis=-1)  # [W, c]
        picked = jnp.sum(jnp.where(_is_target(z, t), z, 0.0), axis=-1)  # [W, c]
        entropy = jnp.zeros_like(norm)
        if static.with_entropy:
            entropy = norm - jnp.sum(jnp.exp(z - norm[..., None]) * z, axis=-1)
        return None, (picked - norm, entropy, norm, tanh if keep else None)

    _, (logprob, entropy, *kept) = jax.lax.scan(chunk, None, (hidden, ids))
    return (logprob, entropy), (hidden, embed, ids, temperature, entropy, *kept)


def _logprobs_backward(static: _Static, kept, cotangents):
    hidden, embed, ids, temperature, entropy, norm, tanh = kept
    embedding = _gathered(embed, hidden.dtype)
    ways = hidden.shape[1]

    def chunk(d_embedding: jax.Array, chunk_inputs):
        h, t, norm, entropy, tanh, g, g_entropy = chunk_inputs
        if tanh is None:
            tanh = _tanh(h, embedding, static.softcap)
        z = static.softcap * tanh / temperature - norm[..., None]  # log p: [W, c, V]
        p = jnp.exp(z)
        # d logprob / dz = [target] - p;  d entropy / dz = -p (log p + entropy)
        dz = jnp.where(_is_target(z, t), g[..., None], 0.0) - g[..., None] * p
        if static.with_entropy:
            dz -= g_entropy[..., None] * p * (z + entropy[..., None])
        d_raw = (dz * (1.0 - tanh * tanh) / temperature).astype(h.dtype)  # [W, c, V]
        dh = jnp.einsum("wcv,vd->wcd", d_raw, embedding, preferred_element_type=jnp.float32)
        d_embedding += jnp.einsum("wcv,wcd->wvd", d_raw, h, preferred_element_type=jnp.float32)
        return d_embedding, dh.astype(h.dtype)

    # One sum for each device's tokens: [W, V, D].
    zeros = constrain(jnp.zeros((ways, *embed.shape), jnp.float32), ("tokens", "vocab", None))
    chunks = (hidden, ids, norm, entropy, tanh, *cotangents)
    d_embedding, d_hidden = jax.lax.scan(chunk, zeros, chunks)
    return d_hidden, jnp.sum(d_embedding, axis=0).astype(embed.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _gathered(embed: jax.Array, dtype: Any) -> jax.Array:
    """The embedding in the compute dtype, no longer split over the data axes."""
    return constrain(embed.astype(dtype), ("vocab", None))


def _is_target(z: jax.Array, ids: jax.Array) -> jax.Array:
    """A mask of z's shape [..., V] that is True at entry `ids` [...] of each distribution."""
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == ids[..., None]


@functools.partial(jax.jit, static_argnames="num")
def take_rows(hidden: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """hidden[b, start[b] : start[b] + num] for each row: [B, T, D] -> [B, num, D].

    Indices past the end repeat the last token; the caller masks their losses.
    """
    index = jnp.minimum(start[:, None] + jnp.arange(num), hidden.shape[1] - 1)  # [B, num]
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)


@jax.named_scope("head")
def scalar(params: Params, hidden: jax.Array, ends: jax.Array) -> jax.Array:
    """The scalar head at the last token of each sequence: float32 [B, S, C].

    It computes what `Gemma2ForSequenceClassification` does: a linear map, without a softcap, of the
    state after the final norm at the last token that is not padding.

    Args:
      hidden: [B, T, D].
      ends: [B, S] the index in its row of the last token of each of the row's S sequences.
    """
    last = jnp.take_along_axis(hidden, ends[..., None], axis=1).astype(jnp.float32)  # [B, S, D]
    return jnp.einsum("bsd,dc->bsc", last, params["score"].astype(jnp.float32))
