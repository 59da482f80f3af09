"""Parameters in the sampler's layout: compute dtype, a tree a block, nothing to gather per token.

Training splits the parameters over the data axes too; decoding reads all of them for every token,
so here each data-parallel shard has them whole (split over `tensor` alone). Made once a rollout.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, param_table
from grm_jax.parallel.mesh import sharding
from grm_jax.sampler.programs import Programs


def decode_weights(programs: Programs, config: ModelConfig, params: Params) -> Params:
    """The parameters as `decode` wants them; "blocks" is a tuple of one tree a block."""
    dtype = jnp.dtype(config.compute_dtype)

    def convert(params: Params) -> Params:
        cast = jax.tree.map(lambda w: w.astype(dtype), params)
        blocks = tuple(
            jax.tree.map(lambda w, i=i: w[i], cast["blocks"]) for i in range(config.num_blocks)
        )
        return cast | {"blocks": blocks}

    axes = {spec.path: spec.axes for spec in param_table(config)}

    def place(path: tuple, leaf: Any) -> Any:
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        # Blocks have lost their leading axis of layers.
        names = axes[keys][-leaf.ndim :]
        return sharding(programs.mesh, [None if name == "embed" else name for name in names])

    where = jax.tree_util.tree_map_with_path(place, jax.eval_shape(convert, params))
    given = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(params))
    return programs.run("weights", given, convert, params, out_shardings=where)
