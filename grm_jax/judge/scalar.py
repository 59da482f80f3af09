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
from grm_jax.data.collate import Example, collate_rows
from grm_jax.data.examples import reply_example
from grm_jax.errors import UserError
from grm_jax.judge.about import LENGTH_BUCKETS, About
from grm_jax.judge.rows import MOST_TOKENS, compute_rows, row_lengths
from grm_jax.model.batch import row_scores
from grm_jax.model.config import ModelConfig
from grm_jax.model.options import ComputeDtype
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import (
    load_params,
    model_folder,
    on_devices,
    param_shardings,
    read_model_config,
    require_kind,
)
from grm_jax.parallel.mesh import replicated
from grm_jax.tokenizer import Tokenizer, load_tokenizer


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
    tokens: int = MOST_TOKENS,
) -> np.ndarray:
    """Scores [len(examples)] in their order; rows of similar length share a batch.

    Args:
      buckets, batch_size, tokens: see `compute_rows`.
    """
    score = _program(config, mesh)
    return compute_rows(
        examples,
        lambda rows, length: collate_rows(rows, length=length),
        lambda batch: score(params, tokens=batch["tokens"], lengths=batch["lengths"]),
        buckets=buckets, batch_size=batch_size, mesh=mesh, tokens=tokens,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScalarRM:
    """A scalar reward model: parameters with a scalar head, and the lengths of its rows."""

    model: ModelConfig
    params: Params
    buckets: tuple[int, ...]
    tokenizer: Tokenizer
    batch_size: int = 128

    def examples(self, turns: Sequence[Turn], responses: Sequence[str]) -> list[Example]:
        """What it reads: the conversation with each response.

        Raises UserError for a response that is too long, with its conversation, to be read.
        """
        examples = [reply_example(turns, response, self.tokenizer) for response in responses]
        for index, example in enumerate(examples):
            if example.length > self.buckets[-1]:
                raise UserError(
                    f"responses[{index}]: with its conversation it has {example.length:,} tokens, "
                    f"and the scalar RM reads {self.buckets[-1]:,}; shorten it"
                )
        return examples

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


def load_scalar_rm(path: str | Path, mesh: Mesh, compute_dtype: ComputeDtype = "auto") -> ScalarRM:
    """A scalar RM from a run directory, its scalar_rm stage, a Hugging Face folder, or a repo id.

    It reads texts, so that its tokenizer need not be the judge's.

    Args:
      compute_dtype: what it is computed in (`model.compute_dtype`).
    """
    folder = model_folder(path, "scalar_rm")
    require_kind(folder, scalar=True)
    about = About.read(folder)
    model = on_devices(read_model_config(folder), mesh, compute_dtype)
    shardings = param_shardings(param_table(model, num_labels=1), mesh)
    _, params = load_params(folder, shardings=shardings, dtype=model.compute_dtype)
    return ScalarRM(
        model,
        params,
        row_lengths(about.length_buckets or LENGTH_BUCKETS, model),
        load_tokenizer(folder),
    )
