"""Scalar scores of rows: the meta RM and the scalar baseline in use.

Dimensions: B rows, T tokens (right-padded).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.data.collate import Batch, Example, collate_rows
from grm_jax.data.loader import group_by_length
from grm_jax.model.batch import row_scores
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel, own_rows, put_batch, replicated, use_mesh

SCORE_TOKENS = 8192


@functools.cache
def _program(config: ModelConfig, mesh: Mesh):
    # Every process gets all scores.
    return jax.jit(functools.partial(row_scores, config=config), out_shardings=replicated(mesh))


def score_examples(
    params: Params,
    config: ModelConfig,
    examples: Sequence[Example],
    buckets: Sequence[int],
    batch_size: int,
    mesh: Mesh,
    tokens: int = SCORE_TOKENS,
) -> np.ndarray:
    """Scores [len(examples)] in their order; rows of similar length share a batch.

    Args:
      buckets: rows are padded to the next of these lengths; a longer one raises ValueError.
      batch_size: most rows computed at once.
      tokens: most tokens, padding included, that a data-parallel shard computes at once; one row
        always. Scores do not depend on either.
    """
    shards = data_parallel(mesh)
    scores = np.zeros(len(examples), np.float32)
    score = _program(config, mesh)
    groups = group_by_length(
        range(len(examples)), lambda i: examples[i].length, buckets, "rows to score"
    )
    for bucket, members in groups.items():
        fitting = min(-(-batch_size // shards), max(1, tokens // bucket))
        size = shards * fitting
        for start in range(0, len(members), size):
            part = members[start : start + size]
            # The last batch repeats its last row, so that every batch has the same shape.
            rows = [examples[i] for i in part] + [examples[part[-1]]] * (size - len(part))
            batch: Batch = collate_rows(rows, length=bucket)
            with use_mesh(mesh):
                put = put_batch(own_rows(batch, mesh), mesh)
                values = score(params, tokens=put["tokens"], lengths=put["lengths"])
            scores[part] = np.asarray(jax.device_get(values))[: len(part)]
    return scores
