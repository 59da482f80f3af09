"""From a query and responses (and a hint, a reference, principles) to chat messages.

There is one user message and no system prompt, as the released DeepSeek-GRM models expect.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from grm_jax.critique.neutralise import break_speakers, neutralise
from grm_jax.critique.template import OPTIONAL, Template, TemplateError, hint_text
from grm_jax.errors import UserError


class Turn(TypedDict):
    """One turn of the judged conversation. role: `system`, `user` or `assistant`."""

    role: str
    content: str


class Message(TypedDict):
    """One message to the judge."""

    role: str
    content: str


_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


def render(
    template: Template | str | Path,
    query: str | Sequence[Turn],
    responses: Sequence[str],
    *,
    hint: str | None = None,
    reference: str | None = None,
    principles: Sequence[str] | None = None,
) -> list[Message]:
    """The chat messages that ask for a critique of `responses`, in the order given.

    Args:
        template: a `Template`, or what `Template.load` takes.
        query: the user's query, or a conversation whose last turn is the user's query.
        responses: n texts, n >= 1. An empty text is legal.
        hint: from `Template.hint_text`, for hinted sampling only.
        reference: a reference answer to judge against (the paper's Table 12).
        principles: principles to judge by, instead of leaving all of them to the model (Eq. 8).

    Returns:
        One user message. Outside text in it is neutralised (`neutralise`).

    Raises:
        ValueError: no responses, too many for the template, a single one for a template that reads
            the place of the best, a conversation that does not end with the user's turn, or an
            empty list of principles.
        TypeError: a query, response, reference, hint or principle that is not text.
        TemplateError: an unusable template, or one without the optional segment that was given.
    """
    if not isinstance(template, Template):
        template = Template.load(template)
    responses = _check_responses(template, responses)
    segments = {"hint": hint, "reference": reference, "principles": principles}
    for name in OPTIONAL:
        if segments[name] is not None and name not in template.uses:
            raise TemplateError(
                f"{template.origin}: {name} was given, but the template never uses {name!r}; "
                f"add {{{{ {name} }}}} to it or leave {name} out"
            )
    if principles is not None:
        if isinstance(principles, str) or not principles:
            raise UserError(
                f"principles is {principles!r}; give a list with at least one text, or None"
            )
        principles = [
            neutralise(_text(principle, f"principles[{index}]"), template)
            for index, principle in enumerate(principles)
        ]
    n = len(responses)
    content = template.fill(
        query=_conversation(query, template),
        responses=[neutralise(response, template) for response in responses],
        letters=list(string.ascii_uppercase[:n]),
        hint=None if hint is None else _hint(_text(hint, "hint"), template, n),
        reference=None
        if reference is None
        else neutralise(_text(reference, "reference"), template),
        principles=principles,
    )
    return [{"role": "user", "content": content}]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text; give a str")
    return value


def _check_responses(template: Template, responses: Sequence[str]) -> list[str]:
    if isinstance(responses, str):
        raise TypeError("responses is one text; give a list of texts: [response]")
    texts = [_text(response, f"responses[{index}]") for index, response in enumerate(responses)]
    if not texts:
        raise UserError("responses is empty; there is nothing to judge, give at least one")
    if template.single and len(texts) != 1:
        raise UserError(
            f"template {template.name!r} judges a single response, got {len(texts)}; "
            "use a template for several (grm, compact)"
        )
    if template.reads == "index" and len(texts) == 1:
        # Every critique would count as right, or be out of range.
        raise UserError(
            f"template {template.name!r} asks which response is the best, and there is only "
            "one; use a template with reads=scores (single, compact_single)"
        )
    if template.labels == "letter" and len(texts) > len(string.ascii_uppercase):
        raise UserError(
            f"template {template.name!r} names responses by a letter, at most "
            f"{len(string.ascii_uppercase)}, got {len(texts)}; use a template that numbers them"
        )
    return texts


def _hint(hint: str, template: Template, n: int) -> str:
    # Hints made here name a response by a tag that text from outside must not forge ("best [B]").
    if n == 1:
        our_hints = {template.hint_text(0, 1, (right,)) for right in (0, 1)}
    else:
        our_hints = {template.hint_text(best, n) for best in range(n)}
    return hint if hint in our_hints else neutralise(hint, template)


def _conversation(query: str | Sequence[Turn], template: Template) -> str:
    """A single query as it is; several turns as lines `User: ...` and `Assistant: ...`."""
    if isinstance(query, str):
        return neutralise(query, template)
    turns = list(query)
    if not turns:
        raise UserError("query has no turns; the last turn must be the user's query")
    for index, turn in enumerate(turns):
        if turn["role"] not in _SPEAKERS:
            raise UserError(
                f"query[{index}]: role {turn['role']!r}; a role is one of {', '.join(_SPEAKERS)}"
            )
        _text(turn["content"], f"query[{index}].content")
    if turns[-1]["role"] != "user":
        raise UserError(
            f"the last turn of the query is {turns[-1]['role']!r}, not 'user'; "
            "the responses under judgement belong in `responses`"
        )
    if len(turns) == 1:
        return neutralise(turns[0]["content"], template)
    return "\n".join(
        f"{_SPEAKERS[turn['role']]}: " + break_speakers(neutralise(turn["content"], template))
        for turn in turns
    )


__all__ = ["Message", "Turn", "hint_text", "render"]
