"""The two heads: softcapped log-probabilities over the vocabulary, and a scalar.

A float32 row of logits over 256k words is 1 MB: they are made for a chunk of tokens at a time and
recomputed in the backward pass, so `[tokens, vocabulary]` never exists for a batch.

Dimensions: M tokens (any leading shape, flattened), D embed, V vocabulary, B batch, C labels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Softcapped float32 logits [..., V] of hidden [..., D] through the tied embedding.

    Decoding may hold the embedding a second time in a faster form, as params["head"].
    """
    if "head" in params:
        raw = params["head"].apply(hidden, 1)
        return config.final_softcap * jnp.tanh(raw / config.final_softcap)
    return _logits(hidden, params["embed"].astype(hidden.dtype), config.final_softcap)


def _logits(hidden: jax.Array, embed: jax.Array, softcap: float) -> jax.Array:
    raw = jnp.einsum("...d,vd->...v", hidden, embed, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(raw / softcap)


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
        sampler's must agree.
      chunk: tokens whose logits are held at once.

    Returns:
      float32 log-probabilities [...], and entropies [...] in nats or None.
    """
    shape = targets.shape
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = ids.shape[0]
    embed = params["embed"].astype(hidden.dtype)  # cast (and gathered) once, not once a chunk

    def one(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = _logits(h, embed, config.final_softcap) / temperature
        norm = jax.nn.logsumexp(z, axis=-1)
        picked = jnp.take_along_axis(z, t[:, None], axis=-1)[:, 0]
        if not with_entropy:
            return picked - norm, jnp.zeros_like(norm)
        return picked - norm, norm - jnp.sum(jnp.exp(z - norm[:, None]) * z, axis=-1)

    if total <= chunk:
        logprob, entropy = one(flat, ids)
    else:
        pad = -total % chunk
        flat = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk, flat.shape[-1])
        ids = jnp.pad(ids, (0, pad)).reshape(-1, chunk)
        step = jax.checkpoint(lambda _, x: (None, one(*x)))
        _, (logprob, entropy) = jax.lax.scan(step, None, (flat, ids))
        logprob, entropy = logprob.reshape(-1)[:total], entropy.reshape(-1)[:total]
    return logprob.reshape(shape), entropy.reshape(shape) if with_entropy else None


@functools.partial(jax.jit, static_argnames="num")
def take_rows(hidden: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """hidden[b, start[b] : start[b] + num] for each row: [B, T, D] -> [B, num, D].

    Indices past the end repeat the last token; their losses are masked by the caller.
    """
    index = jnp.minimum(start[:, None] + jnp.arange(num), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)


def scalar(params: Params, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """The scalar head at each row's last token: hidden [B, T, D], lengths [B] -> float32 [B, C].

    As `Gemma2ForSequenceClassification`: a linear map of the final-norm state of the last
    token that is not padding, without a softcap.
    """
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jnp.einsum("bd,dc->bc", last.astype(jnp.float32), params["score"].astype(jnp.float32))
