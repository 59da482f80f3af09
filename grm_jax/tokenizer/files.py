"""What a tokenizer's directory says beside its vocabulary: special tokens, chat template, stop ids.

tokenizer_config.json, special_tokens_map.json   names of bos, eos, pad; the chat template
chat_template.jinja                              the chat template, where it has a file of its own
generation_config.json                           further ids that end a generation
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from grm_jax import files
from grm_jax.tokenizer.chat_template import GEMMA_TEMPLATE, PLAIN_TEMPLATE
from grm_jax.tokenizer.vocabulary import TokenizerError

log = logging.getLogger(__name__)

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"))
_META_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later wins


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like -> literal. transformers writes a string or an AddedToken's fields."""
    values = {field: config.get(field) for field in _NAMED}
    texts = {f: v.get("content") if isinstance(v, Mapping) else v for f, v in values.items()}
    return {f: v for f, v in texts.items() if isinstance(v, str)}


def pick_template(config: Mapping[str, Any], literals: Iterable[str], where: Path) -> str:
    """The checkpoint's own template, else Gemma's if the vocabulary has its turns, else plain."""
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {t["name"]: t["template"] for t in source}.get("default")
        if source is None:
            raise TokenizerError(
                f"{where}: chat_template has several entries and none is named 'default'"
            )
    if isinstance(source, str):
        return source
    if {"<start_of_turn>", "<end_of_turn>"} <= set(literals):
        log.warning(
            "%s: no chat template; using Gemma's (the vocabulary has <start_of_turn>)", where
        )
        return GEMMA_TEMPLATE
    log.warning(
        "%s: no chat template; using the plain one: bos, then each message and a newline", where
    )
    return PLAIN_TEMPLATE


def read_folder(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """(tokenizer_config.json with the chat template in it, stop ids of generation_config.json)."""
    config: dict[str, Any] = {}
    for name in _META_FILES:
        if (folder / name).is_file():
            config |= read_json(folder / name)
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = files.read_text(folder / "chat_template.jinja", TokenizerError)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in stops):
        raise TokenizerError(
            f"{generation}: eos_token_id: {eos!r} is not an id or a list of ids; correct it"
        )
    return config, stops


def write_folder(
    folder: Path,
    vocabulary: Mapping[str, bytes],
    config: Mapping[str, Any],
    template: str,
    stop_ids: Sequence[int],
) -> None:
    """Write the vocabulary's own file(s) and what `read_folder` reads; leave other files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in vocabulary.items():
        (folder / name).write_bytes(blob)
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": template})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    # The stop ids live where `generate` of transformers looks for them; other settings there stay.
    generation = folder / "generation_config.json"
    kept = read_json(generation) if generation.exists() else {}
    write_json(generation, {**kept, "eos_token_id": list(stop_ids)})


def parse_json(blob: bytes, where: Path) -> dict[str, Any]:
    try:
        value = json.loads(blob)
    except ValueError as e:
        raise TokenizerError(f"{where}: not valid JSON ({e}); copy the file again") from e
    if not isinstance(value, dict):
        raise TokenizerError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return cast("dict[str, Any]", value)


def read_json(where: Path) -> dict[str, Any]:
    return files.read_json(where, TokenizerError)


def write_json(where: Path, value: Mapping[str, Any]) -> None:
    where.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
