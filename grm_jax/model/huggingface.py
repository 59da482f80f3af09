"""Checkpoints in Hugging Face's format, in and out, through the parameter table.

A directory holds `config.json`, one `model.safetensors` or shards with
`model.safetensors.index.json`, and the tokenizer's files. The model, of one of the families, is a
language model (such as `Gemma2ForCausalLM`) or has a scalar head (such as
`Gemma2ForSequenceClassification`, whose `score.weight` a meta RM has). Of a multimodal checkpoint
the text model is read. Neither reading nor writing needs torch.

Memory for reading: every process reads only the parts that its devices hold, one tensor (one layer
of one parameter) at a time, casts it on the device and writes it into the stacked device array in
place. So the host holds at most two copies (as read, and transposed) of the local part of one
tensor, the largest being the embedding: 2.4 GB for 27b in bfloat16. The device holds the parameters
and, for a moment, one more tensor; on the CPU backend the device is the host.

Memory for writing: one tensor at a time is gathered, transposed, cast and appended to its file. The
file's header is known before, so that no shard is ever whole in memory.

Dimensions: N blocks (stacked), D embedding, H query heads, h size of a head, I the input dimensions
of a weight, flattened, O its output dimensions, flattened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open

from grm_jax import files
from grm_jax.errors import listed
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    read_config,
    read_json,
    read_num_labels,
    text_prefixes,
)
from grm_jax.model.hf_export import save
from grm_jax.model.params import EMBED, HEAD, Params, ParamSpec, build_tree, get_leaf, param_table

__all__ = ["CheckpointError", "is_checkpoint_dir", "load", "read_config", "save"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Files of early versions of transformers, such as those of Llama 2, also hold the frequencies of
# the rotary embedding in every layer. They follow from config.json; transformers leaves them out.
_FREQUENCIES = ".self_attn.rotary_emb.inv_freq"
_COMPARE_ROWS = 4096  # how many rows of the embedding and of a separate head are compared at once


def is_checkpoint_dir(path: str | Path) -> bool:
    """Whether `path` has a `config.json` and safetensors weights, of any model."""
    root = Path(path)
    return (root / "config.json").is_file() and any(
        (root / name).is_file() for name in (SINGLE, INDEX)
    )


def load(
    directory: str | Path,
    *,
    dtype: Any = None,
    shardings: Params | None = None,
    num_labels: int | None = 0,
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint into the parameter tree of `model.params`.

    Args:
      directory: a folder with `config.json` and safetensors files.
      dtype: the parameters' dtype in memory; None keeps the dtype in which each is stored.
      shardings: a tree like the parameters; None leaves all on the default device. Without a "head"
        in it, an output head of the model's own is left out.
      num_labels: 0 for a language model, 1 for a meta RM (`score.weight`); None takes what
        `config.json` declares.

    Returns:
      the config, and the parameters.

    Raises:
      CheckpointError: for a directory that holds no checkpoint of a family, unimplemented values,
        pickled weights, and missing, surplus or misshapen tensors (which are listed). Where the
        head is tied, a `lm_head.weight` is allowed if it equals the embedding. An embedding with
        more rows than `vocab_size` is an error, and is not cut: the rows may be padding (Google's
        tables have 256128) or tokens that someone added.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory; give a downloaded checkpoint's folder")
    config = read_config(root)
    declared = read_num_labels(root)
    labels = declared if num_labels is None else num_labels
    if labels != declared:
        kind = f"a scalar head of width {declared} (a meta RM or another classifier)"
        raise CheckpointError(
            f"{root / 'config.json'}: declares {kind if declared else 'a language model'}, asked "
            f"for {labels}; pass num_labels={declared} or give another checkpoint"
        )
    table = param_table(config, num_labels=labels)
    with _open(root) as stored:
        tensors = _text_model(root, stored)
        _check_names_and_shapes(root, config, table, tensors)
        if shardings is not None and "head" not in shardings:
            table = tuple(spec for spec in table if spec.path != ("head",))
        wanted = {spec.path: _wanted_dtype(spec, tensors, dtype) for spec in table}

        def leaf(spec: ParamSpec) -> jax.Array:
            sharding = None if shardings is None else get_leaf(shardings, spec.path)
            return _read_parameter(spec, tensors, wanted[spec.path], sharding)

        return config, build_tree(table, leaf)


@contextlib.contextmanager
def _open(root: Path) -> Iterator[dict[str, Any]]:
    """A lazy safetensors slice for each tensor name, over all files of the checkpoint."""
    tensors: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for path in _weight_files(root):
            files.require_content(path, CheckpointError)
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a whole safetensors file ({error}); fetch or export it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                if name in tensors:
                    raise CheckpointError(f"{path}: {name} is in another shard too")
                tensors[name] = handle.get_slice(name)
        yield tensors


def _text_model(root: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the text model, by the names that they have in a text model's own files."""
    tensors = {name: part for name, part in tensors.items() if not name.endswith(_FREQUENCIES)}
    wrapper = text_prefixes(root)
    if wrapper is None:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(wrapper.others):
            continue
        for begins, instead in wrapper.prefixes:
            if name.startswith(begins):
                name = instead + name.removeprefix(begins)
                break
        found[name] = tensor
    return found


