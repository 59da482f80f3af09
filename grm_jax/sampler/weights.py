"""Parameters in the sampler's layout: compute dtype, a tree a block, nothing to gather per token.

Training splits the parameters over the data axes too; decoding reads all of them for every token,
here each data-parallel shard has them whole (split over `tensor` alone). Adapters stay apart from
what they change, as in training. Made once a rollout, by one jitted function.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.model import linear
from grm_jax.model.config import ModelConfig
from grm_jax.model.linear import Int8, LowRank, OutMajor
from grm_jax.model.params import LAYER_KINDS, Params, param_table
from grm_jax.parallel.mesh import sharding
from grm_jax.sampler.programs import Programs

# Input dimensions of each matrix of a layer.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def decode_weights(
    programs: Programs, config: ModelConfig, params: Params, rows: int, *, int8: bool = False
) -> Params:
    """The parameters as `decode` wants them; "blocks" is a tuple of one tree a block.

    Args:
      rows: lanes of a shard. With few of them, a CPU multiplies by matrices stored the other way
        round (`model.linear.OutMajor`).
      int8: matrices as `model.linear.Int8`, the output head's too (words are looked up exactly).
    """
    dtype = jnp.dtype(config.compute_dtype)
    mesh = programs.mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Split over `tensor`, a matrix keeps its dimensions: there is one to split in each.
    turn = on_cpu and rows <= linear.FEW and mesh.shape["tensor"] == 1
    axes = {spec.path: spec.axes for spec in param_table(config)}

    def keep(w: jax.Array, names: tuple[str | None, ...], *, norm: bool = False) -> jax.Array:
        spread = [None if name == "embed" else name for name in names]
        # Norms are small and read in float32, as the trainer reads its masters.
        w = w if norm else w.astype(dtype)
        return jax.lax.with_sharding_constraint(w, sharding(mesh, spread))

    def convert(params: Params) -> Params:
        made: dict[str, Any] = {
            "embed": keep(params["embed"], axes["embed",]),
            "final_norm": keep(params["final_norm"], axes["final_norm",], norm=True),
        }
        if int8:
            made["head"] = linear.int8(made["embed"].T, 1)
        made["blocks"] = tuple(
            {kind: layer(params["blocks"][kind], kind, index) for kind in LAYER_KINDS}
            for index in range(config.num_blocks)
        )
        return made

    def layer(stacked: Params, kind: str, index: int) -> Params:
        made = {}
        for name, values in stacked.items():
            # Without the leading axis of layers.
            w = jax.tree.map(lambda x: x[index], values)
            names = axes["blocks", kind, name][1:]
            if name not in INPUTS:
                made[name] = keep(w, names, norm=True)
            elif isinstance(w, LowRank):
                split = INPUTS[name]
                a, b = keep(w.a, (*names[:split], None)), keep(w.b, (None, *names[split:]))
                made[name] = LowRank(matrix(w.w, name, names), a, b, w.scale)
            else:
                made[name] = matrix(w, name, names)
        return made

    def matrix(w: Any, name: str, names: tuple[str | None, ...]) -> jax.Array | OutMajor | Int8:
        w, split = keep(w, names), INPUTS[name]
        if int8:
            return linear.int8(w, split)
        if turn:
            return OutMajor(w.reshape(math.prod(w.shape[:split]), -1).T, w.shape[split:])
        return w

    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    given = (turn, int8, len(jax.tree.leaves(params)), *dtypes)
    made = programs.run("weights", given, convert, params)
    # The tied embedding is [vocabulary, embed] already: nothing to copy.
    if turn and not int8:
        made["head"] = OutMajor(made["embed"], (config.vocab_size,))
    return made
