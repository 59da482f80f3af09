"""One small protocol over Hugging Face (`tokenizer.json`) and sentencepiece tokenizers.

Text from outside is only text. A tokenizer usually finds its control tokens by literal match, so a
response that contains `<end_of_turn>` would end the turn. This cannot happen here, since the
encoder of text does not know these tokens (`vocabulary.py`). Control ids come only from the
scaffold of the chat template (`chat_template.py`): the template is rendered with a placeholder for
each message, and only the text *between* the placeholders is searched for control literals. All
text between two control tokens, scaffold and message together, is encoded at once. So for ordinary
text the ids are those of `transformers`' `apply_chat_template`, with merges across the boundary.

    <bos><start_of_turn>user\\n{message 0}<end_of_turn>\\n<start_of_turn>model\\n
    [ 2 ][    106      ][-- one text ---][    107    ][-][    106      ][-text-]

`transformers` is not imported, since it takes seconds to start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grm_jax.tokenizer.chat_template import ChatTemplate, Slot
from grm_jax.tokenizer.files import write_folder
from grm_jax.tokenizer.vocabulary import Position, TokenizerError, Vocabulary

__all__ = ["ChatTokenizer", "Tokenizer", "TokenizerError"]

_MAX_PLANS = 1024
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


class Tokenizer(Protocol):
    """What the library needs of a tokenizer: see `load_tokenizer` and `from_tokenizers`."""

    @property
    def name(self) -> str:
        """For logs: folder, backend and number of ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """Largest id + 1. A model's embedding may have more rows, never fewer."""
        ...

    @property
    def pad_id(self) -> int:
        """Filler for arrays. Lengths, not this id, say what is real."""
        ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What the checkpoint's own tokenizer puts before a text that is not in its chat format:
        bos, or nothing, even where there is a bos (SmolLM2)."""
        ...

    @property
    def eos_id(self) -> int: ...

    @property
    def end_id(self) -> int:
        """The id that ends an assistant turn in this chat format (Gemma: `<end_of_turn>`)."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where sampling stops: eos, `end_id`, `<end_of_turn>`, generation_config.json's list."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text can produce."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS, never a control id."""
        ...

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """Text of `ids`; control ids are left out, or written as their literals."""
        ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation `[{"role", "content"}, ...]` in the checkpoint's chat format."""
        ...

    def completion(self, text: str) -> list[int]:
        """Ids of an assistant turn, `end_id` included: what follows `chat(messages)`.

        The text is taken as it is, also where the chat template would trim it.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Write the files that `load_tokenizer(directory)` (and transformers) reads."""
        ...


@dataclass(frozen=True)
class _Stretch:
    """Text between two control tokens: scaffold and slots, encoded in one go."""

    parts: tuple[str | Slot, ...]
    position: Position
    lstrip: bool  # the control token before it eats whitespace
    rstrip: bool  # the control token after it does

    def fill(self, contents: Sequence[str]) -> str:
        text = "".join(p if isinstance(p, str) else p.fill(contents) for p in self.parts)
        text = text.lstrip() if self.lstrip else text
        return text.rstrip() if self.rstrip else text


@dataclass(frozen=True)
class _Plan:
    """How to build a conversation of these roles: ids that never change, stretches to encode."""

    pieces: tuple[str | Slot, ...]
    steps: tuple[tuple[int, ...] | _Stretch, ...]


