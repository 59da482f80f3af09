"""The two heads: log-probabilities over the vocabulary, and a scalar.

The vocabulary head is the embedding, or a matrix of its own; its logits are softcapped where the
model has a softcap.

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
from grm_jax.model.linear import Int8, OutMajor
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import constrain, token_shards


def output_matrix(params: Params) -> Any:
    """The matrix [V, D] that makes logits: the model's own head, else the embedding.

    It may be in a form that is faster to decode with (`sampler.weights`).
    """
    return params.get("head", params["embed"])


@jax.named_scope("head")
def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden [..., D], softcapped where the model has a softcap."""
    head, cap = output_matrix(params), config.final_softcap
    if isinstance(head, OutMajor | Int8):
        raw = head.apply(hidden, 1)  # [..., V]
    else:
        raw = _raw(hidden, head.astype(hidden.dtype))
    return raw if cap is None else cap * jnp.tanh(raw / cap)


def _raw(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., V] before the softcap."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _capped(hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
    """What the backward pass needs of logits [..., V]: divided by the softcap and between -1 and 1,
    or, without a softcap, the logits themselves."""
    raw = _raw(hidden, head)
    return raw if softcap is None else jnp.tanh(raw / softcap)


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
        tuple[jax.Array, jax.Array], _logprobs(static, x, output_matrix(params), ids, divisor)
    )  # both [n, W, c]
    logprob, entropy = (
        y.swapaxes(0, 1).reshape(ways, -1)[:, :rows].reshape(targets.shape) for y in outputs
    )
    return logprob, entropy if with_entropy else None


class _Static(NamedTuple):
    """What `_logprobs` depends on besides its arrays."""

    softcap: float | None
    with_entropy: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    static: _Static, hidden: jax.Array, head: jax.Array, ids: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies (or zeros) [n, W, c] of hidden [n, W, c, D], ids [n, W, c].

    The n chunks are computed one after the other. The head [V, D] is cast, and gathered from the
    devices, once for all chunks. In the backward pass each device sums the head's gradient over its
    own tokens in float32, and the sums are added over devices once. The backward pass computes the
    logits again; only where there is a single chunk are they kept, since one chunk's memory is
    allowed for anyway.
    """
    return _logprobs_forward(static, hidden, head, ids, temperature)[0]


def _logprobs_forward(static: _Static, hidden, head, ids, temperature):
    matrix = _gathered(head, hidden.dtype)
    keep = hidden.shape[0] == 1

    def chunk(_, chunk_inputs):
        h, t = chunk_inputs  # [W, c, D], [W, c]
        capped = _capped(h, matrix, static.softcap)  # [W, c, V]
        z = _times(static.softcap, capped) / temperature
        norm = jax.nn.logsumexp(z, axis=-1)  # [W, c]
        picked = jnp.sum(jnp.where(_is_target(z, t), z, 0.0), axis=-1)  # [W, c]
        entropy = jnp.zeros_like(norm)
        if static.with_entropy:
            entropy = norm - jnp.sum(jnp.exp(z - norm[..., None]) * z, axis=-1)
        return None, (picked - norm, entropy, norm, capped if keep else None)

    _, (logprob, entropy, *kept) = jax.lax.scan(chunk, None, (hidden, ids))
    return (logprob, entropy), (hidden, head, ids, temperature, entropy, *kept)


def _logprobs_backward(static: _Static, kept, cotangents):
    hidden, head, ids, temperature, entropy, norm, capped = kept
    matrix = _gathered(head, hidden.dtype)
    ways = hidden.shape[1]

    def chunk(d_head: jax.Array, chunk_inputs):
        h, t, norm, entropy, capped, g, g_entropy = chunk_inputs
        if capped is None:
            capped = _capped(h, matrix, static.softcap)
        z = _times(static.softcap, capped) / temperature - norm[..., None]  # log p: [W, c, V]
        p = jnp.exp(z)
        # d logprob / dz = [target] - p;  d entropy / dz = -p (log p + entropy)
        dz = jnp.where(_is_target(z, t), g[..., None], 0.0) - g[..., None] * p
        if static.with_entropy:
            dz -= g_entropy[..., None] * p * (z + entropy[..., None])
        if static.softcap is not None:
            dz = dz * (1.0 - capped * capped)
        d_raw = (dz / temperature).astype(h.dtype)  # [W, c, V]
        dh = jnp.einsum("wcv,vd->wcd", d_raw, matrix, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("wcv,wcd->wvd", d_raw, h, preferred_element_type=jnp.float32)
        return d_head, dh.astype(h.dtype)

    # One sum for each device's tokens: [W, V, D].
    zeros = constrain(jnp.zeros((ways, *head.shape), jnp.float32), ("tokens", "vocab", None))
    chunks = (hidden, ids, norm, entropy, capped, *cotangents)
    d_head, d_hidden = jax.lax.scan(chunk, zeros, chunks)
    return d_hidden, jnp.sum(d_head, axis=0).astype(head.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _times(softcap: float | None, capped: jax.Array) -> jax.Array:
    """Logits from what `_capped` returns."""
    return capped if softcap is None else softcap * capped


def _gathered(head: jax.Array, dtype: Any) -> jax.Array:
    """The head in the compute dtype, no longer split over the data axes."""
    return constrain(head.astype(dtype), ("vocab", None))


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

    It computes what `Gemma2ForSequenceClassification`, and that of the other families, computes in
    transformers: a linear map, without a softcap, of the state after the final norm at the last
    token that is not padding.

    Args:
      hidden: [B, T, D].
      ends: [B, S] the index in its row of the last token of each of the row's S sequences.
    """
    last = jnp.take_along_axis(hidden, ends[..., None], axis=1).astype(jnp.float32)  # [B, S, D]
    return jnp.einsum("bsd,dc->bsc", last, params["score"].astype(jnp.float32))
