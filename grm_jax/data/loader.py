"""Examples to batches: grain pipelines of fixed shapes, grouped by length.

Examples of similar length share a batch, so little of it is padding; each length bucket is its own
shuffled, endlessly repeated grain dataset, and batches are drawn from the buckets in proportion to
their sizes. The position of the pipeline is a grain iterator's state and is saved with the
checkpoint.

Dimensions: B rows, T tokens (prompt and completion, right-padded), P prompt tokens, C completion
tokens, G completions of a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from grm_jax.errors import UserError

Batch = dict[str, np.ndarray]
T = TypeVar("T")
EVERY = slice(None)


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion (end token included), and an optional label."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def collate_rows(examples: Sequence[Example], *, length: int) -> Batch:
    """Rows padded to T = `length` tokens: tokens [B, T], lengths [B], labels [B] float32."""
    batch = {
        "tokens": np.zeros((len(examples), length), np.int32),
        "lengths": np.asarray([e.length for e in examples], np.int32),
        "labels": np.asarray([e.label for e in examples], np.float32),
    }
    for row, example in enumerate(examples):
        batch["tokens"][row, : example.length] = example.prompt + example.completion
    return batch


def collate(examples: Sequence[Example], *, length: int, completion: int) -> Batch:
    """`collate_rows`, and the completions apart, padded to C = `completion` tokens.

    Adds starts [B], the index of the first completion token; targets [B, C]; mask [B, C] float32.
    """
    rows = len(examples)
    batch = collate_rows(examples, length=length)
    batch["starts"] = np.asarray([len(e.prompt) for e in examples], np.int32)
    batch["targets"] = np.zeros((rows, completion), np.int32)
    batch["mask"] = np.zeros((rows, completion), np.float32)
    for row, example in enumerate(examples):
        batch["targets"][row, : len(example.completion)] = example.completion
        batch["mask"][row, : len(example.completion)] = 1.0
    return batch


def collate_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    length: int,
    completion: int,
) -> Batch:
    """Prompts padded to P = `length` tokens, and their G completions each, padded to C.

    Returns:
      prompts [B, P], lengths [B] of the prompts, targets [B, G, C], mask [B, G, C] float32.
    """
    shape = (len(prompts), len(completions[0]), completion)
    batch = {
        "prompts": np.zeros((len(prompts), length), np.int32),
        "lengths": np.asarray([len(p) for p in prompts], np.int32),
        "targets": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, np.float32),
    }
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        batch["prompts"][row, : len(prompt)] = prompt
        for index, tokens in enumerate(group):
            batch["targets"][row, index, : len(tokens)] = tokens
            batch["mask"][row, index, : len(tokens)] = 1.0
    return batch


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def group_by_length(
    items: Sequence[T],
    length: Callable[[T], int],
    buckets: Sequence[int],
    what: str,
    option: str = "--length-buckets",
) -> dict[int, list[T]]:
    """Items by the smallest bucket that holds them; `option` sets the buckets.

    Raises ValueError naming how many items are longer than the last bucket, and the longest.
    """
    grouped: dict[int, list[T]] = {}
    too_long = [length(item) for item in items if length(item) > buckets[-1]]
    if too_long:
        raise UserError(
            f"{len(too_long)} of {len(items)} {what} are longer than the last length bucket "
            f"{buckets[-1]} (the longest has {max(too_long)} tokens); raise {option} or drop them"
        )
    for item in items:
        bucket = next(b for b in buckets if b >= length(item))
        grouped.setdefault(bucket, []).append(item)
    return dict(sorted(grouped.items()))


def batches(
    groups: dict[int, list[Any]],
    collators: dict[int, Callable[[Sequence[Any]], Any]],
    batch_size: int,
    seed: int,
    rows: slice = EVERY,
) -> grain.DatasetIterator:
    """An endless, checkpointable iterator of batches, each from one group.

    Args:
      groups: items by bucket.
      collators: what makes a batch of each bucket.
      batch_size: global.
      seed: of the shuffles.
      rows: this process's rows of each batch; only they are collated.

    Every process goes through the same batches, so the position is the same in all of them, and a
    run can go on with another number of processes.
    """
    datasets, weights = [], []
    for bucket, items in groups.items():
        mine = grain.MapDataset.source(_Items(items)).seed(seed + bucket).shuffle()
        # Batched within an epoch, so that no batch holds an item twice, where there are enough.
        if len(mine) < batch_size:
            mine = mine.repeat()
        collate = functools.partial(_collate_rows_of, collators[bucket], rows)
        mine = mine.batch(batch_size, drop_remainder=True, batch_fn=collate)
        datasets.append(mine if len(mine) > len(items) else mine.repeat())
        weights.append(float(len(items)))
    mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
    # One thread: batches are small, and threads would compete with the computation.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(mixed.to_iter_dataset(options))


def _collate_rows_of(collator: Callable[[Sequence[Any]], Any], rows: slice, items: Sequence[Any]):
    return collator(items[rows])


class _Items:
    """A grain source over a list."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]

    def __repr__(self) -> str:  # grain prints its source in messages
        return f"_Items({len(self._items)})"


def example_batches(
    examples: Sequence[Example],
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
    what: str,
    rows: slice = EVERY,
    *,
    pack: int = 0,
) -> grain.DatasetIterator:
    """`batches` of language-model examples, padded to their bucket; or, with `pack`, of rows of so
    many tokens that hold several of them (see `data.packing`).
    """
    if pack:
        from grm_jax.data import packing

        packed = packing.pack(examples, pack, seed, what)
        learned = max(sum(len(e.completion) for e in row) for row in packed)
        collator = functools.partial(
            packing.collate_packed,
            length=pack,
            completion=round_up(learned, 8),
            segments=max(map(len, packed)),
        )
        return batches({pack: packed}, {pack: collator}, batch_size, seed, rows)
    groups = group_by_length(examples, lambda e: e.length, buckets, what)
    collators = {
        bucket: functools.partial(
            collate,
            length=bucket,
            completion=round_up(max(len(e.completion) for e in items), 8),
        )
        for bucket, items in groups.items()
    }
    return batches(groups, collators, batch_size, seed, rows)
