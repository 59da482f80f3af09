"""This project's gradient step, as `grm_jax.train` starts it."""

import importlib.metadata

import jax
import numpy as np
from common import LENGTH, ROWS, advantages, arguments, serve, tokens

from grm_jax.model.batch import completion_logprobs
from grm_jax.model.options import Remat
from grm_jax.model.params import param_table
from grm_jax.model.storage import load_params, param_shardings, read_model_config
from grm_jax.parallel.host import use_huge_pages
from grm_jax.parallel.mesh import make_mesh
from grm_jax.training.losses import grpo_loss, sft_loss
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.options import OptimizerConfig
from grm_jax.training.step import init_state, make_train_step

use_huge_pages()
args = arguments()
model = read_model_config(args.model).replace(compute_dtype=args.dtype)
mesh = make_mesh(1, 1, 1, jax.devices()[:1])
table = param_table(model)
optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), 100, table)
remat: Remat = "block" if args.remat else "none"
together = args.device_batch or ROWS
rows = tokens()
batch = {
    "tokens": rows,
    "lengths": np.full(ROWS, LENGTH, np.int32),
    "starts": np.ones(ROWS, np.int32),
    "targets": rows[:, 1:],
    "mask": np.ones((ROWS, LENGTH - 1), np.float32),
    "advantages": advantages(),
}


def loss_fn(params, frozen, batch):
    del frozen
    logprobs, _ = completion_logprobs(
        params, model, batch, temperature=1.0, remat=remat, chunk=1024
    )
    if args.loss == "sft":
        return sft_loss(logprobs, batch["mask"])
    # As the peers: no reference, and the old policy's are the first step's.
    old = jax.lax.stop_gradient(logprobs)
    return grpo_loss(
        logprobs, old, old, batch["advantages"], batch["mask"],
        clip_low=0.2, clip_high=0.2, kl_coef=0.0, aggregation="token",
    )  # fmt: skip


step = make_train_step(loss_fn, optimizer, table, mesh, micro_batches=ROWS // together)
_, params = load_params(args.model, shardings=param_shardings(table, mesh))
state = init_state(table, optimizer, mesh, params=params)
del params


def run(seed: int) -> float:
    global state
    del seed
    state, metrics = step(state, None, batch)
    jax.block_until_ready((state, metrics))
    return float(metrics["loss"])


serve(f"grm_jax, jax {importlib.metadata.version('jax')}", run)
