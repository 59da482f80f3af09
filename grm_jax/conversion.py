"""Models from Hugging Face's format into a grm_jax model directory, back, and at random.

`grm_jax.convert` is the command.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax

from grm_jax import files, hub
from grm_jax.errors import UserError
from grm_jax.judge.about import About
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model import huggingface, storage
from grm_jax.model.config import TINY_SIZES, model_config
from grm_jax.model.hf_config import CheckpointError, read_json, special_ids, token_ids
from grm_jax.model.params import Params, init_params, param_table
from grm_jax.tokenizer import load_tokenizer
from grm_jax.tokenizer.vocabulary import require_rows

Dtype = Literal["float32", "bfloat16", "float16"]


def import_model(given: Path, output: Path, *, dtype: Dtype | None = None) -> None:
    """Hugging Face directory (or a repo id of the hub) -> model directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises UserError for an output that is not empty, and for an input that can not be read.
    """
    _refuse_nonempty(output)
    source = hub.resolve(given, CheckpointError)
    if not huggingface.is_checkpoint_dir(source) and storage.is_model_dir(source):
        raise CheckpointError(f"{source}: already is a model directory; use `export`")
    # Mistakes in small files are reported before the weights are read.
    about = _about(source)
    ids = token_ids(source)
    rows = huggingface.read_config(source).vocab_size
    require_rows(ids, rows, source, source)
    special = special_ids(source)
    config, params = huggingface.load(source, dtype=dtype, num_labels=None)
    if dtype is not None:
        config = config.replace(dtype="bfloat16" if dtype == "bfloat16" else "float32")
    storage.save_model(output, config, params, tokenizer_dir=source)
    _keep_ids(output / "generation_config.json", special)
    if about is not None:
        about.write(output)
    if not any((output / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        print(
            f"convert: {source} has no tokenizer files; put them into {output} before use",
            file=sys.stderr,
        )
    _report(output, params)


def export_model(
    given: Path, output: Path, *, dtype: Dtype | None = None, max_shard_bytes: int
) -> None:
    """Model directory (or that of a run or a stage) -> Hugging Face directory.

    Args:
      dtype: of the stored tensors; None: as in the model directory.
      max_shard_bytes: of a file.

    Raises UserError for an output that is not empty, and for an input that can not be read.
    """
    _refuse_nonempty(output)
    source = storage.model_folder(given)
    if not storage.is_model_dir(source) and huggingface.is_checkpoint_dir(source):
        raise CheckpointError(f"{source}: already is a Hugging Face directory; use `import`")
    about = _about(source)
    config, params = storage.load_model(source)
    scalar = "score" in params
    judge = None if about is None or scalar else about.judge
    huggingface.save(
        output,
        config,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_dir=source,
        generation=None if judge is None else generation_fields(judge, config.vocab_size),
        pad_id=_padding(source) if scalar and about is not None and about.stage else None,
    )
    if about is not None:
        about.write(output)
    _report(output, params)


def random_model(
    tokenizer_source: Path, output: Path, *, size: str = "tiny", seed: int = 0
) -> None:
    """Random weights of a size -> Hugging Face directory; the tokenizer gives the vocabulary.

    Raises UserError for an output that is not empty, and for a tokenizer that can not be read.
    """
    _refuse_nonempty(output)
    tokenizer = load_tokenizer(tokenizer_source)
    config = model_config(size).replace(vocab_size=tokenizer.vocab_size)
    if size in TINY_SIZES:
        config = config.replace(max_position=8192, sliding_window=256)
    params = init_params(param_table(config), jax.random.key(seed))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        huggingface.save(output, config, params, tokenizer_dir=folder)
    About(trained=False).write(output)
    _report(output, params)


def generation_fields(judge: JudgeDefaults, vocab_size: int) -> dict[str, Any]:
    """`generation_config.json` of a judge: how it is sampled where a request does not say.

    The whole vocabulary as `top_k` turns it off everywhere: transformers takes 50 where it is
    absent, and the servers do not agree on which of 0 and -1 means all.
    """
    return {
        "do_sample": judge.temperature > 0,
        "temperature": judge.temperature,
        "top_p": 1.0,
        "top_k": vocab_size,
        "max_new_tokens": judge.max_new_tokens,
    }


def _padding(source: Path) -> int | None:
    """What must pad the rows of a scalar model that was trained here; None for its own padding.

    A row ends with a stop token, and its score is read there. transformers reads at the last token
    that is not padding: where a stop token pads, as it does if no other is named, that is one token
    too early. No row ends with bos.
    """
    ids = special_ids(source)
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    if ids["pad_token_id"] is not None and ids["pad_token_id"] not in ends:
        return None
    if ids["bos_token_id"] is None or ids["bos_token_id"] in ends:
        raise CheckpointError(
            f"{source}: rows end with the token that pads them, so transformers would read their "
            "scores one token early; name another `pad_token` in tokenizer_config.json"
        )
    return ids["bos_token_id"]


def _about(source: Path) -> About | None:
    """The contents of grm.json, or None if the model has none."""
    return About.read(source) if files.there(source / storage.ABOUT_FILE) else None


def _keep_ids(file: Path, ids: dict[str, Any]) -> None:
    """Add the special token ids of config.json to generation_config.json.

    A model directory has no config.json that could keep them.
    """
    said = read_json(file) if file.exists() else {}
    more = {
        name: value
        for name, value in ids.items()
        if value is not None and said.get(name) in (None, [])
    }
    if more:
        file.write_text(json.dumps(said | more, indent=2) + "\n", encoding="utf-8")


def _refuse_nonempty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UserError(f"{path}: exists and is not empty; give a new directory")


def _report(output: Path, params: Params) -> None:
    leaves = jax.tree.leaves(params)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    print(f"{output}: {sum(leaf.size for leaf in leaves):,} parameters, read as {dtypes}")
