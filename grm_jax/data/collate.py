"""Token examples as arrays of fixed shapes.

Dimensions: B rows, T tokens (prompt and completion, right-padded), P prompt tokens, C completion
tokens, G completions of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion (end token included), and an optional label.

    Attributes:
      weights: of each completion token in the loss; None: 1 for all.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: float = 0.0
    weights: tuple[float, ...] | None = None

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
    """`collate_rows`, with the completions as arrays of their own, padded to C = `completion`
    tokens.

    Adds starts [B], the index of the first completion token; targets [B, C]; mask [B, C] float32,
    the weights of completion tokens, 0 for padding.
    """
    rows = len(examples)
    batch = collate_rows(examples, length=length)
    batch["starts"] = np.asarray([len(e.prompt) for e in examples], np.int32)
    batch["targets"] = np.zeros((rows, completion), np.int32)
    batch["mask"] = np.zeros((rows, completion), np.float32)
    for row, example in enumerate(examples):
        batch["targets"][row, : len(example.completion)] = example.completion
        batch["mask"][row, : len(example.completion)] = example.weights or 1.0
    return batch


def collate_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    length: int,
    completion: int,
) -> Batch:
    """Prompts padded to P = `length` tokens, with G completions for each, padded to C tokens.

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
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
