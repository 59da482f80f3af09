"""One gradient step of supervised training or of GRPO, as `grm_jax.train` takes it: tokens/s, model
FLOPs utilisation and peak memory, for one attention backend.

A step has 4 rows of 4,096 tokens: of supervised training a prompt of 3,072 and a completion of
1,024, of GRPO a prompt of 2,048 and four rollouts of 512. Parameters are float32 and products
bfloat16; with `--lora-rank` the weights are frozen in bfloat16. Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))

import jax
import jax.numpy as jnp
import numpy as np
from device import random_params
from part import Peak, Report, about_jax, parser
from shapes import DRY_MODEL

from grm_jax import recipes
from grm_jax.data.collate import Example, collate, collate_groups
from grm_jax.errors import UserError
from grm_jax.model.config import SIZES
from grm_jax.model.flops import train_flops
from grm_jax.model.lora import LoRAConfig
from grm_jax.parallel.devices import mesh_flops
from grm_jax.planning.programs import PlannedRun
from grm_jax.training.losses import group_advantages
from grm_jax.training.optimizer import OptimizerConfig, make_optimizer
from grm_jax.training.rl import by_length, policy_objective
from grm_jax.training.sft import completion_objective
from grm_jax.training.step import init_state, make_train_step, micro_batches
from grm_jax.training.trainable import Trainable


class Sizes(NamedTuple):
    """A step: rows, the tokens of prompts and completions of a row of supervised training, and the
    tokens of prompts, the rollouts, and their tokens, of a row of GRPO."""

    rows: int
    sft: tuple[int, int]
    grpo: tuple[int, int, int]


FULL = Sizes(4, (3072, 1024), (2048, 4, 512))
DRY = Sizes(2, (40, 24), (32, 2, 16))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--loss", choices=("sft", "grpo"), required=True)
    options.add_argument("--size", default="2b")
    options.add_argument("--attention", default="auto")
    options.add_argument("--remat", default="block")
    options.add_argument("--lora-rank", type=int, default=0)
    options.add_argument("--device-batch", type=int, default=0, help="rows at a time; 0: all")
    options.add_argument("--repeats", type=int, default=4)
    told = options.parse_args()
    report = Report(told)
    report.about(**about_jax())
    if told.dry:
        SIZES["toy"] = DRY_MODEL
        told.size = "toy"
    try:
        run = planned_run(told)
        attention = run.model.attention
    except UserError as error:  # a backend that can not run here
        report.note(f"{told.loss}, {told.attention}: not measured: {error}.")
        return
    sizes = DRY if told.dry else FULL
    batch, tokens, learned = make_batch(told.loss, sizes, run.model.vocab_size)
    peak = Peak(run.mesh.devices.flat[0])
    step, state, frozen = prepared(told, run, sizes.rows)
    seconds, losses = [], []
    for _ in range(told.repeats + 1):
        started = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    assert np.isfinite(losses).all(), losses
    middle = statistics.median(seconds[1:])
    flops = train_flops(run.model, [(tokens, learned)]) * sizes.rows
    if told.lora_rank:  # frozen weights have no gradients: two forward passes instead of three
        flops *= 2 / 3
    most = mesh_flops(run.mesh)
    report.row(**{
        "step": told.loss,
        "size": told.size + (f", LoRA {told.lora_rank}" if told.lora_rank else ""),
        "dtype": run.model.compute_dtype,
        "attention": attention,
        "remat": told.remat,
        "rows x tokens": f"{sizes.rows} x {tokens}",
        "tokens/s": round(sizes.rows * tokens / middle, 1),
        "step, s": round(middle, 4),
        "TFLOP/s": round(flops / middle / 1e12, 2),
        "model FLOPs utilisation": round(flops / middle / most, 3) if most else None,
        "peak, GiB": peak.gib(),
        "first step, s": round(seconds[0], 1),
        "loss": round(losses[-1], 4),
    })  # fmt: skip


def planned_run(told: argparse.Namespace) -> PlannedRun:
    """A run without files, on the first device. Raises UserError for an attention backend that can
    not run there."""
    setup = recipes.Setup(
        size=told.size,
        compute_dtype="bfloat16",
        attention=told.attention,
        remat=told.remat,
        lora=LoRAConfig(rank=told.lora_rank),
        mesh=recipes.MeshConfig(replica=1, fsdp=1),
    )
    device = jax.devices()[0]
    return PlannedRun(setup, [device], device.device_kind, compiles=False)


def make_batch(loss: str, sizes: Sizes, words: int) -> tuple[dict[str, np.ndarray], int, int]:
    """A random batch, the tokens of a row of it, and how many of these are learned."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.integers(4, words, shape).tolist()

    if loss == "sft":
        prompt, completion = sizes.sft
        rows = [Example(tuple(draw(prompt)), tuple(draw(completion))) for _ in range(sizes.rows)]
        batch = collate(rows, length=prompt + completion, completion=completion)
        return batch, prompt + completion, completion
    prompt, group, completion = sizes.grpo
    batch = collate_groups(
        draw(sizes.rows, prompt), draw(sizes.rows, group, completion),
        length=prompt, completion=completion,
    )  # fmt: skip
    rewards = jnp.asarray(rng.normal(size=(sizes.rows, group)), jnp.float32)
    batch["advantages"] = np.asarray(group_advantages(rewards))
    # Log-probabilities of the policy that drew the tokens, and of the reference: near to those of
    # random weights.
    batch["old"] = batch["reference"] = np.full_like(batch["mask"], -np.log(words))
    return batch, prompt + group * completion, group * completion


def prepared(told: argparse.Namespace, run: PlannedRun, rows: int) -> tuple[Any, Any, Any]:
    """The train step, its first state, and the frozen weights, if any."""
    trainable = Trainable(run, "base")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), 100, trainable.table)
    grpo = recipes.RL(prompts=rows)
    step = make_train_step(
        policy_objective(run, grpo, trainable.assemble)
        if told.loss == "grpo"
        else completion_objective(run, trainable.assemble),
        optimizer, trainable.table, run.mesh,
        micro_batches=micro_batches(rows, told.device_batch, run.mesh),
        cut=by_length if told.loss == "grpo" else None,
    )  # fmt: skip
    frozen = None
    if trainable.adapters:
        frozen = random_params(run.model)
    return step, init_state(trainable.table, optimizer, run.mesh, key=jax.random.key(0)), frozen


if __name__ == "__main__":
    main()
