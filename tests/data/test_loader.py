"""Batches by hand; grain pipelines: epochs, buckets, restoring a position."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from grm_jax.data import packing
from grm_jax.data.collate import Example, collate, collate_rows, round_up
from grm_jax.data.loader import batches, example_batches, group_by_length

A = Example((5, 6, 7), (8, 2), label=1.0)
B = Example((9,), (4, 4, 2))


def test_collate_by_hand():
    batch = collate([A, B], length=6, completion=4)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 2, 0], [9, 4, 4, 2, 0, 0]]
    assert batch["lengths"].tolist() == [5, 4]
    assert batch["labels"].tolist() == [1.0, 0.0]
    assert batch["starts"].tolist() == [3, 1]
    assert batch["targets"].tolist() == [[8, 2, 0, 0], [4, 4, 2, 0]]
    assert batch["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    kinds = {name: value.dtype.kind for name, value in batch.items()}
    assert kinds == dict(tokens="i", lengths="i", starts="i", targets="i", labels="f", mask="f")


def test_completion_tokens_may_have_weights():
    weighted = Example(A.prompt, A.completion, weights=(0.25, 1.0))
    assert collate([weighted, B], length=6, completion=3)["mask"].tolist() == [
        [0.25, 1, 0],
        [1] * 3,
    ]
    row = (weighted, B)
    packed = packing.collate_packed([row], length=9, completion=6, segments=2)
    assert packed["mask"].tolist() == [[0.25, 1, 1, 1, 1, 0]]


def test_collate_rows_has_no_completions():
    assert collate_rows([A], length=5).keys() == {"tokens", "lengths", "labels"}


def test_targets_are_the_tokens_from_the_start_on():
    batch = collate([A, B], length=6, completion=4)
    for row, start in enumerate(batch["starts"]):
        real = int(batch["mask"][row].sum())
        tokens = batch["tokens"][row, start : start + real]
        assert tokens.tolist() == batch["targets"][row, :real].tolist()
        assert start + real == batch["lengths"][row]


def test_round_up():
    assert [round_up(n, 8) for n in (1, 8, 9)] == [8, 8, 16]


def test_groups_are_the_smallest_buckets():
    groups = group_by_length([3, 9, 4, 1, 8, 5], lambda n: n, (4, 8, 16), "things")
    assert groups == {4: [3, 4, 1], 8: [8, 5], 16: [9]}
    assert list(groups) == [4, 8, 16]


def test_too_long_items_are_an_error_that_counts_them():
    with pytest.raises(ValueError, match=r"2 of 3 things are longer .* 4 \(the longest has 9 tok"):
        group_by_length([5, 9, 4], lambda n: n, (2, 4), "things")


def items(bucket: int, count: int) -> list[str]:
    return [f"{bucket}-{i}" for i in range(count)]


def pipeline(groups, size=4, seed=0, rows=None):
    return batches(groups, dict.fromkeys(groups, list), size, seed, rows)


def take(iterator, count: int) -> list[list[str]]:
    return [next(iterator) for _ in range(count)]


def test_no_item_twice_in_a_batch_or_an_epoch_and_every_epoch_in_another_order():
    found = take(pipeline({8: items(8, 18)}), 12)  # four whole batches an epoch
    epochs = [[x for batch in found[i : i + 4] for x in batch] for i in range(0, 12, 4)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 16
    assert len({tuple(epoch) for epoch in epochs}) == 3
    left_out = [set(items(8, 18)) - set(epoch) for epoch in epochs]
    assert len({frozenset(left) for left in left_out}) > 1, "not always the same ones"


def test_every_batch_is_of_one_bucket_and_buckets_are_drawn_by_their_size():
    groups = {8: items(8, 40), 16: items(16, 120), 32: items(32, 40)}
    found = take(pipeline(groups), 100)
    counts: collections.Counter[str] = collections.Counter()
    for batch in found:
        assert len(batch) == len(set(batch)) == 4
        (bucket,) = {item.split("-")[0] for item in batch}
        counts[bucket] += 1
    assert counts == {"8": 20, "16": 60, "32": 20}


def test_a_bucket_smaller_than_a_batch_repeats_its_items():
    found = take(pipeline({8: items(8, 3)}), 6)
    counts = collections.Counter(x for batch in found for x in batch)
    assert all(len(batch) == 4 for batch in found)
    assert counts == dict.fromkeys(items(8, 3), 8)


def test_seeds():
    groups = {8: items(8, 20), 16: items(16, 20)}
    assert take(pipeline(groups), 9) == take(pipeline(groups), 9)
    assert take(pipeline(groups), 9) != take(pipeline(groups, seed=1), 9)


@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_a_restored_iterator_goes_on_with_the_same_batches(at):
    """Within an epoch, over its end, and with a fresh iterator of another process."""
    groups = {8: items(8, 18), 16: items(16, 9), 32: items(32, 2)}
    whole = take(pipeline(groups), 40)
    first = pipeline(groups)
    take(first, at)
    state = first.get_state()
    take(first, 3)  # what was drawn after the checkpoint is drawn again
    second = pipeline(groups)
    second.set_state(state)
    assert take(second, 40 - at) == whole[at:]
    first.set_state(state)
    assert take(first, 40 - at) == whole[at:]


def test_example_batches_pad_to_their_bucket():
    examples = [Example((4,) * n, (7,) * (1 + n % 5)) for n in range(1, 14)]
    shapes = set()
    data = example_batches(examples, (8, 16, 24), 3, 0, "examples")
    for _ in range(20):
        batch = next(data)
        assert (batch["lengths"] <= batch["tokens"].shape[1]).all()
        assert batch["lengths"].max() > {8: 0, 16: 8, 24: 16}[batch["tokens"].shape[1]]
        assert (batch["mask"].sum(axis=1) == batch["lengths"] - batch["starts"]).all()
        shapes.add((batch["tokens"].shape, batch["targets"].shape))
    assert shapes <= {((3, n), (3, 8)) for n in (8, 16, 24)}
    assert len(shapes) > 1


def test_processes_share_a_batch():
    """However many there are, each collates its rows of the same batches, from one position."""
    groups = {8: items(8, 20), 16: items(16, 24)}
    whole = take(pipeline(groups), 22)
    for rows in ([[0, 1], [2, 3]], [[0], [1], [2, 3]], [[0, 2], [1, 3]]):
        parts = [pipeline(groups, rows=mine) for mine in rows]
        found = [take(part, 22) for part in parts]
        order = [row for mine in rows for row in mine]
        for batch, step in zip(whole, zip(*found, strict=True), strict=True):
            assert [x for part in step for x in part] == [batch[row] for row in order]
        assert all(part.get_state() == parts[0].get_state() for part in parts)


def test_arrays_are_numpy(small):
    batch = next(example_batches([A, B], (8,), 2, 0, "examples"))
    assert all(isinstance(value, np.ndarray) for value in batch.values())
