"""Trajectories and preferences as token examples: one function for each kind of model input.

Every stage builds its examples here, from the templates that the judge's prompts are made of, so
that training and sampling see the same prompts.
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
    """The prompt of a trajectory with its critique, or of an instruction with its reply.

    The prompt never contains a hint: hints only help sampling.
    """
    if isinstance(trajectory, Instruction):
        prompt = conversation_ids(tokenizer, trajectory.messages[:-1])
        reply = tokenizer.completion(trajectory.messages[-1]["content"])
        return Example(tuple(prompt), tuple(reply))
    template = templates.single if len(trajectory.responses) == 1 else templates.many
    messages = render(
        Template.load(template),
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
    """The input of the meta RM: the query and the responses as the user's turn, the critique as the
    reply.

    Args:
      responses: in the order in which the judge was shown them.
      label: 1 if the critique is correct, else 0.

    Raises TemplateError for a reference or principles that the template does not show.
    """
    prompt = tokenizer.chat(
        render(template, query, responses, reference=reference, principles=principles)
    )
    return Example(tuple(prompt), tuple(tokenizer.completion(critique)), label)


def reply_example(query: str | Sequence[Turn], response: str, tokenizer: Tokenizer) -> Example:
    """The input of the scalar baseline: the conversation, with one response as the reply."""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
    prompt = conversation_ids(tokenizer, turns)
    return Example(tuple(prompt), tuple(tokenizer.completion(response)))
