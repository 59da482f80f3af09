"""The files of a tokenizer besides its vocabulary: special tokens, chat template, stop ids.

tokenizer_config.json, special_tokens_map.json   names of bos, eos, pad; the chat template
chat_template.jinja, additional_chat_templates/  chat templates, where they have files of their own
chat_template.json                               the chat template, as processors write it
generation_config.json, config.json              ids that end a generation, in this order
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax import files
from grm_jax.tokenizer.chat_template import GEMMA_TEMPLATE, PLAIN_TEMPLATE
from grm_jax.tokenizer.vocabulary import TokenizerError

log = logging.getLogger(__name__)

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"))
_META_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later wins
_ID_FILES = ("generation_config.json", "config.json")  # the first that has an id says it
ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
MORE_TEMPLATES = "additional_chat_templates"


def named_tokens(config: Mapping[str, Any], where: Path | str = "config") -> dict[str, str]:
    """bos_token and the like -> literal. transformers writes a string or an AddedToken's fields.

    Raises TokenizerError for anything else; null counts as not given.
    """
    literals: dict[str, str] = {}
    for field in _NAMED:
        value = config.get(field)
        literal = value.get("content") if isinstance(value, Mapping) else value
        if literal is None and not isinstance(value, Mapping):
            continue
        if not isinstance(literal, str):
            raise TokenizerError(
                f'{where}: {field} is {value!r:.80}; give its text, or {{"content": its text}}'
            )
        literals[field] = literal
    return literals


def pick_template(config: Mapping[str, Any], literals: Iterable[str], where: Path) -> str:
    """The checkpoint's own template, else Gemma's if the vocabulary has its turns, else plain.

    Raises TokenizerError for a template that exists and cannot be understood; it is never replaced
    by another.
    """
    source = config.get("chat_template")
    if source is not None:
        return read_template(source, f"{where}: chat_template")
    if {"<start_of_turn>", "<end_of_turn>"} <= set(literals):
        log.warning(
            "%s: no chat template; using Gemma's (the vocabulary has <start_of_turn>)", where
        )
        return GEMMA_TEMPLATE
    log.warning(
        "%s: no chat template; using the plain one: bos, then each message and a newline", where
    )
    return PLAIN_TEMPLATE


def read_template(value: Any, where: str) -> str:
    """The chat template of a field: a text, {name: text}, or [{"name": .., "template": ..}, ..].

    Of named ones it is the one named "default".
    """
    if isinstance(value, list):
        named = {}
        for index, entry in enumerate(value):
            fields = entry if isinstance(entry, Mapping) else {}
            if not isinstance(fields.get("name"), str):
                raise TokenizerError(
                    f'{where}[{index}] is {entry!r:.80}; give {{"name": .., "template": ..}}, or '
                    "one template as a text"
                )
            named[fields["name"]] = fields.get("template")
        value = named
    if isinstance(value, Mapping):
        if not value:
            raise TokenizerError(f"{where} is empty; give a template, or leave the field out")
        if "default" not in value:  # as transformers does: the others are for other uses
            names = ", ".join(map(repr, value))
            entries = f"one entry, {names}," if len(value) == 1 else f"several entries ({names})"
            raise TokenizerError(
                f"{where} has {entries} and none is named 'default'; name the one to use so"
            )
        value, where = value["default"], f"{where}: 'default'"
    if not isinstance(value, str):
        raise TokenizerError(
            f"{where} is {value!r:.80}; a chat template is a text, or several with names"
        )
    if not value.strip():
        raise TokenizerError(f"{where} is empty; give a template, or leave it out")
    return value.removeprefix("\ufeff")


def read_folder(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """(tokenizer_config.json with the chat template in it, ids that end a generation).

    `chat_template` in the result is a text or missing. Every file that exists is read; one that
    cannot be read is an error that names it.
    """
    config: dict[str, Any] = {}
    for name in _META_FILES:
        if files.there(folder / name):
            config |= read_json(folder / name)
    named_tokens(config, folder / "tokenizer_config.json")
    template = _folder_template(folder, config.pop("chat_template", None))
    if template is not None:
        config["chat_template"] = template
    eos = folder_ids(folder).get("eos_token_id")
    return config, eos if isinstance(eos, list) else [] if eos is None else [eos]


def _folder_template(folder: Path, field: Any) -> str | None:
    """The chat template of a folder, from the first place that has one, as transformers has it.

    Other places that have another one are named in the log.
    """
    templates: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if files.there(file):
        templates[str(file)] = read_template(files.read_text(file, TokenizerError), str(file))
    if field is not None:
        where = f"{folder / 'tokenizer_config.json'}: chat_template"
        templates[where] = read_template(field, where)
    file = folder / "chat_template.json"
    if files.there(file):
        where = f"{file}: chat_template"
        templates[where] = read_template(read_json(file).get("chat_template"), where)
    if not templates and (more := _more_templates(folder)):
        where = str(folder / MORE_TEMPLATES)
        templates[where] = read_template(more, where)
    if not templates:
        return None
    (used, template), *others = templates.items()
    for where, other in others:
        if other != template:
            log.warning("%s: another chat template than %s, which is used", where, used)
    return template


def _more_templates(folder: Path) -> dict[str, str]:
    """Name -> text of the files in additional_chat_templates/."""
    return {
        file.stem: files.read_text(file, TokenizerError)
        for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    }


def folder_ids(folder: Path) -> dict[str, int | list[int]]:
    """bos, eos and pad ids of a folder: each from generation_config.json, else config.json.

    Raises TokenizerError naming the file for one that is neither an id nor (eos) a list of ids.
    """
    ids_by_name: dict[str, int | list[int]] = {}
    for file in (folder / name for name in _ID_FILES):
        if not files.there(file):
            continue
        content = read_json(file)
        for key in ID_NAMES:
            value = content.get(key)
            if value in (None, []) or (key == "pad_token_id" and value == -1):
                continue  # not given; some configs write -1 for "no padding"
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                wanted = "an id or a list of ids" if key == "eos_token_id" else "an id"
                raise TokenizerError(f"{file}: {key}: {value!r:.80} is not {wanted}; correct it")
            ids_by_name.setdefault(key, value)
    return ids_by_name


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
    # Stop ids go where `generate` of transformers looks for them; other settings there are kept.
    generation = folder / "generation_config.json"
    kept = read_json(generation) if files.there(generation) else {}
    write_json(generation, {**kept, "eos_token_id": list(stop_ids)})


def read_json(where: Path) -> dict[str, Any]:
    return files.read_json(where, TokenizerError)


def write_json(where: Path, value: Mapping[str, Any]) -> None:
    where.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
