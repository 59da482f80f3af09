"""Conversations for chat templates that only take alternating user and assistant turns.

Gemma's template has no system role and requires the user to begin. Other conversations are folded
into such turns:

    system: Be brief.  user: Hello  user: What is 2 + 2?
        ->  user: Be brief.\\n\\nHello\\n\\nWhat is 2 + 2?
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from grm_jax.tokenizer.tokenizer import Tokenizer
from grm_jax.tokenizer.vocabulary import TokenizerError

log = logging.getLogger("grm_jax")


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation and the generation prompt; the conversation is folded if the
    checkpoint's chat template refuses its roles.

    Raises TokenizerError when the template refuses the folded conversation, too.
    """
    try:
        return tokenizer.chat(messages)
    except TokenizerError:
        folded = fold(messages)
        if [m["role"] for m in folded] == [m["role"] for m in messages]:
            raise
        ids = tokenizer.chat(folded)
    _say_so(tokenizer.name)
    return ids


def fold(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The conversation as alternating turns: system texts become the user's, and consecutive turns
    of one role are joined by an empty line."""
    folded: list[dict[str, str]] = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if folded and folded[-1]["role"] == role:
            folded[-1]["content"] += "\n\n" + message["content"]
        else:
            folded.append({"role": role, "content": message["content"]})
    return folded


@functools.cache
def _say_so(name: str) -> None:
    log.info(
        "%s: its chat template takes alternating user and assistant turns alone; system texts and "
        "neighbouring turns of one speaker are joined into them",
        name,
    )
