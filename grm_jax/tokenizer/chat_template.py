"""A checkpoint's chat template, and the places of the messages in the text that it renders.

The template is rendered with a placeholder for each message and split at the placeholders. The rest
is the *scaffold*, the only text from which control tokens may come.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grm_jax.tokenizer.vocabulary import CLOSE, OPEN, TokenizerError

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role'])"
    " + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)

# The exceptions that a template can raise; a template is a program.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    LookupError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RecursionError,
)
_PAD = "\u2003"  # an em space: `trim` removes it, and no template writes one


@dataclass(frozen=True)
class Slot:
    """Where message `index` goes in a rendered template, and which of its sides are trimmed."""

    index: int
    lstrip: bool
    rstrip: bool

    def fill(self, contents: Sequence[str]) -> str:
        text = contents[self.index]
        text = text.lstrip() if self.lstrip else text
        return text.rstrip() if self.rstrip else text


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for loss masks elsewhere; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """The date that a template shows as today's: always 26 July 2024, which Llama-3's templates
    show where they are given none. With the true one a judge's prompts, and with them its samples
    and what it was trained on, would be others each day.
    """
    return datetime(2024, 7, 26).strftime(form)


class ChatTemplate:
    """A checkpoint's chat template, compiled once, in the environment transformers gives it."""

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = _strftime_now
        self.source, self.where, self._variables = source, where, dict(variables)
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateError as e:
            raise TokenizerError(f"{where}: the chat template does not compile: {e}") from e
        self._nonce = secrets.token_hex(8)
        self._split = re.compile(f"({_PAD}?){OPEN}{self._nonce}\\.(\\d+){CLOSE}({_PAD}?)")

    def render(self, roles: Sequence[str], contents: Sequence[str], generation_prompt: bool) -> str:
        """The conversation as text. `TokenizerError` where the template refuses it.

        Templates that can ask a model to think first, as Qwen3's, are told not to: the reasoning
        that is trained and voted on is the critique itself.
        """
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=generation_prompt,
                enable_thinking=False,
                **self._variables,
            )
        except _FAILURES as e:
            raise TokenizerError(
                f"{self.where}: the chat template refused roles {list(roles)}: {e}"
            ) from e

    def scaffold(self, roles: Sequence[str], generation_prompt: bool) -> tuple[str | Slot, ...]:
        """The rendered template cut at its messages: scaffold text and slots in turn."""
        marked = [f"{_PAD}{OPEN}{self._nonce}.{i}{CLOSE}{_PAD}" for i in range(len(roles))]
        cut = self._split.split(self.render(roles, marked, generation_prompt))
        pieces: list[str | Slot] = [cut[0]]
        for left, index, right, literal in zip(*(iter(cut[1:]),) * 4, strict=True):
            pieces += [Slot(int(index), not left, not right), literal]
        if any(self._nonce in p or OPEN in p for p in pieces if isinstance(p, str)):
            raise TokenizerError(
                f"{self.where}: the chat template rewrites message contents (more than trimming "
                "them), so scaffold and message cannot be told apart; use a template that inserts "
                "contents unchanged"
            )
        return tuple(p for p in pieces if p != "")
