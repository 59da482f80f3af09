"""The small files of a Hugging Face directory: `config.json`, special token ids and the tokenizer.

The layouts of transformers 4 and of transformers 5 are both read. What is written has both, so that
either version, and the inference servers built on them, can read it. `hf_fields.py` has the fields
that make a ModelConfig.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from grm_jax import files
from grm_jax.model.config import ModelConfig
from grm_jax.model.families import family_of
from grm_jax.model.families.declaration import Wrapper
from grm_jax.model.families.gemma2 import GEMMA2
from grm_jax.model.hf_fields import (
    CheckpointError,
    family_by_type,
    model_fields,
    written_fields,
)
from grm_jax.tokenizer.files import ID_NAMES, MORE_TEMPLATES, folder_ids, named_tokens, read_folder
from grm_jax.tokenizer.vocabulary import load_sentencepiece, read_vocabulary

# The files that are copied beside the weights; generation_config.json has the ids that end a text.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Type names in a safetensors header.
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError that names the file and what is wrong."""
    return files.read_json(path, CheckpointError)


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory of one of the families.

    `dtype` follows the file's: bfloat16 stays bfloat16; float32, float16 and a missing dtype become
    float32, because float16 overflows in Gemma.

    Raises CheckpointError for another model type, a missing or ill-typed field, and any value that
    the forward pass does not implement.
    """
    path = Path(directory) / "config.json"
    family, raw = family_by_type(path, read_json(path))
    fields = model_fields(path, raw, family)
    stored = raw.get("dtype", raw.get("torch_dtype"))
    fields["dtype"] = "bfloat16" if stored == "bfloat16" else "float32"
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_num_labels(directory: str | Path) -> int:
    """The width of the scalar head that `config.json` declares; 0 for a language model.

    As in transformers, an absent `id2label` and `num_labels` means 2 for a classifier.
    Raises CheckpointError for an architecture that is neither.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    family, _ = family_by_type(path, raw)
    language = [family.language_model]
    if family.wrapper is not None and raw["model_type"] == family.wrapper.model_type:
        language = [family.wrapper.architecture]
    names = raw.get("architectures") or language
    if names == language:
        return 0
    if names != [family.classifier]:
        raise CheckpointError(
            f"{path}: architectures is {names}; choose a checkpoint saved as {language[0]} or "
            f"{family.classifier}"
        )
    labels = raw.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    count = raw.get("num_labels", 2)
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{path}: num_labels is {count!r}; give the width of the scalar head")
    return count


def text_prefixes(directory: str | Path) -> Wrapper | None:
    """How tensors are named in a multimodal checkpoint; None for a text model's."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    family, _ = family_by_type(path, raw)
    return None if raw["model_type"] == family.name else family.wrapper


def config_json(
    config: ModelConfig, *, num_labels: int, dtype: str, ids: dict[str, Any]
) -> dict[str, Any]:
    """The content of `config.json` for a model, readable by transformers 4 and 5.

    Args:
      num_labels: the width of the scalar head; 0 for a language model.
      dtype: the dtype of the stored tensors: float32, bfloat16 or float16.
      ids: bos_token_id, eos_token_id and pad_token_id.

    Raises CheckpointError for a model that has other features than its family's checkpoints.
    """
    family = family_of(config)
    written = {
        "architectures": [family.classifier if num_labels else family.language_model],
        **written_fields(config),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **ids,
    }
    if num_labels:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
    return written


def special_ids(
    directory: str | Path | None, default: Mapping[str, Any] = GEMMA2.ids
) -> dict[str, Any]:
    """The bos, eos and pad token ids in the form of `config.json` (eos is an id or a list of ids).

    Each id comes from the first of these that has it: `generation_config.json`, `config.json`, and
    the token's name in `tokenizer_config.json`, looked up in `tokenizer.json` or `tokenizer.model`.
    Without a directory they are `default`, a family's own.

    Raises CheckpointError when a directory names no token that ends a text.
    """
    if directory is None:
        return dict(default)
    root = Path(directory)
    ids: dict[str, Any] = dict.fromkeys(ID_NAMES) | folder_ids(root)
    missing = [key for key in ID_NAMES if ids[key] is None]
    if missing:
        names = named_tokens(read_folder(root)[0])
        for key in missing:
            if (token := names.get(key.removesuffix("_id"))) is not None:
                ids[key] = _token_id(root, token)
    if ids["eos_token_id"] is None:
        raise CheckpointError(
            f"{root}: nothing says which token ends a text; give `eos_token` in "
            "tokenizer_config.json or `eos_token_id` in generation_config.json"
        )
    if isinstance(ids["eos_token_id"], list) and len(ids["eos_token_id"]) == 1:
        ids["eos_token_id"] = ids["eos_token_id"][0]  # some servers accept no list of one id
    return ids


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tokenizer's files of `source`, and return their names.

    They are `TOKENIZER_FILES` and the folder of additional chat templates, as far as they exist.
    Raises CheckpointError when `source` is no directory, or one of the files is a broken link or a
    Git LFS pointer; nothing is copied then.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory to copy a tokenizer from")
    names = [name for name in TOKENIZER_FILES if files.there(source / name)]
    more = sorted((source / MORE_TEMPLATES).glob("*.jinja"))
    names += [f"{MORE_TEMPLATES}/{file.name}" for file in more]
    for name in names:
        files.require_content(source / name, CheckpointError)
    if source.resolve() != target.resolve():
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return names


def token_ids(root: Path) -> dict[str, int]:
    """The id of every token, by its text, in a folder's vocabulary; {} where the folder has none.

    Raises CheckpointError or TokenizerError that names a file which can not be read.
    """
    if files.there(file := root / "tokenizer.json"):
        ids, added = read_vocabulary(read_json(file), file)
        return ids | {token["content"]: token["id"] for token in added}
    if files.there(file := root / "tokenizer.model"):
        model = load_sentencepiece(files.read_bytes(file, CheckpointError), file)
        return {model.id_to_piece(index): index for index in range(len(model))}
    return {}


def _token_id(root: Path, token: str) -> int:
    """The id of a token by its text, from the tokenizer's own files."""
    ids = token_ids(root)
    if token not in ids:
        raise CheckpointError(
            f"{root}: tokenizer_config.json names the token {token!r}, which the tokenizer's "
            "vocabulary does not have"
        )
    return ids[token]
