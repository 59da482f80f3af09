"""Model folders: written by this package, or in Hugging Face's form.

A model directory of this package:

    model.json        what the model is: format, config, width of the scalar head; written last
    params/           the parameters, an orbax checkpoint, each in the dtype it had
    grm.json          templates, how the judge is sampled (of trained models): judge/about.py
    tokenizer.json …  the tokenizer's files, as in a Hugging Face directory
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax import checkpoint, hub, typed
from grm_jax.errors import UserError, listed
from grm_jax.files import written_whole
from grm_jax.model import huggingface
from grm_jax.model.attention_backends import choose
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import CheckpointError, copy_tokenizer, read_json, read_num_labels
from grm_jax.model.params import Params, ParamSpec, build_tree, get_leaf, param_table
from grm_jax.parallel.mesh import sharding
from grm_jax.parallel.multihost import barrier, first
from grm_jax.room import require_room, state_bytes, system_words

MODEL_FILE = "model.json"
ABOUT_FILE = "grm.json"  # what a judge needs besides: templates, shapes, how it is sampled
PARAMS_DIR = "params"
MODEL_FORMAT = "grm_jax-model-1"
# How a model is computed belongs to the machine that loads it: not stored, not read where it is.
HOW = ("attention", "compute_dtype", "scan_unroll")

# What is said of a scalar model where a language model is needed.
SCALAR = (
    "a scalar model (a meta RM or a baseline), which can not write critiques; give a language model"
)


def is_model_dir(path: str | Path) -> bool:
    """Whether `path` is a model directory as `save_model` writes it."""
    root = Path(path)
    return (root / MODEL_FILE).is_file() and (root / PARAMS_DIR).is_dir()


def model_folder(path: str | Path, stage: str = "rl") -> Path:
    """The model directory that `path` means: itself, a stage's, or the given stage's of a run.

    Any other folder is returned as it is (Hugging Face's, or a mistake that the reader will name);
    `path` may be all that `hub.resolve` takes. Raises CheckpointError when it is nothing.
    """
    root = hub.resolve(path, CheckpointError)
    for candidate in (root, root / "model", root / stage / "model"):
        if is_model_dir(candidate):
            return candidate
    return root


def save_model(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Write a model directory. Call it in every process; the parameters keep their dtypes.

    Raises UserError when `directory` already holds a model, when there is no room for it or it
    can not be written, and CheckpointError when the parameters do not have the config's shapes.
    """
    root = Path(directory).absolute()
    if (root / MODEL_FILE).exists() or (root / PARAMS_DIR).exists():
        raise UserError(f"{root}: already holds a model; give a new directory")
    score = params.get("score")
    num_labels = 0 if score is None else int(score.shape[-1])
    if wrong := _misfits(params, param_table(config, num_labels=num_labels)):
        raise CheckpointError(f"parameters do not fit the config: {wrong}")
    barrier("save_model: checked")
    writing = first()
    if writing:
        root.mkdir(parents=True, exist_ok=True)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, root)
    require_room(root, state_bytes(params), "the model")
    try:
        checkpoint.save_arrays(root / PARAMS_DIR, params)
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: the model was not written: {system_words(error)}") from error
    if writing:
        about = {
            "format": MODEL_FORMAT,
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in HOW},
            "num_labels": num_labels,
        }
        with written_whole(root / MODEL_FILE) as partial:
            partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    # No process may go on to read what the first has not written yet.
    barrier("save_model: written")


def load_model(
    directory: str | Path, *, dtype: Any = None, shardings: Params | None = None
) -> tuple[ModelConfig, Params]:
    """Read a model directory.

    Args:
      dtype: of the parameters in memory; None keeps what each is stored in.
      shardings: a tree like the parameters; None puts all on the default device.

    Raises CheckpointError when `directory` holds no model, or one of another format or shape.
    """
    root = Path(directory).absolute()
    config, num_labels = read_model_file(root)
    table = param_table(config, num_labels=num_labels)
    stored = checkpoint.stored_arrays(root / PARAMS_DIR)
    if wrong := _misfits(stored, table):
        raise CheckpointError(f"{root / PARAMS_DIR}: does not fit {MODEL_FILE}: {wrong}")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(spec) -> jax.ShapeDtypeStruct:
        kept = get_leaf(stored, spec.path).dtype if dtype is None else jnp.dtype(dtype)
        where = one if shardings is None else get_leaf(shardings, spec.path)
        return jax.ShapeDtypeStruct(spec.shape, kept, sharding=where)

    return config, checkpoint.load_arrays(root / PARAMS_DIR, build_tree(table, abstract))


