"""Messages of data sets, read as turns of text with the roles system, user and assistant.

A message is {"role": .., "content": ..} or ShareGPT's {"from": .., "value": ..}. Other names of the
three roles are read too (`developer`, `human`, `gpt`, `model`, ..). Content is a text or a list of
text parts, which are joined by line breaks; any other part, such as an image, is refused.

Tool calls and their results become text that a judge can read, without loss:

    an assistant's `tool_calls` or `function_call`   [tool call] weather {"city": "Oslo"}
    a `tool` or `function` message                   a user's turn: [tool result] 4 degrees

A call is on its own line below the text of its message. Consecutive results are one turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data.rows import DataError, check_text, show

ROLES = ("system", "user", "assistant")
_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "tool": ("tool", "function", "ipython", "observation", "function_response"),
    "call": ("function_call", "tool_call"),  # ShareGPT: a message that is only a call
}
_ROLE = {name: role for role, names in _NAMES.items() for name in names}
_CALLS = ("tool_calls", "function_call")
# The fields of a message that are read; `tool_call_id` only says to which call a result belongs.
_READ = {"role", "content", "from", "value", "name", "tool_call_id", *_CALLS}
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_turns(name: str, messages: Any, unused: set[str] | None = None) -> tuple[Turn, ...]:
    """The turns of a list of messages, in order; roles and texts are checked.

    Args:
        name: the name of the field, for errors: `name[i].content`.
        messages: the value of the field.
        unused: names of non-empty message fields that were not read are added to it.

    Raises:
        DataError: not a list of messages, an unknown role, content that is not text.
    """
    if not isinstance(messages, list):
        raise DataError(name, show(messages), "give a list of messages")
    turns: list[Turn] = []
    after_result = False
    for i, message in enumerate(messages):
        role, text = _message(f"{name}[{i}]", message, set() if unused is None else unused)
        if role == "tool":
            if after_result:
                turns[-1] = Turn(role="user", content=f"{turns[-1]['content']}\n{text}")
                continue
            role = "user"
            after_result = True
        else:
            after_result = False
        turns.append(Turn(role=role, content=text))
    return tuple(turns)


def read_conversation(name: str, messages: Any) -> tuple[Turn, ...]:
    """The turns of a benchmark's conversation, of which the last is the user's.

    Its text may be empty, as in some rows of published files. Raises DataError naming `name[i]`.
    """
    turns = read_turns(name, messages)
    check_turns(name, turns, filled=False)
    return turns


def is_message(value: Any) -> bool:
    """Whether a value looks like one message."""
    return isinstance(value, Mapping) and (
        "content" in value or "value" in value or any(value.get(name) for name in _CALLS)
    )


def transcript(turns: Iterable[Turn]) -> str:
    """The turns of a reply as one text: the first as it is, the others below their role.

    The result of a tool has no heading, since its text begins with one.

    >>> transcript([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
    'a\\n\\n[user]\\nb'
    """
    said = []
    for turn in turns:
        plain = not said or _is_result(turn)
        said.append(turn["content"] if plain else f"[{turn['role']}]\n{turn['content']}")
    return "\n\n".join(said)


def split_replies(
    conversations: Sequence[tuple[Turn, ...]],
) -> tuple[tuple[Turn, ...], tuple[str, ...]] | None:
    """Split whole conversations into their common turns and, for each, the rest as one text.

    The common part ends with a user's turn. The rest begins and ends with the assistant's and has
    the same questions of the user in all conversations; otherwise the result is None.
    """
    shared = 0
    for column in zip(*(turns[:-1] for turns in conversations), strict=False):
        if any(turn != column[0] for turn in column):
            break
        shared += 1
    while shared and conversations[0][shared - 1]["role"] != "user":
        shared -= 1
    rest = [turns[shared:] for turns in conversations]
    asked = [[turn for turn in turns if turn["role"] == "user" and not _is_result(turn)]
             for turns in rest]  # fmt: skip
    if not shared or any(questions != asked[0] for questions in asked):
        return None
    if any(turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant" for turns in rest):
        return None
    return conversations[0][:shared], tuple(transcript(turns) for turns in rest)


def _is_result(turn: Turn) -> bool:
    """Whether the turn is the result of a tool, which may differ between conversations."""
    return turn["content"].startswith("[tool result")


def split_hh(text: str) -> tuple[Turn, ...] | None:
    r"""The turns of "\n\nHuman: a\n\nAssistant: b.."; None for a text of another form.

    Texts are trimmed. An empty reply at the end, where an answer is to follow, is dropped.
    """
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        return None
    role = {"Human": "user", "Assistant": "assistant"}
    turns = [
        Turn(role=role[who], content=said.strip())
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1] == Turn(role="assistant", content=""):
        turns.pop()
    return tuple(turns)


def check_turn(name: str, turn: Turn) -> None:
    """Raise DataError unless the role is one of `ROLES` and the content is text."""
    if turn["role"] not in ROLES:
        raise DataError(f"{name}.role", show(turn["role"]), f"use one of {', '.join(ROLES)}")
    check_text(f"{name}.content", turn["content"])


def check_turns(name: str, turns: Any, *, filled: bool = True) -> None:
    """Raise DataError unless these are turns, the last one the user's and (`filled`) not empty."""
    if not isinstance(turns, tuple) or not turns:
        raise DataError(name, show(turns), "give at least the user's turn")
    for i, turn in enumerate(turns):
        check_turn(f"{name}[{i}]", turn)
    if turns[-1]["role"] != "user":
        raise DataError(
            name,
            f"the last turn is the {turns[-1]['role']}'s",
            "end with the user's turn: replies to judge stand in the responses",
        )
    if filled:
        last = name if len(turns) == 1 else f"{name}[-1]"
        check_text(last, turns[-1]["content"], filled=True)


def _message(name: str, message: Any, unused: set[str]) -> tuple[str, str]:
    """(role, text) of one message. The caller turns the role `tool` into a user's turn."""
    if not isinstance(message, Mapping):
        raise DataError(name, show(message), "give {'role': 'user', 'content': '...'}")
    given = {key: value for key, value in message.items() if value is not None}
    keys = ("from", "value") if "role" not in given and "from" in given else ("role", "content")
    who = given.get(keys[0])
    if who is None or (keys[1] not in message and not any(given.get(c) for c in _CALLS)):
        raise DataError(name, show(message), "give {'role': 'user', 'content': '...'}")
    role = _ROLE.get(who.strip().lower()) if isinstance(who, str) else None
    if role is None:
        raise DataError(f"{name}.{keys[0]}", show(who), f"use one of {', '.join(ROLES)}, tool")
    for medium in _MEDIA:
        if given.get(medium):
            raise DataError(f"{name}.{medium}", "not text", "a judge reads only text")
    unused |= {key for key, value in given.items() if key not in _READ and value not in ("", [])}
    calls = [line for call in _CALLS for line in _calls(f"{name}.{call}", given.get(call))]
    if keys[1] in given or not calls:
        text = _content(f"{name}.{keys[1]}", given.get(keys[1]))
    else:
        text = ""
    if role == "tool":
        label = f"tool result: {given['name']}" if given.get("name") else "tool result"
        return role, f"[{label}] {text}"
    if role == "call":
        role, calls, text = "assistant", [f"[tool call] {text}", *calls], ""
    if calls and role != "assistant":
        raise DataError(name, f"a tool call of the {role}", "tool turns: the assistant calls")
    return role, "\n".join([text, *calls] if text else calls or [text])


def _content(name: str, content: Any) -> str:
    """A text, or a list of text parts."""
    if not isinstance(content, list):
        check_text(name, content)
        return content
    texts = []
    for i, part in enumerate(content):
        place = f"{name}[{i}]"
        if isinstance(part, str):
            text = part
        elif isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS:
            text = part.get("text")
        else:
            what = part.get("type") if isinstance(part, Mapping) else None
            problem = f"a part of type {what!r}, not text" if what else show(part)
            raise DataError(place, problem, "give text parts: a judge reads only text")
        check_text(place, text)
        texts.append(text)
    return "\n".join(texts)


def _calls(name: str, calls: Any) -> list[str]:
    """One line for each call: name and arguments, or the JSON of a call of another form."""
    if not calls:
        return []
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            arguments = inner.get("arguments")
            shown = arguments if isinstance(arguments, str) else _json(name, arguments)
            lines.append(f"[tool call] {inner['name']} {shown or ''}".rstrip())
        else:
            lines.append(f"[tool call] {call if isinstance(call, str) else _json(name, call)}")
    for line in lines:
        check_text(name, line)
    return lines


def _json(name: str, value: Any) -> str:
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise DataError(name, show(value), "tool turns: give a call as JSON") from None
