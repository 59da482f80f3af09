"""Several short examples in one row: no token of a batch is wasted on padding.

Examples are packed once, in a shuffled order, each into the first row that has space for it. Rows
are then shuffled and batched like examples. Within a row each example is a segment with positions
from 0 and does not attend to the others: masks are functions of positions and segments, so that
losses and gradients are those of separate rows, under sliding windows, too.

Dimensions: B rows, T tokens of a row, C tokens of a row that are learned, S segments of a row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from grm_jax.data.collate import Batch, Example
from grm_jax.errors import UserError

Row = tuple[Example, ...]
PADDING = -1  # the segment of positions without a token
LOOK_BACK = 64  # how many rows are tried for an example, the newest ones


def pack(examples: Sequence[Example], length: int, seed: int, what: str) -> list[Row]:
    """Rows of examples with at most `length` tokens each; every example once.

    Raises UserError, with the number of examples that are longer than a row, and the longest.
    """
    too_long = [example.length for example in examples if example.length > length]
    if too_long:
        raise UserError(
            f"{len(too_long)} of {len(examples)} {what} are longer than a packed row of {length} "
            f"tokens (the longest has {max(too_long)}); raise the stage's --sft.fitting.pack "
            "(--meta-rm.fitting.pack and so on) or drop them"
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    rows: list[list[Example]] = []
    space: list[int] = []
    for index in order:
        example = examples[index]
        first = max(0, len(rows) - LOOK_BACK)
        place = next((r for r in range(first, len(rows)) if space[r] >= example.length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            space.append(length)
        rows[place].append(example)
        space[place] -= example.length
    return [tuple(row) for row in rows]


def collate_packed(rows: Sequence[Row], *, length: int, completion: int, segments: int) -> Batch:
    """Packed rows as arrays.

    Returns:
      tokens, positions, segments [B, T], the last -1 for padding; lengths [B], slots with a token;
      slots [B, C], from whose state targets [B, C] are predicted, mask [B, C] float32; ends [B, S],
      the last slot of each segment, labels and weights [B, S] float32, 0 where there is none.
    """
    count = len(rows)
    batch = {
        "tokens": np.zeros((count, length), np.int32),
        "positions": np.zeros((count, length), np.int32),
        "segments": np.full((count, length), PADDING, np.int32),
        "lengths": np.asarray([sum(e.length for e in row) for row in rows], np.int32),
        "slots": np.zeros((count, completion), np.int32),
        "targets": np.zeros((count, completion), np.int32),
        "mask": np.zeros((count, completion), np.float32),
        "ends": np.zeros((count, segments), np.int32),
        "labels": np.zeros((count, segments), np.float32),
        "weights": np.zeros((count, segments), np.float32),
    }
    for r, row in enumerate(rows):
        start = learned = 0
        for s, example in enumerate(row):
            end, more = start + example.length, learned + len(example.completion)
            batch["tokens"][r, start:end] = example.prompt + example.completion
            batch["positions"][r, start:end] = np.arange(example.length)
            batch["segments"][r, start:end] = s
            first = start + len(example.prompt) - 1  # the state before the completion's first token
            batch["slots"][r, learned:more] = first + np.arange(len(example.completion))
            batch["targets"][r, learned:more] = example.completion
            batch["mask"][r, learned:more] = example.weights or 1.0
            batch["ends"][r, s] = end - 1
            batch["labels"][r, s] = example.label
            batch["weights"][r, s] = 1.0
            start, learned = end, more
    return batch
