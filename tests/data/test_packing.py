"""Packed rows: every example once, and the losses and gradients of separate rows."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate
from grm_jax.data.loader import example_batches
from grm_jax.data.packing import collate_packed, pack
from grm_jax.model.batch import completion_logprobs, critique_scores
from grm_jax.training.losses import bce_loss, sft_loss

LENGTH = 40


def examples(count: int = 30) -> list[Example]:
    """Shorter and longer than the window of 6; two that fill a row alone."""
    rng = np.random.default_rng(0)
    sizes = [(rng.integers(1, 14), rng.integers(1, 9)) for _ in range(count - 2)]
    return [
        Example(
            tuple(rng.integers(4, 40, prompt).tolist()),
            tuple(rng.integers(4, 40, completion).tolist()),
            float(index % 2),
        )
        for index, (prompt, completion) in enumerate([*sizes, (LENGTH - 5, 5), (1, LENGTH - 1)])
    ]


def packed_batch(rows):
    learned = max(sum(len(e.completion) for e in row) for row in rows)
    return collate_packed(rows, length=LENGTH, completion=learned, segments=max(map(len, rows)) + 1)


def test_every_example_once_and_nothing_too_full():
    given = examples()
    rows = pack(given, LENGTH, 0, "examples")
    assert Counter(e for row in rows for e in row) == Counter(given)
    assert all(sum(e.length for e in row) <= LENGTH for row in rows)
    tokens = sum(e.length for e in given)
    assert tokens / (LENGTH * len(rows)) > 0.85
    assert pack(given, LENGTH, 0, "examples") == rows != pack(given, LENGTH, 1, "examples")


def test_arrays():
    a, b = Example((5, 6), (7,), 1.0), Example((8,), (9, 10), 0.0)
    batch = collate_packed([(a, b)], length=8, completion=4, segments=3)
    expected = {
        "tokens": [5, 6, 7, 8, 9, 10, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 0, 0],
        "segments": [0, 0, 0, 1, 1, 1, -1, -1],
        "slots": [1, 3, 4, 0],
        "targets": [7, 9, 10, 0],
        "mask": [1, 1, 1, 0],
        "ends": [2, 5, 0],
        "labels": [1, 0, 0],
        "weights": [1, 1, 0],
    }
    assert {name: batch[name][0].tolist() for name in expected} == expected
    assert batch["lengths"].tolist() == [6]


@pytest.mark.parametrize("what", ["completions", "scores"])
def test_losses_and_gradients_are_those_of_separate_rows(what, small, make_params):
    params, given = make_params(small, 0, num_labels=1), examples()
    apart = collate(given, length=LENGTH, completion=LENGTH)
    together = packed_batch(pack(given, LENGTH, 3, "examples"))
    assert together["tokens"].shape[0] < len(given) / 2

    def loss(params, batch):
        if what == "scores":
            found = bce_loss(*critique_scores(params, small, batch, remat="none"))
        else:
            logprobs, _ = completion_logprobs(
                params, small, batch, temperature=1.0, remat="block", chunk=64
            )
            found = sft_loss(logprobs, batch["mask"])
        return found.total, found.count

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, count), grads = run(params, together)
    (expected, same), right = run(params, apart)
    assert float(count) == float(same)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(right))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * largest)


def test_neighbours_are_not_seen(small, make_params):
    params, rows = make_params(small, 0), pack(examples(), LENGTH, 0, "examples")
    batch = packed_batch(rows)
    changed = {name: value.copy() for name, value in batch.items()}
    changed["tokens"][batch["segments"] != 1] = 11
    logprobs = [
        np.asarray(
            completion_logprobs(params, small, b, temperature=1.0, remat="none", chunk=999)[0]
        )
        for b in (batch, changed)
    ]
    second = np.take_along_axis(batch["segments"], batch["slots"], axis=1) == 1
    second &= batch["mask"] > 0
    np.testing.assert_array_equal(logprobs[0][second], logprobs[1][second])
    assert np.abs((logprobs[0] - logprobs[1])[~second]).max() > 0.1


def test_batches_of_packed_rows():
    given = examples(60)
    data = example_batches(given, (LENGTH,), 4, 0, "examples", pack=LENGTH)
    seen = [next(data) for _ in range(3)]
    assert {tuple(b["tokens"].shape) for b in seen} == {(4, LENGTH)}
    assert len({b["targets"].shape for b in seen}) == 1
    with pytest.raises(ValueError, match="2 of 60 examples are longer than a packed row of 39 tok"):
        example_batches(given, (LENGTH,), 4, 0, "examples", pack=39)
