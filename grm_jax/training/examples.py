"""Trajectories and preferences as token examples, and the losses' forward passes.

One function per kind of model input; every stage builds its examples and log-probabilities here, so
trainer and sampler see the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grm_jax.critique import Template, render
from grm_jax.critique.prompt import Turn
from grm_jax.data.loader import Example
from grm_jax.data.trajectories import Instruction, Trajectory
from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Remat, encode, encode_packed
from grm_jax.model.heads import scalar, take_rows, token_logprobs
from grm_jax.model.params import Params
from grm_jax.model.shared_prefix import encode_completions
from grm_jax.sampler.critic import TemplateConfig, Templates
from grm_jax.tokenizer import Tokenizer
from grm_jax.tokenizer.folding import conversation_ids
from grm_jax.training.step import Batch


def trajectory_example(
    trajectory: Trajectory | Instruction,
    tokenizer: Tokenizer,
    templates: TemplateConfig | Templates,
) -> Example:
    """Prompt (never hinted: hints only help sampling) and critique, or an instruction and reply."""
    if isinstance(trajectory, Instruction):
        prompt = conversation_ids(tokenizer, trajectory.messages[:-1])
        reply = tokenizer.completion(trajectory.messages[-1]["content"])
        return Example(tuple(prompt), tuple(reply))
    name = templates.single if len(trajectory.responses) == 1 else templates.many
    messages = render(
        Template.load(name),
        trajectory.query,
        trajectory.responses,
        reference=trajectory.reference,
        principles=trajectory.principles,
    )
    prompt = tokenizer.chat(messages)
    return Example(tuple(prompt), tuple(tokenizer.completion(trajectory.critique)))


def meta_example(
    query: str | Sequence[Turn],
    responses: Sequence[str],
    critique: str,
    tokenizer: Tokenizer,
    template: Template,
    label: float = 0.0,
    *,
    reference: str | None = None,
    principles: Sequence[str] | None = None,
) -> Example:
    """What the meta RM reads: what the judge was shown as the user's turn, critique as the reply.

    Raises TemplateError for a reference or principles that the template has no place for.
    """
    prompt = tokenizer.chat(
        render(template, query, responses, reference=reference, principles=principles)
    )
    return Example(tuple(prompt), tuple(tokenizer.completion(critique)), label)


def reply_example(query: str | Sequence[Turn], response: str, tokenizer: Tokenizer) -> Example:
    """What the scalar baseline reads: the conversation and one response as the reply."""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
    prompt = conversation_ids(tokenizer, turns)
    return Example(tuple(prompt), tuple(tokenizer.completion(response)))


def encode_batch(params: Params, config: ModelConfig, batch: Batch, *, remat: Remat) -> jax.Array:
    """Hidden states [B, T, D] of a collated batch, packed or not."""
    if "segments" in batch:
        given = batch["tokens"], batch["positions"], batch["segments"]
        return encode_packed(params, config, *given, remat=remat)
    return encode(params, config, batch["tokens"], batch["lengths"], remat=remat)


def critique_scores(
    params: Params, config: ModelConfig, batch: Batch, *, remat: Remat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scores, labels, weights) of a collated batch: [B], or [B, S] of a packed one."""
    hidden = encode_batch(params, config, batch, remat=remat)
    if "ends" in batch:
        return scalar(params, hidden, batch["ends"])[..., 0], batch["labels"], batch["weights"]
    scores = scalar(params, hidden, batch["lengths"][:, None] - 1)[:, 0, 0]
    return scores, batch["labels"], jnp.ones_like(scores)


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

    The prompt's tokens are dropped before the head: it sees C of T tokens.
    """
    hidden = encode_batch(params, config, batch, remat=remat)
    if "slots" in batch:
        hidden = jnp.take_along_axis(hidden, batch["slots"][..., None], axis=1)
    else:
        # Token t of the completion is predicted from the position before it.
        hidden = take_rows(hidden, batch["starts"] - 1, batch["targets"].shape[1])
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
    )
    return token_logprobs(
        params,
        config,
        hidden,
        batch["targets"],
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
    )
