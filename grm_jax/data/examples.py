"""Trajectories and preferences as token examples, and the losses' forward passes.

One function per kind of model input; every stage builds its examples and log-probabilities here, so
trainer and sampler see the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from grm_jax.critique import Template, render
from grm_jax.critique.prompt import Turn
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.collate import Example
from grm_jax.data.trajectories import Instruction, Trajectory
from grm_jax.tokenizer import Tokenizer
from grm_jax.tokenizer.folding import conversation_ids


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
        trajectory.shown,
        reference=trajectory.reference,
        principles=trajectory.principles,
    )
    prompt = tokenizer.chat(messages)
    return Example(tuple(prompt), tuple(tokenizer.completion(trajectory.text)))


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
