"""FLOPs that the mathematics of a step asks for: no recomputation, no padding."""

from __future__ import annotations

from collections.abc import Iterable

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import count_params, param_table


def row_flops(config: ModelConfig, length: float, head_tokens: float) -> float:
    """FLOPs of the forward pass of one row.

    Two a weight and token, and four a head dimension for each pair of a query and a key it sees.

    Args:
      length: tokens of the row.
      head_tokens: how many of them need logits.
    """
    c = config
    head = c.vocab_size * c.embed_dim
    layers = count_params(param_table(c)) - head
    near = min(length, c.sliding_window)
    pairs = length * length / 2 + (near * near / 2 + (length - near) * near)
    attention = 4 * c.num_heads * c.head_dim * c.num_blocks * pairs
    return 2 * layers * length + 2 * head * head_tokens + attention


def train_flops(config: ModelConfig, rows: Iterable[tuple[float, float]]) -> float:
    """FLOPs of a gradient step, three times the forward pass, on rows of (length, head tokens)."""
    return 3 * sum(row_flops(config, length, head) for length, head in rows)