class ChatTokenizer:
    """The `Tokenizer` over either backend; made by `load_tokenizer` and `from_tokenizers`."""

    def __init__(
        self,
        backend: Vocabulary,
        ids: Mapping[str, int],
        template: ChatTemplate,
        blobs: Mapping[str, bytes],
        config: Mapping[str, Any],
        stops: Sequence[int],
        name: str,
        *,
        adds_bos: bool,
    ) -> None:
        self._backend, self._template = backend, template
        self._blobs, self._config = dict(blobs), dict(config)
        self._plans: dict[tuple[tuple[str, ...], bool], _Plan] = {}
        self._literals = {i: c for c, i in backend.controls.items()}
        self.control_ids = frozenset(self._literals)
        longest_first = sorted(backend.controls, key=len, reverse=True)
        self._controls = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.vocab_size = backend.vocab_size
        self.eos_id = ids["eos_token"]
        self.bos_id = ids.get("bos_token")
        self.begin_ids = () if self.bos_id is None or not adds_bos else (self.bos_id,)
        self.pad_id = ids.get("pad_token", self.eos_id)
        self.name = f"{name} ({self.vocab_size:,} ids)"
        self.end_id = self._find_end()
        self._reply_position: Position = self._find_reply_position()
        turn = [backend.controls[c] for c in ("<end_of_turn>",) if c in backend.controls]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, self.end_id, *turn, *stops]))

    def __repr__(self) -> str:
        return f"<tokenizer {self.name}>"

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Piece -> id, added tokens included."""
        return self._backend.ids

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._encode(text, "start")

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """See `Tokenizer.decode`. The unknown id is text and stays visible."""
        plain = [int(i) for i in ids]
        if not show_control:
            return self._backend.decode([i for i in plain if i not in self.control_ids])
        out, run = [], []
        for i in plain:
            if i in self._literals:
                out += [self._backend.decode(run), self._literals[i]]
                run = []
            else:
                run.append(i)
        return "".join([*out, self._backend.decode(run)])

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> list[int]:
        """See `Tokenizer.chat`.

        BOS stands where the template writes it and nowhere else, so it is never added twice.
        Raises `TokenizerError` for a message without text and for roles that the template refuses.
        """
        roles, contents = _read_messages(messages)
        rendered = self._template.render(roles, contents, generation_prompt)
        plan = self._plan(roles, generation_prompt, contents, rendered)
        ids: list[int] = []
        for step in plan.steps:
            if isinstance(step, _Stretch):
                ids += self._encode(step.fill(contents), step.position)
            else:
                ids += step
        return ids

    def completion(self, text: str) -> list[int]:
        """See `Tokenizer.completion`."""
        return [*self._encode(text, self._reply_position), self.end_id]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`. The chat format in use is written, also where there was no file."""
        write_folder(
            Path(directory), self._blobs, self._config, self._template.source, self.stop_ids
        )

    def _encode(self, text: str, position: Position) -> list[int]:
        _check_text(text)
        ids = self._backend.encode(text, position)
        # The vocabulary makes this impossible; this is a second check.
        if not self.control_ids.isdisjoint(ids):
            literals = sorted({self._literals[i] for i in ids if i in self.control_ids})
            raise TokenizerError(
                f"{self.name}: text produced control tokens {literals}: {text[:80]!r}"
            )
        return ids

    def _plan(
        self,
        roles: tuple[str, ...],
        generation_prompt: bool,
        contents: Sequence[str],
        rendered: str,
    ) -> _Plan:
        """The plan for these roles, checked against the template's own rendering."""
        key = (roles, generation_prompt)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(roles, generation_prompt)
        if _join(plan.pieces, contents) == rendered:
            return plan
        raise TokenizerError(
            f"{self._template.where}: the chat template does more with a message's text than "
            "insert or trim it (for example cuts at a tag), so text and scaffold cannot be told "
            "apart; use a template that inserts contents unchanged"
        )

    def _make_plan(self, roles: Sequence[str], generation_prompt: bool) -> _Plan:
        pieces = self._template.scaffold(roles, generation_prompt)
        steps: list[tuple[int, ...] | _Stretch] = []
        parts: list[str | Slot] = []
        position: Position = "start"
        eaten = False  # whether the last control token eats the whitespace after it

        def flush(rstrip: bool) -> None:
            nonlocal position
            if not parts:
                return
            stretch = _Stretch(tuple(parts), position, eaten, rstrip)
            constant = not any(isinstance(p, Slot) for p in parts)
            steps.append(tuple(self._encode(stretch.fill(()), position)) if constant else stretch)
            parts.clear()
            position = "after_text"

        for piece in pieces:
            if isinstance(piece, Slot):
                parts.append(piece)
                continue
            for literal in filter(None, self._controls.split(piece)):
                if literal in self._backend.controls:
                    lstrip, rstrip = self._backend.strips.get(literal, (False, False))
                    flush(lstrip)
                    steps.append((self._backend.controls[literal],))
                    eaten = rstrip
                    position = "after_control" if position == "start" else position
                else:
                    parts.append(literal)
        flush(False)
        return _Plan(pieces, tuple(steps))

    def _find_end(self) -> int:
        """The first control token after the assistant's text in a rendered exchange, else eos."""
        try:
            pieces = self._template.scaffold(("user", "assistant"), False)
        except TokenizerError:  # a template for prompts only
            return self.eos_id
        said = (i for i, p in enumerate(pieces) if isinstance(p, Slot) and p.index == 1)
        last = max(said, default=len(pieces))
        after = "".join(p for p in pieces[last:] if isinstance(p, str))
        match = self._controls.search(after)
        return self._backend.controls[match.group()] if match else self.eos_id

    def _find_reply_position(self) -> Position:
        """How the text after a generation prompt is encoded.

        A sentencepiece model that drops whitespace at the ends of a text has dropped the prompt's
        last newline: the space that it puts before a text of its own stands for it.
        """
        try:
            pieces = self._template.scaffold(("user",), True)
        except TokenizerError:
            return "after_text"
        last = pieces[-1] if pieces else ""
        lost = self._backend.collapses and isinstance(last, str) and last[-1:].isspace()
        return "after_control" if lost else "after_text"


def _join(pieces: Sequence[str | Slot], contents: Sequence[str]) -> str:
    return "".join(p if isinstance(p, str) else p.fill(contents) for p in pieces)


def _check_text(text: str, what: str = "text") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"{what} has a lone surrogate at character {e.start}: not valid Unicode; replace it"
        ) from e


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    if not messages:
        raise TokenizerError(
            "chat: no messages; give at least one {'role': 'user', 'content': ...}"
        )
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            value = message.get(field)
            if not isinstance(value, str):
                raise TokenizerError(
                    f"chat: message {i}: {field!r} must be a string, not {value!r:.80}"
                )
            _check_text(value, f"chat: message {i}: {field!r}")
        if not _ROLE.fullmatch(message["role"]):  # templates print it into the scaffold
            raise TokenizerError(
                f"chat: message {i}: 'role' is a plain name, not {message['role']!r:.60}"
            )
    return tuple(m["role"] for m in messages), [m["content"] for m in messages]
