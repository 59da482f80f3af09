"""A tokenizer from files: Hugging Face's (`tokenizer.json`) or a sentencepiece model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grm_jax import files, hub
from grm_jax.tokenizer.chat_template import ChatTemplate
from grm_jax.tokenizer.files import named_tokens, pick_template, read_folder
from grm_jax.tokenizer.tokenizer import ChatTokenizer
from grm_jax.tokenizer.vocabulary import (
    SentencePieceVocabulary,
    TokenizerError,
    TokenizersVocabulary,
    Vocabulary,
    is_control,
    load_sentencepiece,
    read_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Load a Hugging Face directory (`tokenizer.json`, else `tokenizer.model`) or a `*.model` file.

    Names of the special tokens come from tokenizer_config.json (a bare model names its own); the
    chat format from chat_template.jinja or tokenizer_config.json, else Gemma's where the vocabulary
    has `<start_of_turn>`, else a plain one (the log says so). Raises `TokenizerError` naming the
    file and what it lacks.
    """
    path = hub.resolve(path, TokenizerError, weights=False)
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if files.there(path / "tokenizer.json"):
            source = path / "tokenizer.json"
        elif (path / "tokenizer.model") in models or len(models) == 1:
            source = path / "tokenizer.model" if path / "tokenizer.model" in models else models[0]
        else:
            raise TokenizerError(
                f"{path}: no tokenizer.json and no tokenizer.model; copy one beside the weights"
            )
    else:
        source = path
    named = source.name in ("tokenizer.json", "tokenizer.model")  # else a model on its own
    folder = source.parent if path.is_dir() or named else None
    config, stops = read_folder(folder) if folder else ({}, [])
    if source.suffix == ".json":
        spec, blob = files.read_json(source, TokenizerError), source.read_bytes()
        return _from_spec(spec, blob.removeprefix(files.BOM), config, stops, source, path.name)
    blob = files.read_bytes(source, TokenizerError)
    return _from_sentencepiece(blob, config, stops, source, path.resolve().name)


def from_tokenizers(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], *, name: str = "embedded"
) -> ChatTokenizer:
    """Wrap a `tokenizers.Tokenizer` built in code, with what tokenizer_config.json would say.

    `config` names the special tokens (`eos_token` is needed; `bos_token`, `pad_token`, `unk_token`
    as wanted) and holds the `chat_template`. The unknown token stays reachable from text; no other
    special token does.
    """
    blob = tokenizer.to_str().encode()
    return _from_spec(json.loads(blob), blob, dict(config), [], Path(name), name)


def _from_spec(
    spec: dict[str, Any],
    blob: bytes,
    config: dict[str, Any],
    stops: list[int],
    file: Path,
    name: str,
) -> ChatTokenizer:
    """Args: file: where `spec` is from; what is wrong with its neighbours names their folder."""
    where = file.parent if file.name == "tokenizer.json" else file
    named = named_tokens(config, where)
    literals = {t["content"] for t in read_vocabulary(spec, file)[1]}
    source = pick_template(config, literals, where)
    backend = TokenizersVocabulary(spec, named, source, file)
    blobs = {"tokenizer.json": blob}
    adds_bos = _adds(spec.get("post_processor"), named.get("bos_token"))
    return _assemble(backend, named, source, blobs, config, stops, where, name, adds_bos=adds_bos)


def _adds(processor: Any, literal: str | None) -> bool:
    """Whether a post-processor of tokenizer.json puts this token before a text."""
    if not isinstance(processor, Mapping):
        return False
    if processor.get("type") == "Sequence":
        return any(_adds(part, literal) for part in processor.get("processors", ()))
    match processor.get("single"):
        case [{"SpecialToken": {"id": first}}, *_]:
            return first == literal
    return False


def _from_sentencepiece(
    blob: bytes, config: dict[str, Any], stops: list[int], where: Path, name: str
) -> ChatTokenizer:
    model = load_sentencepiece(blob, where)
    model_ids = {
        "bos": model.bos_id(),
        "eos": model.eos_id(),
        "pad": model.pad_id(),
        "unk": model.unk_id(),
    }
    config = {f"{k}_token": model.id_to_piece(i) for k, i in model_ids.items() if i >= 0} | config
    named = named_tokens(config)
    pieces = {model.id_to_piece(i): i for i in range(len(model))}
    source = pick_template(config, pieces, where)
    added: dict[str, int] = {}
    for key, token in _added_tokens(config, where.parent).items():
        literal = token["content"]
        if pieces.get(literal) == key:
            continue
        if literal in pieces or not is_control(literal, bool(token.get("special")), source):
            raise TokenizerError(
                f"{where}: added token {literal!r} (id {key}) is text that the sentencepiece model "
                "lacks or numbers otherwise; save the tokenizer with transformers, which writes "
                "tokenizer.json"
            )
        added[literal] = key
    backend = SentencePieceVocabulary(blob, named, added, source)
    blobs = {"tokenizer.model": blob}
    adds_bos = config.get("add_bos_token") is not False
    return _assemble(backend, named, source, blobs, config, stops, where, name, adds_bos=adds_bos)


def _added_tokens(config: Mapping[str, Any], folder: Path) -> dict[int, Mapping[str, Any]]:
    """Id -> fields of added_tokens_decoder. Raises TokenizerError for any other structure."""
    tokens = config.get("added_tokens_decoder")
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if not isinstance(tokens, Mapping | None):
        raise TokenizerError(f'{where} is {tokens!r:.80}; give {{"id": {{"content": ..}}, ..}}')
    for key, token in (tokens or {}).items():
        if (
            not key.isdecimal()
            or not isinstance(token, Mapping)
            or not isinstance(token.get("content"), str)
        ):
            raise TokenizerError(
                f'{where}: {key!r} is {token!r:.80}; give an id and {{"content": its text}}'
            )
    return {int(key): token for key, token in (tokens or {}).items()}


def _assemble(
    backend: Vocabulary,
    named: Mapping[str, str],
    source: str,
    blobs: Mapping[str, bytes],
    config: Mapping[str, Any],
    stops: Sequence[int],
    where: Path,
    name: str,
    *,
    adds_bos: bool,
) -> ChatTokenizer:
    id_of = backend.ids
    for field, literal in named.items():
        if literal not in id_of:
            raise TokenizerError(
                f"{where}: {field} {literal!r} is not in the vocabulary; correct "
                "tokenizer_config.json"
            )
    if "eos_token" not in named:
        raise TokenizerError(
            f'{where}: no eos_token; name it in tokenizer_config.json ("eos_token": "<eos>")'
        )
    if "pad_token" not in named:
        log.info("%s: no pad_token; arrays are filled with eos (lengths say what is real)", where)
    ids = {field: id_of[literal] for field, literal in named.items()}
    if beyond := [i for i in stops if i >= backend.vocab_size]:
        log.warning(
            "%s: eos_token_id %s is beyond the vocabulary of %d ids and will never be written; "
            "correct generation_config.json or config.json", where, beyond, backend.vocab_size,
        )  # fmt: skip
    template = ChatTemplate(source, named, str(where))
    kind = "tokenizers" if "tokenizer.json" in blobs else "sentencepiece"
    return ChatTokenizer(
        backend, ids, template, blobs, config, stops, f"{name}: {kind}", adds_bos=adds_bos
    )
