"""Examples to batches: grain pipelines of fixed shapes, grouped by length.

Examples of similar length share a batch, so that little of it is padding. Each length bucket is a
shuffled, endlessly repeated grain dataset of its own, and batches are drawn from the buckets in
proportion to their sizes. The position in the data is the state of a grain iterator, which is saved
with each checkpoint.

Dimensions: B rows, T tokens (prompt and completion, right-padded), P prompt tokens, C completion
tokens, G completions of a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain

from grm_jax.data import packing
from grm_jax.data.collate import Example, collate, round_up
from grm_jax.errors import UserError

T = TypeVar("T")


def group_by_length(
    items: Sequence[T],
    length: Callable[[T], int],
    buckets: Sequence[int],
    what: str,
    option: str = "--length-buckets",
) -> dict[int, list[T]]:
    """Items by the smallest bucket that holds them; `option` sets the buckets.

    Raises UserError, with the number of items that are longer than the last bucket, and the
    longest.
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
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless, checkpointable iterator of batches, each from one group.

    Args:
      groups: items by bucket.
      collators: makes a batch of the items of each bucket.
      batch_size: the size of a batch, in all processes together.
      seed: the seed of the shuffles.
      rows: this process's rows of each batch, which alone are collated; None for all.

    Every process iterates over the same batches, so that the position is the same in all of them,
    and a run can be resumed with another number of processes.
    """
    datasets, weights = [], []
    for bucket, items in groups.items():
        dataset = grain.MapDataset.source(_Items(items)).seed(seed + bucket).shuffle()
        # Batches are made within an epoch, so that no batch holds an item twice if there are
        # enough.
        if len(dataset) < batch_size:
            dataset = dataset.repeat()
        collate = functools.partial(_collate_rows_of, collators[bucket], rows)
        dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=collate)
        datasets.append(dataset if len(dataset) > len(items) else dataset.repeat())
        weights.append(float(len(items)))
    mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
    # One thread: batches are small, and more threads would compete with the computation.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(mixed.to_iter_dataset(options))


def _collate_rows_of(
    collator: Callable[[Sequence[Any]], Any], rows: Sequence[int] | None, items: Sequence[Any]
):
    return collator(items if rows is None else [items[row] for row in rows])


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
    rows: Sequence[int] | None = None,
    *,
    pack: int = 0,
) -> grain.DatasetIterator:
    """`batches` of language-model examples, padded to their bucket; with `pack`, rows of this many
    tokens hold several examples each (see `data.packing`).
    """
    if pack:
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