def _weight_files(root: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError where there are none."""
    single, index = root / SINGLE, root / INDEX
    if files.there(single) and files.there(index):
        raise CheckpointError(
            f"{root}: has both {SINGLE} and {INDEX}; remove the one that is out of date"
        )
    if files.there(single):
        return [single]
    if files.there(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{index}: weight_map: {name} is in {file!r:.60}, no file")
        shards = [root / name for name in sorted(set(weight_map.values()))]
        for path in shards:
            files.require_content(path, CheckpointError)
        lost = [path.name for path in shards if not path.is_file()]
        if lost:
            raise CheckpointError(f"{index}: names files that are not there: {listed(lost)}")
        return shards
    if (root / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{root}: holds an adapter, not a model; merge it first (peft: merge_and_unload, then "
            "save_pretrained)"
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in root.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{root}: holds pickled weights ({listed(pickles)}), which can run code when read and "
            "are refused; save the model again as safetensors (transformers: "
            "save_pretrained(..., safe_serialization=True))"
        )
    raise CheckpointError(f"{root}: has neither {SINGLE} nor {INDEX}")


def _check_names_and_shapes(
    root: Path, config: ModelConfig, table: tuple[ParamSpec, ...], tensors: dict[str, Any]
) -> None:
    """Raise CheckpointError unless the tensors are those of the table and the head is tied."""
    expected = {name: spec.hf_shape for spec in table for _, name in spec.hf_names()}
    embedding, head = EMBED, HEAD
    shapes = {name: tuple(part.get_shape()) for name, part in tensors.items()}
    have, want = shapes.get(embedding), expected[embedding]
    spare = (head,) if config.tied_head else ()  # a tied head may be stored, too
    if have is not None and have[1:] == want[1:] and have[0] > want[0]:
        raise CheckpointError(
            f"{root}: {embedding} has {have[0]} rows, config.json says vocab_size "
            f"{config.vocab_size}. If the last {have[0] - want[0]} are padding, export again with "
            f"the first {want[0]} rows only (they would take part in the softmax); if they are "
            f"added tokens, set vocab_size to {have[0]}"
        )
    problems = [
        ("missing", [name for name in expected if name not in shapes]),
        ("surplus", [name for name in shapes if name not in expected and name not in spare]),
        (
            "misshapen",
            [
                f"{name} (has {list(shapes[name])}, wants {list(shape)})"
                for name, shape in expected.items()
                if name in shapes and shapes[name] != shape
            ],
        ),
        (
            "stored in a type that is not F32, BF16 or F16",
            [
                f"{name} ({part.get_dtype()})"
                for name, part in tensors.items()
                if part.get_dtype() not in DTYPES
            ],
        ),
    ]
    text = [f"{len(names)} {what}: {listed(names)}" for what, names in problems if names]
    if head in expected and head not in shapes:
        text.append(
            f"tie_word_embeddings is not true in config.json, so {head} is needed: save the model "
            "again with its head; if its head is the embedding, set tie_word_embeddings to true"
        )
    if text:
        if "score.weight" in shapes and "score.weight" not in expected:
            text.append(
                "score.weight is a scalar head (a meta RM or another classifier), and config.json "
                "declares a language model: give one, or correct `architectures`"
            )
        raise CheckpointError(f"{root}: tensors do not fit its config.json. " + "; ".join(text))
    if head in spare and head in tensors and not _same_values(tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{root}: {head} differs from {embedding}, and config.json ties the two; if the model "
            "has a head of its own, set tie_word_embeddings to false"
        )


def _same_values(a: Any, b: Any) -> bool:
    if a.get_shape() != b.get_shape():
        return False
    rows = a.get_shape()[0]
    return all(
        np.array_equal(
            a[start : min(start + _COMPARE_ROWS, rows)].astype(np.float32),
            b[start : min(start + _COMPARE_ROWS, rows)].astype(np.float32),
        )
        for start in range(0, rows, _COMPARE_ROWS)
    )


def _wanted_dtype(spec: ParamSpec, tensors: dict[str, Any], dtype: Any) -> np.dtype:
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    stored = {tensors[name].get_dtype() for _, name in spec.hf_names()}
    if len(stored) > 1:
        raise CheckpointError(
            f"{spec.hf_name} is stored as {sorted(stored)} in different layers, which are one "
            "array here; pass a dtype"
        )
    return np.dtype(DTYPES[stored.pop()])


def _read_parameter(
    spec: ParamSpec, tensors: dict[str, Any], dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """One parameter on its devices: one tensor, or those of N layers in one stacked array."""
    names = list(spec.hf_names())
    if not spec.stacked:
        (_, name), *_ = names
        array = _place(spec.layer_shape, sharding, functools.partial(_part, spec, tensors[name]))
        return array if array.dtype == dtype else _cast(sharding, dtype)(array)
    zeros, put = _stacking(spec.shape, dtype, sharding)
    stack = zeros()
    for index, name in names:
        read = functools.partial(_part, spec, tensors[name])
        layer = _place(spec.layer_shape, _layer_sharding(sharding), read)
        # Waiting bounds the memory: without it the host would read faster than it transfers.
        stack = jax.block_until_ready(put(stack, layer, np.int32(index or 0)))
    return stack


def _part(spec: ParamSpec, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part at `index` of one layer's parameter, in the layout of `params` and the stored dtype.

    Hugging Face stores a linear layer as [O, I]; `q` [D, H, h], for example, as [H * h, D]. Only
    the rows and columns that cover `index` are read.
    """
    if not spec.hf_transposed:
        return tensor[index]
    if not spec.inputs:  # a bias
        rows = _cover(spec.layer_shape, index)
        return tensor[rows.flat].reshape(rows.shape)[rows.rest]
    split = len(spec.inputs)  # the input dimensions lead
    columns, rows = (
        _cover(spec.layer_shape[part], index[part]) for part in (slice(split), slice(split, None))
    )
    block = tensor[rows.flat, columns.flat].T.reshape(*columns.shape, *rows.shape)
    return np.ascontiguousarray(block[(*columns.rest, *rows.rest)])


@dataclasses.dataclass(frozen=True)
class _Cover:
    """A contiguous part of a flattened group of dimensions that covers an index into the group.

    Attributes:
      flat: the part of the flattened group.
      shape: the part's shape with its dimensions apart.
      rest: what of that shape the index selects.

    Example: heads 2:4 of [8, 256] are the part 512:1024, of shape [2, 256], of which all is wanted.
    """

    flat: slice
    shape: tuple[int, ...]
    rest: tuple[slice, ...]


def _cover(dims: tuple[int, ...], index: tuple[slice, ...]) -> _Cover:
    start, stop, _ = index[0].indices(dims[0])
    inner = math.prod(dims[1:])
    return _Cover(
        slice(start * inner, stop * inner), (stop - start, *dims[1:]), (slice(None), *index[1:])
    )


def _place(
    shape: tuple[int, ...],
    sharding: Sharding | None,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """A device array whose parts are read one by one; devices with equal parts share one read."""
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    seen: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in seen:
            seen[key] = read(index)
        return seen[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.lru_cache(maxsize=64)
def _stacking(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
    """Two jitted functions for a stacked parameter: one that makes zeros, one that writes a layer
    into them in place."""
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)

    def put(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(dtype), index, 0)

    return zeros, jax.jit(put, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _cast(sharding: Sharding | None, dtype: np.dtype):
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)
