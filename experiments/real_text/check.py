"""Compares a pretrained model with transformers, on real text.

    python experiments/real_text/check.py models/smollm2 --texts runs/real_text/data/heldout.jsonl

For a Hugging Face folder (see model.py) and a file of preference records it prints

    logits      the largest difference of any logit in float32, over records of up to 256 tokens
    greedy      for how many prompts 64 greedy tokens of the sampler are those of `generate`
    tokenizer   for how many of 1,000 texts the ids are the same
    round trip  whether import and export give every tensor of the folder bit by bit
    critiques   with --critiques, of a judge that `grm_jax.convert export` has written: for how many
                records the judge's greedy critique is the text that `generate` writes

and ends with status 1 unless all agree. transformers and torch are needed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors import safe_open

from grm_jax import conversion
from grm_jax.data.preferences import read_preferences
from grm_jax.errors import UserError
from grm_jax.judge.judge import Judge
from grm_jax.judge.request import ScoreOptions
from grm_jax.model.heads import logits
from grm_jax.model.params import param_table
from grm_jax.model.storage import load_params, param_shardings, read_model_config
from grm_jax.model.transformer import encode
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request
from grm_jax.tokenizer import load_tokenizer

LENGTH, NEW, CLOSE = 256, 64, 1e-3


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[Path]
    """A Hugging Face folder."""
    texts: Path
    """Preference records, whose conversations and responses are the texts."""
    records: int = 8
    """How many records are computed."""
    strings: int = 1000
    """How many texts are tokenized."""
    critiques: int = 0
    """Of how many records an exported judge writes a greedy critique."""


def main(args: Arguments) -> int:
    texts = [
        text
        for record in read_preferences(args.texts)
        for text in (*(turn["content"] for turn in record.turns), *record.responses)
        if text
    ]
    long = [text for text in texts if len(text) > 200][: args.records]
    if len(long) < args.records or len(texts) < args.strings:
        raise UserError(f"{args.texts}: {len(texts)} texts; give a file with more")
    theirs = Transformers(args.model)
    same = tokenizer(args.model, theirs, texts[: args.strings])
    print(f"tokenizer   {same} of {args.strings} texts have the ids of transformers", flush=True)
    prompts = [theirs.ids(text)[:LENGTH] for text in long]
    difference, equal = computed(args.model, theirs, prompts)
    print(f"logits      differ by {difference:.1e} at most, over {len(prompts)} texts", flush=True)
    print(f"greedy      {equal} of {len(prompts)} prompts are continued by the same {NEW} tokens")
    tensors, alike = round_trip(args.model)
    print(f"round trip  {alike} of {tensors} tensors have the same bits", flush=True)
    good = (same, equal, alike) == (args.strings, len(prompts), tensors) and difference < CLOSE
    if args.critiques:
        written = critiques(args, theirs)
        print(f"critiques   {written} of {args.critiques} are those of transformers", flush=True)
        good = good and written == args.critiques
    print("All agree." if good else "They do not all agree.")
    return 0 if good else 1


class Transformers:
    """The model as transformers computes it, in float32."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch: Any = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids: list[int]) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].numpy()

    def greedy(self, ids: list[int], stops: tuple[int, ...], new: int = NEW) -> list[int]:
        given = self.torch.tensor([ids])
        out = self.model.generate(
            given, attention_mask=self.torch.ones_like(given), max_new_tokens=new, do_sample=False,
            eos_token_id=list(stops), pad_token_id=stops[0],
        )  # fmt: skip
        return out[0, len(ids) :].tolist()


def tokenizer(folder: Path, theirs: Transformers, texts: list[str]) -> int:
    ours = load_tokenizer(folder)
    return sum(ours.encode(text) == theirs.ids(text) for text in texts)


def computed(folder: Path, theirs: Transformers, prompts: list[list[int]]) -> tuple[float, int]:
    """(the largest difference of a logit, how many greedy continuations are equal)."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    config = read_model_config(folder).replace(compute_dtype="float32")
    shardings = param_shardings(param_table(config), mesh)
    _, params = load_params(folder, shardings=shardings, dtype=jnp.float32)

    @jax.jit
    def compute(tokens, lengths):
        return logits(params, config, encode(params, config, tokens, lengths))

    difference = 0.0
    for ids in prompts:
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        found = np.asarray(compute(row, np.asarray([len(ids)])))[0, : len(ids)]
        difference = max(difference, float(np.abs(found - theirs.logits(ids)).max()))
    stops = load_tokenizer(folder).stop_ids
    sampler = Sampler(config, stops, EngineConfig(max_rows=len(prompts), page=64), mesh)
    requests = [Request(str(i), tuple(ids), (0,)) for i, ids in enumerate(prompts)]
    greedy = SamplingConfig(temperature=0, max_new_tokens=NEW)
    samples = sampler.sample(params, requests, greedy, jax.random.key(0))
    equal = sum(
        sample.tokens.tolist() == theirs.greedy(prompts[int(sample.example_id)], stops)
        for sample in samples
    )
    return difference, equal


def critiques(args: Arguments, theirs: Transformers) -> int:
    """How many greedy critiques of an exported judge are the same text."""
    records = [r for r in read_preferences(args.texts) if len(r.query) < 800][: args.critiques]
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    judge = Judge.load(args.model, mesh=mesh, compute_dtype="float32")
    prompts = judge.prompts(ScoreOptions(order="given"))
    equal = 0
    for record in records:
        verdict = judge.score(record.turns, record.responses, 1, temperature=0.0, order="given")
        (critique,) = verdict.critiques
        ids = list(prompts.ids(record, critique.order))
        stops, new = judge.tokenizer.stop_ids, judge.defaults.max_new_tokens
        text = judge.tokenizer.decode([i for i in theirs.greedy(ids, stops, new) if i not in stops])
        equal += text == critique.text
    return equal


def round_trip(folder: Path) -> tuple[int, int]:
    """(tensors of the folder, those that import and export give back bit by bit)."""
    with tempfile.TemporaryDirectory() as scratch:
        ours, back = Path(scratch) / "ours", Path(scratch) / "back"
        conversion.import_model(folder, ours)
        conversion.export_model(ours, back, max_shard_bytes=5 * 10**9)
        before, after = read(folder), read(back)
        alike = sum(
            name in after and tensor.dtype == after[name].dtype and tensor.equal(after[name])
            for name, tensor in before.items()
        )
        return len(before), alike if before.keys() == after.keys() else 0


def read(folder: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments, description=__doc__)))
    except UserError as error:
        sys.exit(f"error: {error}")
