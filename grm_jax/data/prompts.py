"""The prompt of a row, from whichever field has it, as turns.

The field is one of `query`, `turns`, `prompt`, `messages`, `question`, `conversations`,
`instruction` (with `input` below it and `history` before it), or else `context` or `input`: a text,
a list of messages, or HH's "\\n\\nHuman: ..\\n\\nAssistant:". A field `system` or `system_prompt`
becomes a system turn.
"""

from __future__ import annotations

import re

from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import check_turns, read_turns, split_hh
from grm_jax.data.fields import Fields
from grm_jax.data.rows import DataError, check_text, show

PROMPTS = ("query", "turns", "prompt", "messages", "question", "conversations", "instruction")
# Used only if there is no other prompt: many data sets have fields of these names.
LAST_PROMPTS = ("context", "input")
_SYSTEM = ("system", "system_prompt")
_TEXTS = ("query", "question", "input")
_LISTS = ("turns", "messages", "conversations")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def read_prompt(fields: Fields) -> tuple[Turn, ...]:
    """The turns of the prompt, without the system text of another field. Raises DataError."""
    last = next((name for name in LAST_PROMPTS if name in fields), None)
    if last is None or any(name in fields for name in PROMPTS):
        name = fields.one_of(PROMPTS)
    else:
        name = last
    value = fields.get(name)
    if name == "instruction":
        return _instruction(fields)
    if isinstance(value, str) and name not in _LISTS:
        check_text(name, value, filled=True)
        return _spoken(value)
    if name in _TEXTS:
        raise DataError(name, show(value), "give a string")
    wanted = "a list of messages" if name in _LISTS else "a string or a list of messages"
    turns = read_turns(name, fields.items(name, f"give {wanted}"), fields.unused)
    check_turns(name, turns)
    return turns


def _spoken(text: str) -> tuple[Turn, ...]:
    """A prompt in one text: the user's turn, or HH's conversation before the reply."""
    if text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:"):
        turns = split_hh(text)
        if turns is not None:
            return turns
    return (Turn(role="user", content=text),)


def _instruction(fields: Fields) -> tuple[Turn, ...]:
    """Alpaca: the instruction and its input below it, after the pairs of texts in `history`."""
    text = fields.text("instruction", filled=True)
    more = fields.get("input")
    if more is not None:
        check_text("input", more)
        text = f"{text}\n{more}" if more.strip() else text
    turns: list[Turn] = []
    pairs = fields.items("history", "give a list of pairs") if "history" in fields else []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{i}]", show(pair), "give [instruction, answer]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            check_text(f"history[{i}]", said)
            turns.append(Turn(role=role, content=said))
    return (*turns, Turn(role="user", content=text))


def with_system(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns, after a system turn if the row has a system text."""
    given = [name for name in _SYSTEM if name in fields and fields.get(name) != ""]
    if not given:
        return turns
    name = fields.one_of(_SYSTEM) if len(given) > 1 else given[0]
    text = fields.text(name)
    if not text.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != text:
            raise DataError(name, "given together with another system turn", "give one of the two")
        return turns
    return (Turn(role="system", content=text), *turns)


def helpsteer_prompt(fields: Fields) -> tuple[Turn, ...]:
    """HelpSteer's prompt: one text with its turns separated by lines "<extra_id_1>Assistant"."""
    turns = read_prompt(fields)
    if len(turns) != 1:
        return turns
    first, *parts = _EXTRA_ID.split(turns[0]["content"])
    said = [("user", first), *zip(map(str.lower, parts[::2]), parts[1::2], strict=True)]
    return tuple(Turn(role=role, content=text) for role, text in said)
