"""Model directories: this package's own, which it reads and writes, and Hugging Face's.

A model directory of this package:

    model.json        the format, the config and the width of the scalar head; written last
    params/           the parameters as an orbax checkpoint, each in the dtype it had
    grm.json          of a trained judge: its templates and how it is sampled (judge/about.py)
    tokenizer.json …  the tokenizer's files, as in a Hugging Face directory
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax import checkpoint, hub, typed
from grm_jax.errors import UserError, listed
from grm_jax.files import written_whole
from grm_jax.model import huggingface
from grm_jax.model.attention_backends import Backend, choose
from grm_jax.model.compute_dtype import choose_dtype
from grm_jax.model.config import ModelConfig
from grm_jax.model.families import FAMILIES
from grm_jax.model.hf_config import CheckpointError, copy_tokenizer, read_json, read_num_labels
from grm_jax.model.options import ComputeDtype
from grm_jax.model.params import Params, ParamSpec, build_tree, get_leaf, param_table
from grm_jax.parallel.mesh import sharding
from grm_jax.parallel.multihost import barrier, first
from grm_jax.room import require_room, state_bytes, system_words

MODEL_FILE = "model.json"
ABOUT_FILE = "grm.json"  # what a judge needs besides the model: templates, how it is sampled
PARAMS_DIR = "params"
MODEL_FORMAT = "grm_jax-model-1"
# The config's fields that say how a model is computed. They depend on the machine that loads the
# model, so they are not stored, and are ignored in files that have them.
HOW = ("attention", "compute_dtype", "scan_unroll")

# The end of the error message where a language model is needed and a scalar model is given.
SCALAR = (
    "a scalar model (a meta RM or a baseline), which can not write critiques; give a language model"
)


def is_model_dir(path: str | Path) -> bool:
    """Whether `path` is a model directory as `save_model` writes it."""
    root = Path(path)
    return (root / MODEL_FILE).is_file() and (root / PARAMS_DIR).is_dir()


def model_folder(path: str | Path, stage: str = "rl") -> Path:
    """The model directory that `path` stands for.

    `path` may be a model directory, the folder of a stage, or the folder of a run, for which the
    model of `stage` is returned. Any other folder is returned unchanged: it is Hugging Face's, or a
    mistake that its reader reports. `hub.resolve` says which other forms `path` may have; it raises
    CheckpointError where nothing is found.
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
    """Write a model directory; the parameters keep their dtypes. Every process must call this.

    Args:
      tokenizer_dir: a directory whose tokenizer files are copied.

    Raises UserError when `directory` already holds a model, when there is no room for the model or
    it can not be written, and CheckpointError when the parameters do not have the config's shapes.
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
    # No process may continue, and read the files, before the first process has written them.
    barrier("save_model: written")


def load_model(
    directory: str | Path, *, dtype: Any = None, shardings: Params | None = None
) -> tuple[ModelConfig, Params]:
    """Read a model directory.

    Args:
      dtype: the parameters' dtype in memory; None keeps the dtype in which each is stored.
      shardings: a tree like the parameters; None puts all on the default device. Without a "head"
        in it, an output head of the model's own is left out.

    Raises CheckpointError when `directory` holds no model, or one of another format or shape.
    """
    root = Path(directory).absolute()
    config, num_labels = read_model_file(root)
    table = param_table(config, num_labels=num_labels)
    stored = checkpoint.stored_arrays(root / PARAMS_DIR)
    if wrong := _misfits(stored, table):
        raise CheckpointError(f"{root / PARAMS_DIR}: does not fit {MODEL_FILE}: {wrong}")
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    headless = shardings is not None and "head" not in shardings

    def abstract(spec) -> jax.ShapeDtypeStruct:
        kept = get_leaf(stored, spec.path).dtype if dtype is None else jnp.dtype(dtype)
        # A head that is left out is read as well, laid out as the embedding, which has its shape.
        path = ("embed",) if headless and spec.path == ("head",) else spec.path
        placed = default if shardings is None else get_leaf(shardings, path)
        return jax.ShapeDtypeStruct(spec.shape, kept, sharding=placed)

    params = checkpoint.load_arrays(root / PARAMS_DIR, build_tree(table, abstract))
    if headless:
        params.pop("head", None)
    return config, params


def read_model_file(directory: str | Path) -> tuple[ModelConfig, int]:
    """(config, num_labels) of a model directory, without its parameters.

    The fields that say how the model is computed (`HOW`) have their defaults; the caller sets them.
    Raises CheckpointError where the file is missing or does not have this format.
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
    if config.family not in FAMILIES:
        raise CheckpointError(
            f"{path}: config.family is {config.family!r}; this version knows "
            f"{', '.join(FAMILIES)}. Correct it, or install the version that wrote the file"
        )
    return config, labels


def _misfits(tree: Params, table: tuple[ParamSpec, ...]) -> str:
    """The parameters of `tree` (arrays or their metadata) that do not fit the table, as a text.

    The text names those that are missing, surplus or of another shape; it is empty if all fit.
    """
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
    """The config of a model directory, Hugging Face's or this package's.

    How the model is computed is left at its defaults; `on_devices` chooses it.
    """
    path = hub.resolve(path, CheckpointError)
    if is_model_dir(path):
        config = read_model_file(path)[0]
        unroll = config.num_blocks if config.num_blocks <= 2 and config.embed_dim <= 128 else 1
        return config.replace(scan_unroll=unroll)
    return huggingface.read_config(path)


def require_kind(path: str | Path, *, scalar: bool) -> None:
    """Raise CheckpointError when a model directory holds a language model and a scalar head is
    needed, or the other way round. No weights are read."""
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
    """The config and the parameters of a model directory, Hugging Face's or this package's.

    Args:
      shardings: a tree like the parameters. If it has a "score", a scalar head is read where the
        model has one (see `require_kind`); if it has none, the model must be a language model.
      dtype: the parameters' dtype in memory; None keeps the dtype in which each is stored.

    Raises CheckpointError for a scalar model where a language model is needed, and for a model that
    can not be read.
    """
    scalar = "score" in shardings
    path = hub.resolve(path, CheckpointError)
    if not scalar:
        require_kind(path, scalar=False)
    if not is_model_dir(path):
        labels = None if scalar else 0
        return huggingface.load(path, dtype=dtype, shardings=shardings, num_labels=labels)
    return load_model(path, dtype=dtype, shardings=shardings)


def on_devices(
    model: ModelConfig,
    mesh: Mesh,
    compute_dtype: ComputeDtype = "auto",
    attention: Backend | Literal["auto"] = "auto",
) -> ModelConfig:
    """The config with the compute dtype and the attention backend that suit the mesh's devices.

    Raises UserError for what is unknown, or can not run on them.
    """
    device = mesh.devices.flat[0]
    return on_kind(model, device.platform, device.device_kind, compute_dtype, attention)


def on_kind(
    model: ModelConfig,
    platform: str,
    device_kind: str,
    compute_dtype: ComputeDtype,
    attention: Backend | Literal["auto"],
) -> ModelConfig:
    """As `on_devices`, for devices of which only the platform and the kind are known."""
    return model.replace(
        compute_dtype=choose_dtype(compute_dtype, model.dtype, platform),
        attention=choose(attention, platform, device_kind),
    )
