"""Probabilities of chosen tokens right behind a prompt: a judge that answers with one token.

    prompt, labels -> one forward pass -> the log-probability of each label as the next token

A prompt that ends with "Is it correct? Answer Yes or No:" and the tokens of " Yes" and " No" make a
judge without critiques, whose score is the probability of the first.

Dimensions: B rows, T tokens (right-padded), L labels of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.data.rows import DataError
from grm_jax.judge.request import LabelRequest
from grm_jax.judge.rows import MOST_TOKENS, compute_rows
from grm_jax.model.batch import next_logprobs
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import replicated
from grm_jax.sampler.plan import power_of_two
from grm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """A prompt, and the tokens whose probability of coming next is asked for; token ids."""

    prompt: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt)


@functools.cache
def _program(config: ModelConfig, mesh: Mesh):
    # Every process gets all of them.
    return jax.jit(functools.partial(next_logprobs, config=config), out_shardings=replicated(mesh))


def label_logprobs(
    params: Params,
    config: ModelConfig,
    rows: Sequence[LabelRow],
    buckets: Sequence[int],
    batch_size: int,
    mesh: Mesh,
    tokens: int = MOST_TOKENS,
) -> list[np.ndarray]:
    """The log-probabilities [L] of each row's labels as the token behind its prompt, at temperature
    1 and over the whole vocabulary.

    Args:
      params: as trained, or as the sampler has them laid out.
      buckets, batch_size, tokens: see `compute_rows`.
    """
    compute, found = _program(config, mesh), [np.zeros(0, np.float32)] * len(rows)
    # By width, of which there are few, as each is a program to compile. A row keeps its width
    # whatever stands beside it, and with it the bits of its results.
    widths = [power_of_two(len(row.labels)) for row in rows]
    for width in sorted(set(widths)):
        members = [i for i, other in enumerate(widths) if other == width]
        values = compute_rows(
            [rows[i] for i in members], functools.partial(_collate, width),
            lambda batch: compute(params, **batch), shape=(width,),
            buckets=buckets, batch_size=batch_size, mesh=mesh, tokens=tokens,
        )  # fmt: skip
        for i, row in zip(members, values, strict=True):
            found[i] = row[: len(rows[i].labels)]
    return found


def _collate(width: int, rows: Sequence[LabelRow], length: int) -> dict[str, np.ndarray]:
    batch = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "lengths": np.asarray([row.length for row in rows], np.int32),
        "targets": np.zeros((len(rows), width), np.int32),
    }
    for i, row in enumerate(rows):
        batch["tokens"][i, : row.length] = row.prompt
        batch["targets"][i, : len(row.labels)] = row.labels
    return batch


@dataclasses.dataclass(frozen=True)
class LabelReader:
    """A language model that is asked for the probabilities of labels.

    Attributes:
      params: as trained, or as the sampler has them laid out.
      buckets, batch_size, tokens: see `compute_rows`.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    buckets: tuple[int, ...]
    batch_size: int = 128
    tokens: int = MOST_TOKENS

    def rows(self, asked: LabelRequest) -> list[LabelRow]:
        """The prompt of each item, and the labels.

        Query and item are encoded one by one, and only the query gets what begins a text,
        also where the item stands first: so does vLLM. Raises DataError for an empty prompt, one
        longer than the model can read, and ids that the model does not have.
        """
        self._require_ids("label_token_ids", asked.labels)
        query = self._ids("query", asked.query)
        if isinstance(asked.query, str) and asked.special:
            query = (*self.tokenizer.begin_ids, *query)
        found = []
        for i, item in enumerate(asked.items):
            ids = self._ids(f"items[{i}]", item)
            prompt = ids + query if asked.item_first else query + ids
            if not 0 < len(prompt) <= self.model.max_position:
                raise DataError(
                    f"items[{i}]", f"with the query it has {len(prompt):,} tokens",
                    f"give 1 to {self.model.max_position:,}",
                )  # fmt: skip
            found.append(LabelRow(prompt, asked.labels))
        return found

    def logprobs(self, rows: Sequence[LabelRow]) -> list[tuple[float, ...]]:
        """The log-probability of each label of each row; see `label_logprobs`."""
        found = label_logprobs(
            self.params, self.model, rows, self.buckets, self.batch_size, self.mesh, self.tokens
        )
        return [tuple(values.tolist()) for values in found]

    def _ids(self, name: str, given: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(given, str):
            return tuple(self.tokenizer.encode(given))
        self._require_ids(name, given)
        return given

    def _require_ids(self, name: str, ids: Sequence[int]) -> None:
        most = self.model.vocab_size - 1
        for id in ids:
            if not 0 <= id <= most:
                raise DataError(name, f"the token id {id!r:.30}", f"give ids from 0 to {most:,}")
