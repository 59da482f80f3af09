"""A policy's prompt with its chat tokens -> turns; what a policy wrote -> plain text.

Trainers send what their policy read and wrote, in the policy's own markup:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   ->   [user: Hi]

The judge has a markup of its own, so the policy's would only be noise, and a hint at which model
wrote the response. Known markups are read; a text of another one is the user's, as it stands.
"""

from __future__ import annotations

import re

from grm_jax.critique.prompt import Turn
from grm_jax.data.rows import DataError

# A heading opens a turn, and what is between it and the next heading is its text.
_ROLE = r"(?P<role>system|developer|user|human|assistant|model|tool|ipython)"
_MARKUPS = tuple(
    (re.compile(heading), re.compile(rf"\s*(?:{ends})\s*\Z"))
    for heading, ends in (
        # ChatML: Qwen, Yi, InternLM, OLMo
        (rf"<\|im_start\|>{_ROLE}\n?", r"<\|im_end\|>"),
        # Llama 3 and 4
        (rf"<\|start_header_id\|>{_ROLE}<\|end_header_id\|>\n*", r"<\|eot_id\|>|<\|eom_id\|>"),
        (rf"<\|header_start\|>{_ROLE}<\|header_end\|>\n*", r"<\|eot\|>"),
        # Gemma
        (rf"<start_of_turn>{_ROLE}\n?", r"<end_of_turn>"),
        (rf"<\|turn>{_ROLE}\n?", r"<turn\|>"),
        # DeepSeek
        (r"<｜(?P<role>User|Assistant)｜>", r"<｜end▁of▁sentence｜>"),
        # gpt-oss
        (
            rf"<\|start\|>{_ROLE}(?:<\|channel\|>\w+)?(?:<\|message\|>|\Z)",
            r"<\|end\|>|<\|return\|>",
        ),
        # Phi, Zephyr
        (rf"<\|{_ROLE}\|>\n?", r"<\|end\|>|</s>|<\|endoftext\|>"),
    )
)
_MISTRAL = re.compile(
    r"\[INST\]\s*(.*?)\s*\[/INST\]\s*(.*?)\s*(?=(?:</s>\s*)?(?:<s>)?\s*\[INST\]|\Z)", re.S
)
_LLAMA_SYSTEM = re.compile(r"\A<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.S)
_NAMES = {"human": "user", "model": "assistant", "developer": "system", "ipython": "tool"}
_BEGIN = re.compile(
    r"\A(?:\s*(?:<s>|<bos>|<pad>|<\|begin_of_text\|>|<\|startoftext\|>|<\|endoftext\|>"
    r"|<｜begin▁of▁sentence｜>))+"
)
_END = re.compile(
    r"(?:\s*(?:</s>|<eos>|<pad>|<\|endoftext\|>|<\|end_of_text\|>|<\|eot_id\|>|<\|eom_id\|>"
    r"|<\|eot\|>|<\|im_end\|>|<end_of_turn>|<turn\|>|<\|end\|>|<\|return\|>|<\|finetune_right_pad_id\|>"
    r"|<｜end▁of▁sentence｜>|<｜▁pad▁｜>))+\s*\Z"
)
_TAIL = 64  # characters of a prompt's end by which a prompt cut at its front is found


def read_prompt(text: str) -> tuple[list[Turn], str]:
    """The turns of a prompt, and what it has already put into the assistant's mouth (a `<think>`
    that a template opens; "" for most), which belongs to the response.

    Raises DataError for a prompt that holds no user's turn.
    """
    text = _BEGIN.sub("", text)
    turns = _turns(text)
    begun = ""
    if turns and turns[-1]["role"] == "assistant":
        begun = turns.pop()["content"]
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise DataError("prompt", "no user's turn in it", "send what the policy answered, whole")
    return turns, begun


def read_conversation(text: str) -> tuple[list[Turn], str] | None:
    """The turns before the last reply of a whole conversation, and that reply; None for a text
    without known markup, or that does not end with the assistant's turn."""
    turns = _turns(_END.sub("", _BEGIN.sub("", text)))
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or turns[-2]["role"] == "assistant":
        return None
    return turns[:-1], turns[-1]["content"]


def read_response(text: str) -> str:
    """What a policy wrote, without the tokens that ended it."""
    return _END.sub("", text)


def split(query: str, prompt: str) -> str:
    """What follows the prompt in a query. Raises DataError where the query does not begin with it.

    Decoding need not give back the prompt as it was: a second `<bos>` may stand before it, and a
    prompt that was too long lacks its beginning.
    """
    query, prompt = _BEGIN.sub("", query), _BEGIN.sub("", prompt)
    if query.startswith(prompt):
        return query[len(prompt) :]
    tail = prompt[-_TAIL:]
    at = query.find(tail) if len(tail) == _TAIL else -1
    while at >= 0:
        if prompt.endswith(query[: at + _TAIL]):
            return query[at + _TAIL :]
        at = query.find(tail, at + 1)
    raise DataError("query", "does not begin with its prompt", "send prompt and response, joined")


def _turns(text: str) -> list[Turn]:
    """Turns by the markup whose heading comes first; one of the user without any."""
    found = [(match.start(), heading, end) for heading, end in _MARKUPS
             if (match := heading.search(text))]  # fmt: skip
    if not found:
        return _mistral(text) or [_turn("user", text)]
    first, heading, end = min(found, key=lambda row: row[0])
    turns = []
    if text[:first].strip():  # DeepSeek's system prompt has no heading
        turns.append(_turn("system", end.sub("", text[:first])))
    matches = list(heading.finditer(text))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        content = text[match.end() : following.start() if following else len(text)]
        role = match["role"].lower()
        closed = end.search(content)
        # The last turn is open where the policy goes on: its spaces are its own.
        content = end.sub("", content) if closed or following else content
        turns.append(_turn(_NAMES.get(role, role), content))
    if turns[-1]["role"] != "assistant":
        turns[-1] = _turn(turns[-1]["role"], turns[-1]["content"].rstrip())
    return turns


def _mistral(text: str) -> list[Turn]:
    """Mistral's and Llama 2's turns: only the user's are marked."""
    turns = []
    for i, match in enumerate(_MISTRAL.finditer(text)):
        asked = match[1]
        system = _LLAMA_SYSTEM.match(asked) if i == 0 else None
        if system:
            turns.append(_turn("system", system[1]))
            asked = asked[system.end() :]
        turns.append(_turn("user", asked))
        if match[2]:
            turns.append(_turn("assistant", _END.sub("", match[2])))
    return turns


def _turn(role: str, content: str) -> Turn:
    return Turn(role=role, content=content)
