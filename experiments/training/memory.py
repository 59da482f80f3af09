"""Peak memory of a train step with 256k words and 4,096 tokens: chunked log-probabilities against
straightforward ones, which hold every logit.

    python experiments/training/memory.py

A step from random weights (4 layers of width 768, float32, AdamW), compiled for the CPU in a
process of its own: what the compiled program holds (arguments, results, scratch). `--run KIND`
takes the step, too, and adds the process's largest resident memory: the straightforward one needs
more than 20 GB. Writes memory.json beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
KINDS = ("chunked", "straightforward")


@dataclasses.dataclass(frozen=True)
class Arguments:
    kind: Literal["all", "chunked", "straightforward"] = "all"
    """One of them, in this process; or all, each in its own."""
    words: int = 256_000
    tokens: int = 4096
    chunk: int = 512
    run: tuple[Literal["chunked", "straightforward"], ...] = ()
    """Which of them to run as well."""


def main(args: Arguments) -> None:
    if args.kind != "all":
        print(json.dumps(step(args)))
        return
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, "--words", str(args.words)]
        command += ["--tokens", str(args.tokens), "--chunk", str(args.chunk)]
        command += ["--run", kind] if kind in args.run else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, found[kind], flush=True)
    chunked, plain = (found[kind]["compiled_gib"] for kind in KINDS)
    print(f"{chunked:.1f} of {plain:.1f} GiB: {chunked / plain:.2f}")
    results = json.dumps({**dataclasses.asdict(args), **found}, indent=2) + "\n"
    (HERE / "memory.json").write_text(results, encoding="utf-8")


def step(args: Arguments) -> dict[str, float]:
    """What one step holds; if it is run, its loss and the process's peak."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grm_jax.model.config import ModelConfig
    from grm_jax.model.heads import logits, token_logprobs
    from grm_jax.model.params import param_table
    from grm_jax.model.transformer import encode
    from grm_jax.parallel.mesh import make_mesh, put_batch
    from grm_jax.training.losses import sft_loss
    from grm_jax.training.optimizer import make_optimizer
    from grm_jax.training.options import OptimizerConfig
    from grm_jax.training.step import init_state, make_train_step

    model = ModelConfig(
        vocab_size=args.words, num_layers=4, embed_dim=768, hidden_dim=3072, num_heads=8,
        num_kv_heads=4, head_dim=128, query_pre_attn_scalar=128.0, sliding_window=1024,
        compute_dtype="float32", attention="chunked",
    )  # fmt: skip
    mesh, table = make_mesh(1, 1, 1, jax.devices()[:1]), param_table(model)

    def logprobs(params, hidden, targets):
        if args.kind == "chunked":
            return token_logprobs(
                params, model, hidden, targets, temperature=1.0, chunk=args.chunk
            )[0]
        every = jax.nn.log_softmax(logits(params, model, hidden), axis=-1)
        return jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]

    def loss(params, frozen, batch):
        del frozen
        lengths = jnp.full(batch["tokens"].shape[0], args.tokens)
        hidden = encode(params, model, batch["tokens"], lengths, remat="block")
        return sft_loss(logprobs(params, hidden, batch["targets"]), batch["mask"])

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 10, table)
    train_step = make_train_step(loss, optimizer, table, mesh)
    state = init_state(table, optimizer, mesh, key=jax.random.key(0))
    rows = np.random.default_rng(0).integers(3, args.words, (2, 1, args.tokens)).astype(np.int32)
    batch = {"tokens": rows[0], "targets": rows[1], "mask": np.ones((1, args.tokens), np.float32)}
    memory = train_step.lower(state, None, put_batch(batch, mesh)).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {"compiled_gib": round((held + memory.temp_size_in_bytes) / 2**30, 2)}
    if args.kind in args.run:
        state, metrics = train_step(state, None, batch)
        found |= {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
        jax.block_until_ready(state)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found["peak_gib"] = round(peak, 2)
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments))