def read_model_file(directory: str | Path) -> tuple[ModelConfig, int]:
    """(config, num_labels) of a model directory, without its parameters.

    How the model is computed (`HOW`) has the config's defaults: who loads it chooses.
    """
    path = Path(directory) / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a model directory (no {MODEL_FILE})")
    about = read_json(path)
    if about.get("format") != MODEL_FORMAT:
        raise CheckpointError(
            f"{path}: format is {about.get('format')!r}, this version reads {MODEL_FORMAT!r}"
        )
    labels = about.get("num_labels")
    if type(labels) is not int or labels < 0:
        raise CheckpointError(f"{path}: num_labels is {labels!r}; a number, 0 or more, is expected")
    shape = about.get("config")
    if isinstance(shape, dict):
        shape = {name: value for name, value in shape.items() if name not in HOW}
    config = typed.decode(ModelConfig, shape, f"{path}: config", CheckpointError)
    return config, labels


def _misfits(tree: Params, table: tuple[ParamSpec, ...]) -> str:
    """What of `tree` (arrays or their metadata) is not as in the table; empty if nothing."""
    have = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    want = {"/".join(spec.path): spec.shape for spec in table}
    return listed(
        [
            f"{name} is {have.get(name, 'missing')}, wanted {want.get(name, 'nothing')}"
            for name in sorted(have.keys() | want.keys())
            if have.get(name) != want.get(name)
        ]
    )


def param_shardings(table: tuple[ParamSpec, ...], mesh: Mesh) -> Params:
    """NamedShardings of the parameters, from their logical axes."""
    return build_tree(table, lambda spec: sharding(mesh, spec.axes))


def read_model_config(path: str | Path) -> ModelConfig:
    """The shape of a checkpoint folder, Hugging Face's or converted. Compute dtype bfloat16 on
    accelerators, whatever machine has written the folder."""
    path = hub.resolve(path, CheckpointError)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if is_model_dir(path):
        found = read_model_file(path)[0]
        unroll = found.num_blocks if found.num_blocks <= 2 and found.embed_dim <= 128 else 1
        return found.replace(compute_dtype=dtype, scan_unroll=unroll)
    return huggingface.read_config(path).replace(compute_dtype=dtype)


def require_kind(path: str | Path, *, scalar: bool) -> None:
    """Raise CheckpointError when a checkpoint folder holds a language model where one with a scalar
    head is needed, or the other way round. Reads no weights."""
    path = hub.resolve(path, CheckpointError)
    labels = read_model_file(path)[1] if is_model_dir(path) else read_num_labels(path)
    if labels and not scalar:
        raise CheckpointError(f"{path}: {SCALAR}")
    if scalar and labels != 1:
        kind = f"has a head of width {labels}" if labels else "a language model"
        raise CheckpointError(
            f"{path}: {kind}, which can not score critiques; give a meta RM (`--config meta_rm.py` "
            "trains one)"
        )


def load_params(
    path: str | Path, *, shardings: Params, dtype: Any = jnp.float32
) -> tuple[ModelConfig, Params]:
    """Parameters of a checkpoint folder; with its scalar head, if it has one, only where
    `shardings` names one. Raises CheckpointError for a scalar model where a language model is
    needed.
    """
    scalar = "score" in shardings
    path = hub.resolve(path, CheckpointError)
    if not scalar:
        require_kind(path, scalar=False)
    if not is_model_dir(path):
        labels = None if scalar else 0
        return huggingface.load(path, dtype=dtype, shardings=shardings, num_labels=labels)
    return load_model(path, dtype=dtype, shardings=shardings)


def on_devices(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model with the attention of the devices that it is loaded on."""
    device = mesh.devices.flat[0]
    return model.replace(attention=choose("auto", device.platform, device.device_kind))
