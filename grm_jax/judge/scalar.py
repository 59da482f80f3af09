"""Scalar scores of rows: the meta RM and the scalar RM in use.

    conversation | response -> one number      ScalarRM, trained by Bradley-Terry (scalar_rm.py)

Dimensions: B rows, T tokens (right-padded).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.critique import Turn
from grm_jax.data.collate import Batch, Example, collate_rows
from grm_jax.data.examples import reply_example
from grm_jax.data.loader import group_by_length
from grm_jax.errors import UserError
from grm_jax.judge.about import LENGTH_BUCKETS, About
from grm_jax.model.batch import row_scores
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import (
    load_params,
    model_folder,
    on_devices,
    param_shardings,
    read_model_config,
    require_kind,
)
from grm_jax.parallel.mesh import data_parallel, own_rows, put_batch, replicated, use_mesh
from grm_jax.tokenizer import Tokenizer, load_tokenizer

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


@dataclasses.dataclass(frozen=True)
class ScalarRM:
    """A scalar reward model: parameters with a scalar head, and the lengths of its rows."""

    model: ModelConfig
    params: Params
    buckets: tuple[int, ...]
    tokenizer: Tokenizer
    batch_size: int = 128

    def require_room(self, turns: Sequence[Turn], responses: Sequence[str]) -> None:
        """Raise UserError for a response that is too long, with its conversation, to be read."""
        for index, response in enumerate(responses):
            length = reply_example(turns, response, self.tokenizer).length
            if length > self.buckets[-1]:
                raise UserError(
                    f"responses[{index}]: with its conversation it has {length:,} tokens, and the "
                    f"scalar RM reads {self.buckets[-1]:,}; shorten it"
                )

    def scores(
        self, asked: Sequence[tuple[Sequence[Turn], Sequence[str]]], mesh: Mesh, tokens: int
    ) -> list[tuple[float, ...]]:
        """The score of each response to each conversation.

        Args:
          tokens: most tokens a device scores at once.
        """
        examples = [
            reply_example(turns, response, self.tokenizer)
            for turns, responses in asked
            for response in responses
        ]
        flat = iter(self.logits(examples, mesh, tokens))
        return [tuple(itertools.islice(flat, len(responses))) for _, responses in asked]

    def logits(self, examples: Sequence[Example], mesh: Mesh, tokens: int) -> list[float]:
        """The scores of rows of tokens; `tokens` as in `scores`."""
        return score_examples(
            self.params, self.model, examples, self.buckets, self.batch_size, mesh, tokens
        ).tolist()


def load_scalar_rm(path: str | Path, mesh: Mesh) -> ScalarRM:
    """A scalar RM from a run directory, its scalar_rm stage, a Hugging Face folder, or a repo id.

    It reads texts, so that its tokenizer need not be the judge's.
    """
    folder = model_folder(path, "scalar_rm")
    require_kind(folder, scalar=True)
    about, model = About.read(folder), on_devices(read_model_config(folder), mesh)
    shardings = param_shardings(param_table(model, num_labels=1), mesh)
    _, params = load_params(folder, shardings=shardings, dtype=model.compute_dtype)
    return ScalarRM(model, params, row_lengths(about, model), load_tokenizer(folder))


def row_lengths(about: About, model: ModelConfig) -> tuple[int, ...]:
    """The lengths to which rows are padded: as trained, and up to what the model can read."""
    buckets = list(about.length_buckets or LENGTH_BUCKETS)
    while buckets[-1] < model.max_position:
        buckets.append(min(2 * buckets[-1], model.max_position))
    return tuple(buckets)
