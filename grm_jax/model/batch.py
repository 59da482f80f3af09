"""Forward passes of collated batches: hidden states, scores and log-probabilities of completions.

`data.collate` and `data.packing` make these batches and say which arrays each kind has.

Dimensions: B rows, T tokens, D embedding, C completion slots, G completions of a prompt, S packed
examples of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.heads import logits, scalar, take_rows, token_logprobs
from grm_jax.model.options import Remat
from grm_jax.model.params import Params
from grm_jax.model.shared_prefix import encode_completions
from grm_jax.model.transformer import encode, encode_packed

Batch = dict[str, jax.Array]


def encode_batch(params: Params, config: ModelConfig, batch: Batch, *, remat: Remat) -> jax.Array:
    """Hidden states [B, T, D] of a collated batch, packed or not."""
    if "segments" in batch:
        packed = batch["tokens"], batch["positions"], batch["segments"]
        return encode_packed(params, config, *packed, remat=remat)
    return encode(params, config, batch["tokens"], batch["lengths"], remat=remat)


def critique_scores(
    params: Params, config: ModelConfig, batch: Batch, *, remat: Remat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scores, labels, weights) of a collated batch, each [B], or [B, S] for a packed batch.

    The scores are those of the scalar head at the end of each example.
    """
    hidden = encode_batch(params, config, batch, remat=remat)  # [B, T, D]
    if "ends" in batch:
        return scalar(params, hidden, batch["ends"])[..., 0], batch["labels"], batch["weights"]
    scores = scalar(params, hidden, batch["lengths"][:, None] - 1)[:, 0, 0]
    return scores, batch["labels"], jnp.ones_like(scores)


def row_scores(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    remat: Remat = "none",
) -> jax.Array:
    """The scalar head's score [B] of right-padded rows: tokens [B, T], lengths [B]."""
    hidden = encode(params, config, tokens, lengths, remat=remat)
    return scalar(params, hidden, lengths[:, None] - 1)[:, 0, 0]


def next_logprobs(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    """The log-probability [B, L] of each target as the token behind its row, at temperature 1.

    Args:
      params: as trained, or as the sampler has them laid out.
      tokens: [B, T] right-padded rows of `lengths` [B] tokens. targets: [B, L] token ids.
    """
    hidden = encode(params, config, tokens, lengths)  # [B, T, D]
    z = logits(params, config, take_rows(hidden, lengths - 1, 1)[:, 0])  # [B, V]
    norm = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return jnp.take_along_axis(z, targets, axis=-1) - norm


def completion_logprobs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    temperature: float,
    remat: Remat,
    chunk: int,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probabilities [B, C] (and entropies) of the completion tokens of a collated batch, packed
    or not.

    The states of prompt tokens are dropped before the head, which then computes logits for C
    instead of T tokens of a row. `chunk`, `temperature` and `with_entropy` are arguments of
    `heads.token_logprobs`.
    """
    hidden = encode_batch(params, config, batch, remat=remat)  # [B, T, D]
    if "slots" in batch:
        hidden = jnp.take_along_axis(hidden, batch["slots"][..., None], axis=1)  # [B, C, D]
    else:
        # Token t of the completion is predicted from the position before it.
        hidden = take_rows(hidden, batch["starts"] - 1, batch["targets"].shape[1])  # [B, C, D]
    return token_logprobs(
        params,
        config,
        hidden,
        batch["targets"],
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
    )


def group_logprobs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    temperature: float,
    remat: Remat,
    chunk: int,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`completion_logprobs` [B, G, C] of a `collate_groups` batch, each prompt computed once."""
    hidden = encode_completions(
        params, config, batch["prompts"], batch["lengths"], batch["targets"], remat=remat
    )  # [B, G, C, D]
    return token_logprobs(
        params,
        config,
        hidden,
        batch["targets"],
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
    )
