"""SFT on packed rows against rows padded to their length bucket: real tokens a second.

    python experiments/training/packing.py --run-dir runs/packing

The embedded world's cold start, its model and its optimizer; batches of about as many tokens each
way; steps in turn, medians. Writes packing.json and packing.md beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import tyro

from grm_jax import recipes
from grm_jax.data.examples import trajectory_example
from grm_jax.data.loader import example_batches
from grm_jax.data.trajectories import read_trajectories
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.run import Run
from grm_jax.training.sft import completion_objective
from grm_jax.training.step import init_state, make_train_step

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    run_dir: Path = Path("runs/packing")
    pack: tuple[int, ...] = (224, 448)
    """Tokens of a packed row."""
    steps: int = 30


def main(args: Arguments) -> None:
    recipe = recipes.load("sft.py")
    assert isinstance(recipe, recipes.SFTRecipe)
    mesh = recipes.MeshConfig(replica=1, fsdp=1, cpu_devices=1)
    setup = dataclasses.replace(recipe.setup, run_dir=str(args.run_dir), mesh=mesh)
    run, fitting = Run(setup), recipe.sft.fitting
    rows = read_trajectories(run.world / "cold_start.jsonl")
    examples = [trajectory_example(row, run.tokenizer, setup.templates) for row in rows]
    mean = statistics.mean(e.length for e in examples)
    print(f"{len(examples)} examples of {mean:.0f} tokens on average")
    optimizer = make_optimizer(fitting.optimizer, 10_000, run.table())
    step = make_train_step(completion_objective(run), optimizer, run.table(), run.mesh)
    ways = {}
    for pack in (0, *args.pack):
        size = round(fitting.batch_size * mean / pack) if pack else fitting.batch_size
        state = init_state(run.table(), optimizer, run.mesh, key=jax.random.key(0))
        data = example_batches(examples, setup.length_buckets, size, 0, "rows", pack=pack)
        ways[pack] = [state, data, {}]
    for _ in range(args.steps):
        for way in ways.values():
            state, data, found = way
            batch = next(data)
            shape, tokens = batch["tokens"].shape, int(batch["lengths"].sum())
            started = time.perf_counter()
            state, _ = step(state, None, batch)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - started
            way[0] = state
            if shape not in found:
                found[shape] = []  # its first step compiled it
                continue
            found[shape].append((tokens, seconds))
    results = {}
    for pack, (_, _, found) in ways.items():
        slots = sum(shape[0] * shape[1] * len(times) for shape, times in found.items())
        tokens = sum(t for times in found.values() for t, _ in times)
        # Of each shape the median step, so that a disturbed one does not count.
        seconds = sum(statistics.median(s for _, s in v) * len(v) for v in found.values() if v)
        results[pack] = {
            "shapes": [list(shape) for shape in found],
            "padding": round(1 - tokens / slots, 3),
            "tokens_per_second": round(tokens / seconds),
        }
    lines = ["| rows | padding | tokens/s | against padded |", "| :--- | ---: | ---: | ---: |"]
    base = results[0]["tokens_per_second"]
    for pack, row in results.items():
        name = f"packed, {pack} tokens" if pack else f"padded to {setup.length_buckets}"
        rate = row["tokens_per_second"]
        lines.append(f"| {name} | {row['padding']:.0%} | {rate:,} | {rate / base:.2f}x |")
    text = "\n".join(lines) + "\n"
    print(text)
    (HERE / "packing.md").write_text(text, encoding="utf-8")
    (HERE / "packing.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
