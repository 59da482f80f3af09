"""The small files of a Hugging Face directory: `config.json`, special token ids and the tokenizer.

The layouts of transformers 4 (`rope_theta`, `torch_dtype`, `hidden_act`) and of transformers 5
(`rope_parameters`, `dtype`, `hidden_activation`) are both read. What is written has both, so that
either version, and the inference servers built on them, can read it. A value that
`model/gemma2.py` does not implement is an error here; it is never ignored.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from grm_jax import files
from grm_jax.errors import UserError
from grm_jax.model.config import ModelConfig
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
LANGUAGE_MODEL = "Gemma2ForCausalLM"
CLASSIFIER = "Gemma2ForSequenceClassification"

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Type names in a safetensors header.
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}

# What transformers' Gemma2Config assumes for absent keys that set the sizes of the weights. A file
# without one of them is refused, since only its owner can say which value is meant; the error names
# the value that transformers assumes.
_REQUIRED = {
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "vocab_size": 256000,
}
# (ModelConfig field, config.json key, type, the value of an absent key or _REQUIRED).
_FIELDS: tuple[tuple[str, str, type, Any], ...] = (
    ("num_layers", "num_hidden_layers", int, _REQUIRED),
    ("embed_dim", "hidden_size", int, _REQUIRED),
    ("num_heads", "num_attention_heads", int, _REQUIRED),
    ("num_kv_heads", "num_key_value_heads", int, _REQUIRED),
    ("head_dim", "head_dim", int, _REQUIRED),
    ("hidden_dim", "intermediate_size", int, _REQUIRED),
    ("vocab_size", "vocab_size", int, _REQUIRED),
    ("query_pre_attn_scalar", "query_pre_attn_scalar", float, 256.0),
    ("sliding_window", "sliding_window", int, 4096),
    ("max_position", "max_position_embeddings", int, 8192),
    ("attn_softcap", "attn_logit_softcapping", float, 50.0),
    ("final_softcap", "final_logit_softcapping", float, 30.0),
    ("norm_eps", "rms_norm_eps", float, 1e-6),
)
# What the forward pass does not implement: key -> the values that it allows. The key may be absent.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "is_decoder": (True, False, None),
    "tie_word_embeddings": (True, False, None),  # untied ones need an lm_head: huggingface.py looks
    "add_cross_attention": (False, None),
}


class CheckpointError(UserError):
    """A model directory that can not be read or written as asked; the message names the file."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError that names the file and what is wrong."""
    return files.read_json(path, CheckpointError)


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face Gemma-2 directory.

    `dtype` follows the file's: bfloat16 stays bfloat16; float32, float16 and a missing dtype become
    float32, because float16 overflows in Gemma-2.

    Raises CheckpointError for another model type, a missing or ill-typed field, and any value that
    the forward pass does not implement.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "gemma2":
        raise CheckpointError(
            f"{path}: model_type is {raw.get('model_type')!r}; only 'gemma2' is implemented, so "
            "give a Gemma-2 checkpoint"
        )
    _refuse_unimplemented(path, raw)
    fields = {name: _number(path, raw, key, kind, default) for name, key, kind, default in _FIELDS}
    fields["rope_theta"] = _rope_theta(path, raw)
    stored = raw.get("dtype", raw.get("torch_dtype"))
    fields["dtype"] = "bfloat16" if stored == "bfloat16" else "float32"
    try:
        config = ModelConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    kinds, want = raw.get("layer_types"), _layer_types(config)
    if kinds is not None and kinds != want:
        raise CheckpointError(
            f"{path}: layer_types is {kinds}; only sliding_attention on even and full_attention on "
            "odd layers is implemented (Gemma-2's own order)"
        )
    return config


