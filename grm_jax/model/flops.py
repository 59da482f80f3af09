"""The FLOPs that the mathematics of a step needs, without recomputation and padding."""

from __future__ import annotations

from collections.abc import Iterable

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import count_params, param_table


def row_flops(config: ModelConfig, length: float, head_tokens: float) -> float:
    """The FLOPs of the forward pass of one row.

    A weight takes two for each token. A pair of a query and a key that it sees takes four for each
    dimension of each query head.

    Args:
      length: the number of tokens of the row.
      head_tokens: how many of them need logits.
    """
    c = config
    head = c.vocab_size * c.embed_dim
    # Without the embedding and an output head of its own.
    layers = count_params(param_table(c)) - head * (1 if c.tied_head else 2)
    pairs = 0.0
    for kind in c.layer_kinds:
        near = min(length, c.window(kind) or length)
        pairs += near * near / 2 + (length - near) * near
    attention = 4 * c.num_heads * c.head_dim * pairs
    return 2 * layers * length + 2 * head * head_tokens + attention


def train_flops(config: ModelConfig, rows: Iterable[tuple[float, float]]) -> float:
    """The FLOPs of a gradient step on rows of (length, head tokens): three forward passes'."""
    return 3 * sum(row_flops(config, length, head) for length, head in rows)
