"""Writing a model as a Hugging Face checkpoint; public through `model/huggingface.py`.

One tensor at a time is gathered, transposed, cast and appended to its file. The header, which comes
first in a file, follows from the parameter table, so that no file is ever whole in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils

from grm_jax.errors import UserError, listed
from grm_jax.model.config import ModelConfig
from grm_jax.model.families import family_of
from grm_jax.model.hf_config import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    config_json,
    copy_tokenizer,
    read_json,
    special_ids,
    token_ids,
)
from grm_jax.model.hf_fields import written_fields
from grm_jax.model.params import Params, ParamSpec, get_leaf, param_table
from grm_jax.parallel.multihost import barrier, first

GENERATION = "generation_config.json"
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the files to be written."""

    name: str
    spec: ParamSpec
    index: int | None  # its index into the stacked dimension
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.spec.hf_shape) * self.dtype.itemsize


def save(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_dir: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    pad_id: int | None = None,
) -> None:
    """Write a directory that transformers and the servers built on it load.

    Every process must call this: all take part in gathering, and the first one writes.
    `config.json` is written last, so that an interrupted export is not mistaken for a checkpoint.

    Args:
      directory: created if it does not exist; may hold tokenizer files, but no weights or config.
      params: the tree of `model.params`. With a "score", a sequence classifier of the model's
        family is written (for example `Gemma2ForSequenceClassification`); without one, a language
        model (`Gemma2ForCausalLM`). A head that is the embedding is not stored twice.
      dtype: the dtype of the stored tensors (float32, bfloat16 or float16); None keeps each
        parameter's dtype.
      max_shard_bytes: weights of more bytes are split over several files with an index. A tensor is
        never split, so a file may be as large as the largest tensor.
      tokenizer_dir: a directory whose tokenizer files are copied, and from which the bos, eos and
        pad ids are taken.
      generation: fields of `generation_config.json`, such as do_sample and temperature; they count
        for more than those of the file that is copied.
      pad_id: the id that pads, in `config.json` and in the tokenizer's files; None leaves the
        tokenizer's own.

    Raises:
      UserError: `directory` already holds a model.
      CheckpointError: the parameters do not fit the config, have a dtype other than those three, or
        have values too large for float16.
    """
    root = Path(directory)
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes={max_shard_bytes}; give a positive size")
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise CheckpointError(f"{tokenizer_dir}: no such directory to copy a tokenizer from")
    old = [p.name for p in root.glob("*") if p.suffix == ".safetensors" or p.name == "config.json"]
    if old:
        raise UserError(f"{root}: already holds {listed(sorted(old))}; give a new directory")
    num_labels = _num_labels(params)
    table = param_table(config, num_labels=num_labels)
    _check_params(table, params)
    written_fields(config)  # raises for a model that its family's files can not describe
    ids = special_ids(tokenizer_dir, _own_ids(config))
    ids |= {} if pad_id is None else {"pad_token_id": pad_id}
    files = _plan_files(_tensors(table, params, dtype), max_shard_bytes)

    # Every process must have checked the directory before the first one writes into it.
    barrier("save: checked")
    writing = first()
    if writing:
        root.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        arrays = (_fetch(t, get_leaf(params, t.spec.path)) for t in tensors)
        if writing:
            _write_file(root / name, tensors, arrays)
        else:
            for _ in arrays:  # take part in the gathering
                pass
    if writing:
        copied = [] if tokenizer_dir is None else copy_tokenizer(tokenizer_dir, root)
        if copied:
            _complete_tokenizer_config(root, pad_id, side="right" if num_labels else "left")
        if not num_labels:
            copy = read_json(root / GENERATION) if GENERATION in copied else {}
            _write_json(root / GENERATION, _merged(ids, copy, generation or {}))
        _write_index_and_config(root, config, num_labels, files, ids)
    barrier("save: written")


