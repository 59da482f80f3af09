"""Text <-> ids for `tokenizers` and sentencepiece vocabularies, without control tokens.

The encoders are built from a copy of the vocabulary in which text cannot reach a control piece: it
is renamed to a random string, or has sentencepiece's type CONTROL. The ids of all other text are
those of the original.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from grm_jax.errors import UserError

# Delimiters that converters often leave unflagged (transformers' own conversion of a Gemma
# `tokenizer.model` writes `<start_of_turn>` with "special": false). Gemma's vocabulary also has
# HTML tags as user-defined pieces (`<table>`, `<s>`): those are text and must stay text, hence a
# list of shapes and not "anything in angle brackets". The bars of DeepSeek's are full-width.
# It stands for a part of an image. Gemma-3's tokenizer has it in text models, too, whose embeddings
# have no row for it: its id is 262,144 in the published 270m and 1b, as many as they have rows.
IMAGE = "<image_soft_token>"
_CONTROL_SHAPE = re.compile(
    r"<\|\S+>|<\S+\|>|<\uff5c\S+\uff5c>|<(?:start|end)_of_\w+>|<(?:unused|extra_id_)\d+>"
    r"|<(?:pad|bos|eos|mask|cls|sep|2mass|image_soft_token)>|\[@?(?:BOS|EOS|PAD|CLS|SEP|MASK)@?\]|\[/?INST\]"
)
_BRACKETED = re.compile(r"[<\[{(|].+[>\]})|]", re.DOTALL)
OPEN, CLOSE = "\U000f0000", "\U000f0001"  # private-use characters around inserted random marks

Position = Literal["start", "after_control", "after_text"]


class TokenizerError(UserError):
    """A tokenizer directory, chat template or text that cannot be used; says what to do instead."""


def require_rows(
    ids: Mapping[str, int], rows: int, tokenizer: str | Path, model: str | Path
) -> None:
    """Raise TokenizerError when a tokenizer has more ids than a model's embedding has rows.

    Fewer are usual: embeddings are padded to round sizes. One may be more: `IMAGE`, which no text
    yields.

    Args:
      ids: piece -> id, added tokens included.
    """
    count = max((id for piece, id in ids.items() if piece != IMAGE), default=-1) + 1
    if count > rows:
        raise TokenizerError(
            f"{tokenizer}: has {count:,} token ids, but the embedding of {model} has {rows:,} "
            "rows: they do not belong together; give the tokenizer that the model was trained with"
        )


class Vocabulary(Protocol):
    """Text <-> ids over a vocabulary whose control pieces cannot be reached from text."""

    vocab_size: int
    ids: dict[str, int]  # piece -> id, added tokens included
    controls: dict[str, int]  # literal -> id
    strips: dict[str, tuple[bool, bool]]  # literal -> (eats whitespace on its left, on its right)
    collapses: bool  # runs of whitespace become one space, and none at the ends of a text

    def encode(self, text: str, position: Position) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def is_control(literal: str, flagged: bool, template: str) -> bool:
    """Whether text must never produce this piece.

    It is flagged special, shaped like a delimiter, or used as one by the chat template. Runs of
    newlines and spaces are text, even where a converter flagged them special.
    """
    literal = literal.replace("▁", " ").strip()
    if not literal:
        return False
    used = _BRACKETED.fullmatch(literal) is not None and literal in template
    return flagged or used or _CONTROL_SHAPE.fullmatch(literal) is not None


def read_vocabulary(spec: Any, where: Path | str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(piece -> id of the model, added tokens) of a parsed tokenizer.json.

    Raises TokenizerError naming the file and the field for any other structure.
    """

    def bad(what: str) -> TokenizerError:
        return TokenizerError(f"{where}: {what}; save it again with `tokenizers`")

    model = spec.get("model") if isinstance(spec, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list):
        raise bad("not a tokenizer.json (no model.vocab)")
    if isinstance(vocab, list):  # Unigram keeps [piece, score] rows in id order; the others a dict
        for index, row in enumerate(vocab):
            if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
                raise bad(f"model.vocab[{index}] is {row!r:.60}, not [piece, score]")
        ids = {row[0]: index for index, row in enumerate(vocab)}
    else:
        ids = dict(vocab)
        for piece, id in ids.items():
            if type(id) is not int or id < 0:
                raise bad(f"model.vocab: the id of {piece!r:.60} is {id!r:.60}")
    added = spec.get("added_tokens")
    if not isinstance(added, list | None):
        raise bad(f"added_tokens is {added!r:.60}, not a list")
    for index, token in enumerate(added or ()):
        fields = token if isinstance(token, dict) else {}
        id = fields.get("id")
        if not isinstance(fields.get("content"), str) or type(id) is not int or id < 0:
            raise bad(f"added_tokens[{index}] is {token!r:.80}, without a content and an id")
    if not ids and not added:
        raise bad("model.vocab is empty")
    return ids, list(added or ())


def _require_readable(spec: dict[str, Any], where: Path | str) -> None:
    """Raise TokenizerError when the installed `tokenizers` can not read a tokenizer.json."""
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(
            f"{where}: tokenizers {tokenizers.__version__} can not read it: {error}; "
            "`pip install -U tokenizers`, or save the file again with the installed version"
        ) from error