def read_num_labels(directory: str | Path) -> int:
    """The width of the scalar head that `config.json` declares; 0 for a language model.

    As in transformers, an absent `id2label` and `num_labels` means 2 for a classifier.
    Raises CheckpointError for an architecture that is neither.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    names = raw.get("architectures") or [LANGUAGE_MODEL]
    if names == [LANGUAGE_MODEL]:
        return 0
    if names != [CLASSIFIER]:
        raise CheckpointError(
            f"{path}: architectures is {names}; choose a checkpoint saved as {LANGUAGE_MODEL} or "
            f"{CLASSIFIER}"
        )
    labels = raw.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    count = raw.get("num_labels", 2)
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{path}: num_labels is {count!r}; give the width of the scalar head")
    return count


def is_tied(directory: str | Path) -> bool:
    """Whether the head is the embedding: as in transformers, unless `config.json` denies it."""
    return read_json(Path(directory) / "config.json").get("tie_word_embeddings") is not False


def config_json(
    config: ModelConfig, *, num_labels: int, dtype: str, ids: dict[str, Any]
) -> dict[str, Any]:
    """The content of `config.json` for a model, readable by transformers 4 and 5.

    Args:
      num_labels: the width of the scalar head; 0 for a language model.
      dtype: the dtype of the stored tensors: float32, bfloat16 or float16.
      ids: bos_token_id, eos_token_id and pad_token_id.
    """
    scalar = config.query_pre_attn_scalar
    written = {
        "architectures": [CLASSIFIER if num_labels else LANGUAGE_MODEL],
        "model_type": "gemma2",
        **{key: getattr(config, name) for name, key, _, _ in _FIELDS},
        # transformers declares it as an integer, and version 5 refuses 256.0.
        "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": _layer_types(config),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
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


def special_ids(directory: str | Path | None) -> dict[str, Any]:
    """The bos, eos and pad token ids in the form of `config.json` (eos is an id or a list of ids).

    Each id comes from the first of these that has it: `generation_config.json`, `config.json`, and
    the token's name in `tokenizer_config.json`, looked up in `tokenizer.json` or `tokenizer.model`.
    Without a directory the ids are those of Gemma-2: 2, 1 and 0.

    Raises CheckpointError when a directory names no token that ends a text.
    """
    if directory is None:
        return {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
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


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention", "full_attention"] * config.num_blocks


def _refuse_unimplemented(path: Path, raw: dict[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {raw[key]!r}; the forward pass implements only "
                f"{' or '.join(repr(value) for value in allowed)}"
            )
    # `hidden_act` counts only where `hidden_activation` is absent: transformers reads the latter.
    if "hidden_activation" not in raw and raw.get("hidden_act", "gelu_pytorch_tanh") not in (
        "gelu_pytorch_tanh",
    ):
        raise CheckpointError(
            f"{path}: hidden_act is {raw['hidden_act']!r}; the forward pass implements only "
            "'gelu_pytorch_tanh'"
        )


def _number(path: Path, raw: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    """The positive number of a key, as `kind`; `default` where it is absent."""
    if key not in raw:
        if default is _REQUIRED:
            assumed = _REQUIRED[key]
            raise CheckpointError(
                f"{path}: {key} is missing; transformers assumes {assumed} for Gemma-2, so add "
                f'"{key}": {assumed}, or the value that the weights have'
            )
        return default
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise CheckpointError(
            f"{path}: {key} is {value!r}; the forward pass needs "
            f"{'an integer' if kind is int else 'a number'}"
        )
    if value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be positive")
    return kind(value)


def _rope_theta(path: Path, raw: dict[str, Any]) -> float:
    rope = raw.get("rope_parameters")
    if rope is None:
        return _number(path, raw, "rope_theta", float, 10_000.0)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{path}: rope_parameters is {rope!r}; only one rope_theta with rope_type 'default' is "
            "implemented"
        )
    other = set(rope) - {"rope_theta", "rope_type"}
    if other:
        raise CheckpointError(f"{path}: rope_parameters has {sorted(other)}, not implemented")
    return _number(
        path, {"rope_theta": raw.get("rope_theta", 10_000.0)} | rope, "rope_theta", float, 0
    )


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