def _write_index_and_config(
    root: Path,
    config: ModelConfig,
    num_labels: int,
    files: dict[str, list[_Tensor]],
    ids: dict[str, Any],
) -> None:
    """The index of several files and, last, config.json."""
    if len(files) > 1:
        total = sum(t.nbytes for tensors in files.values() for t in tensors)
        weight_map = {t.name: name for name, tensors in files.items() for t in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(root / INDEX, index)
    every = (tensor for tensors in files.values() for tensor in tensors)
    stored = next(tensor.dtype for tensor in every if tensor.spec.path == ("embed",))
    written = config_json(config, num_labels=num_labels, dtype=stored.name, ids=ids)
    _write_json(root / "config.json", written)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of all; a later one counts for more, unless it is null."""
    return {key: value for fields in layers for key, value in fields.items() if value is not None}


def _complete_tokenizer_config(root: Path, pad_id: int | None, *, side: str) -> None:
    """Say in `tokenizer_config.json` how the tokenizer's own files are to be read.

    Where no class is named, transformers takes that of the family (Gemma's for a Gemma-2), whatever
    tokenizer.json holds. Its version 5 then builds a byte-pair tokenizer from the names of the
    pieces, which gives other ids, without an error. The class named here reads the files as they
    are.

    Args:
      pad_id: the id that pads; None leaves it.
      side: where batches are padded, "left" or "right", if the file does not say.
    """
    path = root / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    full = dict(said)
    if said.get("tokenizer_class") is None:
        full["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Version 4 would take the space before a comma out of a decoded text.
        full.setdefault("clean_up_tokenization_spaces", False)
        full.setdefault("padding_side", side)
    if pad_id is not None:
        full["pad_token"] = {id: piece for piece, id in token_ids(root).items()}[pad_id]
    if full != said:
        _write_json(path, full)


def _own_ids(config: ModelConfig) -> dict[str, Any]:
    """The special ids of a model's family, as far as the vocabulary has them."""
    return {
        name: id if id is not None and id < config.vocab_size else None
        for name, id in family_of(config).ids.items()
    }


def _num_labels(params: Params) -> int:
    score = params.get("score")
    return 0 if score is None else int(score.shape[-1])


def _check_params(table: tuple[ParamSpec, ...], params: Params) -> None:
    have = {
        tuple(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    want = {spec.path: spec for spec in table}
    wrong = [
        f"{'/'.join(path)} (has {list(have[path].shape)}, wants {list(spec.shape)})"
        for path, spec in want.items()
        if path in have and tuple(have[path].shape) != spec.shape
    ]
    problems = [
        ("missing", ["/".join(path) for path in want if path not in have]),
        ("surplus", ["/".join(path) for path in have if path not in want]),
        ("misshapen", wrong),
    ]
    text = [f"{len(names)} {what}: {listed(names)}" for what, names in problems if names]
    if text:
        raise CheckpointError("parameters do not fit the config. " + "; ".join(text))


def _tensors(table: tuple[ParamSpec, ...], params: Params, dtype: Any) -> list[_Tensor]:
    """All tensors in the order of layers, so that those of a layer lie together in the files."""
    by_layer: list[tuple[float, _Tensor]] = []
    for spec in table:
        stored = np.dtype(jnp.dtype(get_leaf(params, spec.path).dtype if dtype is None else dtype))
        if stored not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{'/'.join(spec.path)}: can not be stored as {stored}; choose float32, bfloat16 "
                "or float16"
            )
        for index, name in spec.hf_names():
            # The embedding comes before the layers, the final norm and the head after them.
            outside = -1.0 if spec.path == ("embed",) else math.inf
            layer = outside if index is None else float(name.split(".")[2])
            by_layer.append((layer, _Tensor(name, spec, index, stored)))
    return [tensor for _, tensor in sorted(by_layer, key=lambda pair: pair[0])]


def _plan_files(tensors: list[_Tensor], max_shard_bytes: int) -> dict[str, list[_Tensor]]:
    """The tensors of each file, by its name; split and named as transformers does it."""
    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    return {
        file: [named[name] for name in names] for file, names in split.filename_to_tensors.items()
    }


def _fetch(tensor: _Tensor, leaf: jax.Array | np.ndarray) -> np.ndarray:
    """One tensor on the host, in Hugging Face's layout and the dtype to be stored."""
    spec = tensor.spec
    if tensor.index is not None or spec.hf_transposed or leaf.dtype != tensor.dtype:
        index = np.int32(tensor.index or 0)
        leaf = _to_hf(leaf, index, spec.stacked, spec.hf_transposed, spec.hf_shape, tensor.dtype)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    else:
        array = np.asarray(leaf)
    if tensor.dtype == np.float16 and not np.isfinite(array).all():
        raise CheckpointError(f"{tensor.name}: has values beyond float16's 65504; use bfloat16")
    return array


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _to_hf(
    leaf: jax.Array | np.ndarray,
    index: np.int32,
    stacked: bool,
    transposed: bool,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> jax.Array:
    """One layer of a parameter in Hugging Face's layout and `dtype`."""
    layer = jnp.asarray(leaf)
    if stacked:
        layer = jax.lax.dynamic_index_in_dim(layer, index, 0, keepdims=False)
    return (layer.reshape(shape[::-1]).T if transposed else layer).astype(dtype)  # [O, I]


def _write_file(path: Path, tensors: list[_Tensor], arrays: Iterable[np.ndarray]) -> None:
    """Write a safetensors file: the header's length in 8 bytes, a JSON header, then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.spec.hf_shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8 bytes
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for array in arrays:
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