class TokenizersVocabulary:
    """A `tokenizers` pipeline (tokenizer.json) rebuilt without its control tokens.

    Raises TokenizerError naming `where` for a file that the installed `tokenizers` can not read.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        named: Mapping[str, str],
        template: str,
        where: Path | str = "tokenizer.json",
    ) -> None:
        ids, added_tokens = read_vocabulary(spec, where)
        try:
            self._build(spec, ids, added_tokens, named, template)
        except Exception:
            # If the library can read the file, this is a bug here, and the traceback is kept.
            _require_readable(spec, where)
            raise

    def _build(
        self,
        spec: dict[str, Any],
        ids: dict[str, int],
        added_tokens: list[dict[str, Any]],
        named: Mapping[str, str],
        template: str,
    ) -> None:
        import tokenizers

        self.collapses = False
        spec = dict(spec)
        model = dict(spec["model"])
        # The unknown id is what text may become, unless it is eos as well (GPT-2's is).
        unk = {named.get("unk_token"), model.get("unk_token")}
        unk -= {literal for field, literal in named.items() if field != "unk_token"}
        vocab = model["vocab"]
        added = {t["content"]: t for t in added_tokens}
        all_ids = ids | {content: t["id"] for content, t in added.items()}
        self.vocab_size = max(all_ids.values()) + 1
        self.ids = all_ids
        flagged = {c for c, t in added.items() if t["special"]} | set(named.values())
        self.controls = {
            c: all_ids[c]
            for c in (*added, *sorted(flagged - added.keys()))
            if c in all_ids and c not in unk and is_control(c, c in flagged, template)
        }
        self.strips = {
            c: (t["lstrip"], t["rstrip"]) for c, t in added.items() if t["lstrip"] or t["rstrip"]
        }

        # Under a random name the piece keeps its row, but no text has it. Merges into it are
        # removed. (The option `encode_special_tokens` of the library is not enough: it only skips
        # flagged added tokens, which the model still finds if they are pieces of its own, and it
        # loses flagged newlines.)
        hidden = {c: f"{OPEN}{secrets.token_hex(8)}.{i}" for c, i in self.controls.items()}
        if isinstance(vocab, list):
            model["vocab"] = [[hidden.get(p, p), score] for p, score in vocab]
        else:
            model["vocab"] = {hidden.get(p, p): i for p, i in ids.items()}
        if model.get("unk_token") in hidden:
            model["unk_token"] = hidden[model["unk_token"]]
        if "merges" in model:
            pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            model["merges"] = [
                [a, b]
                for a, b in pairs
                if a + b not in hidden and a not in hidden and b not in hidden
            ]
        # Saved truncation or padding settings would silently change ids, so they are removed.
        spec |= {"model": model, "post_processor": None, "truncation": None, "padding": None}
        spec["added_tokens"] = [t for c, t in added.items() if c not in hidden]
        self._text = tokenizers.Tokenizer.from_str(json.dumps(spec))
        # Metaspace's "first" scheme adds a space at the start of the input. Text that follows other
        # text must not get it, so it is encoded after a mark, whose id is then dropped.
        self._mark = ""
        if '"prepend_scheme": "first"' in json.dumps(spec.get("pre_tokenizer")):
            self._mark = f"{OPEN}{secrets.token_hex(8)}{CLOSE}"
            self._text.add_special_tokens([tokenizers.AddedToken(self._mark, normalized=False)])

    def encode(self, text: str, position: Position) -> list[int]:
        if self._mark and position != "start":
            return self._text.encode(self._mark + text, add_special_tokens=False).ids[1:]
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._text.decode(ids, skip_special_tokens=False)


def load_sentencepiece(blob: bytes, where: Path | str) -> Any:
    """A sentencepiece processor of a model file's bytes.

    Raises TokenizerError naming the file when they are none. An empty file would give a processor
    without pieces.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=blob) if blob else None
    except RuntimeError as error:
        raise TokenizerError(
            f"{where}: not a sentencepiece model: {error}; download the file again"
        ) from error
    if model is None or not len(model):
        what = "has no pieces" if blob else "the file is empty"
        raise TokenizerError(f"{where}: not a sentencepiece model: {what}; download it again")
    return model


class SentencePieceVocabulary:
    """A sentencepiece model with all delimiters of type CONTROL, never matched in text."""

    def __init__(
        self, blob: bytes, named: Mapping[str, str], added: Mapping[str, int], template: str
    ) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # generated code: no types
        proto = messages.ModelProto()
        proto.ParseFromString(blob)
        kinds = messages.ModelProto.SentencePiece
        named_literals = set(named.values())
        self.ids = {p.piece: i for i, p in enumerate(proto.pieces)} | dict(added)
        self.vocab_size = max(self.ids.values()) + 1
        self.controls = dict(added)  # not pieces of the model: only a template can produce them
        self.strips: dict[str, tuple[bool, bool]] = {}
        for i, piece in enumerate(proto.pieces):
            if piece.type in (kinds.UNKNOWN, kinds.BYTE):
                continue
            flagged = piece.type == kinds.CONTROL or piece.piece in named_literals
            if is_control(piece.piece, flagged, template):
                piece.type = kinds.CONTROL
                self.controls[piece.piece] = i
        self._start = self._after = sentencepiece.SentencePieceProcessor(
            model_proto=proto.SerializeToString()
        )
        # With this setting the model turns runs of whitespace into one space and strips the text.
        self.collapses = proto.normalizer_spec.remove_extra_whitespaces
        if proto.normalizer_spec.add_dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = False
            self._after = sentencepiece.SentencePieceProcessor(
                model_proto=proto.SerializeToString()
            )

    def encode(self, text: str, position: Position) -> list[int]:
        if position != "after_text":
            return self._start.encode(text)
        # The model strips leading spaces and adds one: right for " b" after "a".
        if self.collapses and text[:1].isspace():
            return self._start.encode(text)
        return self._after.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._start.decode(ids)
