"""Rows of tokens, of any lengths, computed in padded batches of few shapes.

    rows -> by length bucket -> batches of a fixed size -> a program -> results in the rows' order

A program is compiled once a bucket, and what comes out of a row does not depend on the others.

Dimensions: B rows, T tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.data.loader import group_by_length
from grm_jax.model.config import ModelConfig
from grm_jax.parallel.mesh import data_parallel, own_rows, put_batch, use_mesh

MOST_TOKENS = 8192  # that a device computes at once, where nobody says otherwise


class Row(Protocol):
    @property
    def length(self) -> int:
        """In tokens."""
        ...


R = TypeVar("R", bound=Row)


def compute_rows(
    rows: Sequence[R],
    collate: Callable[[Sequence[R], int], Mapping[str, np.ndarray]],
    program: Callable[[Mapping[str, jax.Array]], jax.Array],
    *,
    shape: tuple[int, ...] = (),
    buckets: Sequence[int],
    batch_size: int,
    mesh: Mesh,
    tokens: int,
) -> np.ndarray:
    """What a program computes of each row: float32 [len(rows), *shape], in their order.

    Args:
      collate: makes of B rows, and the length T to which they are padded, arrays [B, ...].
      program: computes [B, *shape] of these arrays, which are then spread over the mesh.
      buckets: rows are padded to the next of these lengths; a longer one raises UserError.
      batch_size: most rows computed at once.
      tokens: most tokens, padding included, that a data-parallel shard computes at once; one row
        always. Results do not depend on either.
    """
    shards = data_parallel(mesh)
    found = np.zeros((len(rows), *shape), np.float32)
    groups = group_by_length(range(len(rows)), lambda i: rows[i].length, buckets, "rows to score")
    for bucket, members in groups.items():
        fitting = min(-(-batch_size // shards), max(1, tokens // bucket))
        size = shards * fitting
        for start in range(0, len(members), size):
            part = members[start : start + size]
            # The last batch repeats its last row, so that every batch has the same shape.
            filled = [rows[i] for i in part] + [rows[part[-1]]] * (size - len(part))
            with use_mesh(mesh):
                put = put_batch(own_rows(dict(collate(filled, bucket)), mesh), mesh)
                values = program(put)
            found[part] = np.asarray(jax.device_get(values))[: len(part)]
    return found


def row_lengths(buckets: Sequence[int], model: ModelConfig) -> tuple[int, ...]:
    """These lengths to which rows are padded, and more up to what the model can read."""
    lengths = list(buckets)
    while lengths[-1] < model.max_position:
        lengths.append(min(2 * lengths[-1], model.max_position))
    return tuple(lengths)
