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
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from grm_jax import files
from grm_jax.errors import UserError, describe
from grm_jax.output import surviving

Dtype = Literal["float32", "bfloat16", "float16"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Import:
    """Read a Hugging Face checkpoint (language model or meta RM) into a model directory."""

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
    size: str = "tiny"
    """Size by name, such as tiny, 2b, gemma3_1b or qwen3_4b; tiny keeps its layers but gets 8,192
    positions and a window of 256."""
    seed: int = 0


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Random, tyro.conf.subcommand("random")]
)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or not (size := math.floor(float(match[1]) * unit)):
        raise UserError(f"max_shard_size {text!r} is not a size; give one such as 5GB or 500MB")
    return size


def run(args: Import | Export | Random) -> None:
    """Convert. Raises UserError and OSError for the user."""
    # Only here, so that wrong arguments and --help need no JAX.
    from grm_jax import conversion
    from grm_jax.metrics import setup_logging

    setup_logging()
    output = files.expanded(args.output)
    match args:
        case Import():
            conversion.import_model(args.input, output, dtype=args.dtype)
        case Export():
            limit = parse_size(args.max_shard_size)
            conversion.export_model(args.input, output, dtype=args.dtype, max_shard_bytes=limit)
        case Random():
            conversion.random_model(args.tokenizer, output, size=args.size, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. A user's mistake prints one line to stderr and exits with status 1."""
    args = tyro.cli(Command, args=argv, prog="python -m grm_jax.convert", description=__doc__)  # type: ignore[arg-type]
    try:
        with surviving():
            run(args)
    except (UserError, OSError) as error:
        sys.exit(f"convert: {describe(error)}")


if __name__ == "__main__":
    main()
