"""Convert a model between Hugging Face's format and a grm_jax model directory.

    python -m grm_jax.convert import --input HF_DIR --output DIR
    python -m grm_jax.convert export --input DIR --output HF_DIR
    python -m grm_jax.convert random --tokenizer FILE_OR_DIR --output HF_DIR

Without `--dtype` every tensor keeps its stored type, and import followed by export gives the same
bits. The whole model is held once in device memory (in the machine's, on a CPU): 54 GB for 27b in
bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from grm_jax import files, hub
from grm_jax.errors import UserError, describe
from grm_jax.judge.about import About, JudgeDefaults
from grm_jax.metrics import setup_logging
from grm_jax.model import huggingface, storage
from grm_jax.model.config import model_config
from grm_jax.model.hf_config import CheckpointError, read_json, special_ids, token_ids
from grm_jax.model.params import Params, init_params, param_table
from grm_jax.output import surviving
from grm_jax.tokenizer import load_tokenizer
from grm_jax.tokenizer.vocabulary import require_rows

Dtype = Literal["float32", "bfloat16", "float16"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Import:
    """Read a Hugging Face Gemma-2 (language model or meta RM) into a model directory."""

    input: Path
    """Hugging Face directory (config.json, *.safetensors, tokenizer files), or a repo id of the
    hub, such as google/gemma-2-2b-it."""
    output: Path
    """Model directory to make; must not exist or be empty."""
    dtype: Dtype | None = None
    """Type of the parameters; as stored if not given."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model directory as a Hugging Face checkpoint, for transformers and servers."""

    input: Path
    """Model directory made by `import` or by training (or a run or stage directory)."""
    output: Path
    """Hugging Face directory to make; must not exist or be empty."""
    dtype: Dtype | None = None
    """Type of the stored tensors; as in the model directory if not given."""
    max_shard_size: str = "5GB"
    """Largest file, such as 5GB, 500MB or 2GiB."""


@dataclasses.dataclass(frozen=True)
class Random:
    """Write a Hugging Face directory with random weights, to try things without pretrained ones."""

    tokenizer: Path
    """Tokenizer folder, a sentencepiece .model file, or a repo id; gives the vocabulary."""
    output: Path
    """New directory."""
    size: Literal["tiny", "2b", "9b", "27b"] = "tiny"
    """Shape; tiny keeps its layers but gets 8,192 positions and a window of 256."""
    seed: int = 0


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Random, tyro.conf.subcommand("random")]
)


def import_model(args: Import) -> None:
    """Hugging Face directory -> model directory."""
    _refuse_nonempty(args.output)
    source = hub.resolve(args.input, CheckpointError)
    if not huggingface.is_checkpoint_dir(source) and storage.is_model_dir(source):
        raise CheckpointError(f"{source}: already is a model directory; use `export`")
    # Mistakes in small files are reported before the weights are read.
    about = _about(source)
    ids = token_ids(source)
    rows = huggingface.read_config(source).vocab_size
    require_rows(max(ids.values(), default=-1) + 1, rows, source, source)
    special = special_ids(source)
    config, params = huggingface.load(source, dtype=args.dtype, num_labels=None)
    storage.save_model(args.output, config, params, tokenizer_dir=source)
    _keep_ids(args.output / "generation_config.json", special)
    if about is not None:
        about.write(args.output)
    if not any((args.output / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        print(
            f"convert: {source} has no tokenizer files; put them into {args.output} before use",
            file=sys.stderr,
        )
    _report(args.output, params)


def export_model(args: Export) -> None:
    """Model directory -> Hugging Face directory."""
    _refuse_nonempty(args.output)
    limit = parse_size(args.max_shard_size)
    source = storage.model_folder(args.input)
    if not storage.is_model_dir(source) and huggingface.is_checkpoint_dir(source):
        raise CheckpointError(f"{source}: already is a Hugging Face directory; use `import`")
    about = _about(source)
    config, params = storage.load_model(source)
    scalar = "score" in params
    judge = None if about is None or scalar else about.judge
    huggingface.save(
        args.output,
        config,
        params,
        dtype=args.dtype,
        max_shard_bytes=limit,
        tokenizer_dir=source,
        generation=None if judge is None else generation_fields(judge, config.vocab_size),
        pad_id=_padding(source) if scalar and about is not None and about.stage else None,
    )
    if about is not None:
        about.write(args.output)
    _report(args.output, params)


def random_model(args: Random) -> None:
    """Random weights -> Hugging Face directory."""
    _refuse_nonempty(args.output)
    tokenizer = load_tokenizer(args.tokenizer)
    config = model_config(args.size).replace(vocab_size=tokenizer.vocab_size)
    if args.size == "tiny":
        config = config.replace(max_position=8192, sliding_window=256)
    params = init_params(param_table(config), jax.random.key(args.seed))
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as files:
        tokenizer.save(files)
        huggingface.save(args.output, config, params, tokenizer_dir=files)
    About(trained=False).write(args.output)
    _report(args.output, params)


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


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or not (size := math.floor(float(match[1]) * unit)):
        raise UserError(f"max_shard_size {text!r} is not a size; give one such as 5GB or 500MB")
    return size


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. A user's mistake prints one line to stderr and exits with status 1."""
    args = tyro.cli(Command, args=argv, prog="python -m grm_jax.convert", description=__doc__)  # type: ignore[arg-type]
    setup_logging()
    try:
        args = dataclasses.replace(args, output=files.expanded(args.output))
        with surviving():
            match args:
                case Import():
                    import_model(args)
                case Export():
                    export_model(args)
                case Random():
                    random_model(args)
    except (UserError, OSError) as error:
        sys.exit(f"convert: {describe(error)}")


if __name__ == "__main__":
    main()
