"""Bytes of activations, counted from the shapes of one block of layers; nothing is compiled.

For devices whose compiler is not at hand. Weights, moments and caches are exact wherever they are
planned; what is here may be more or less in a real program.

Dimensions: D embed, F hidden, H heads, K key/value heads, h head, V vocabulary.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Remat
from grm_jax.model.params import param_table


def update_bytes(
    model: ModelConfig, mesh: Mesh, tokens: int, head_tokens: int, remat: Remat, chunk: int
) -> float:
    """Activations of a micro-batch's forward and backward pass, on one device.

    Args:
      tokens: of the rows that a device computes at a time.
      head_tokens: how many of them need logits.
      chunk: of these, how many at once.
    """
    c, width = model, jnp.dtype(model.compute_dtype).itemsize
    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    own = tokens / sequence
    stream = own * c.embed_dim * width
    queries, hidden = c.num_heads * c.head_dim / tensor, c.hidden_dim / tensor
    heads = queries + 2 * c.num_kv_heads * c.head_dim / tensor
    # Of a layer: norms, queries, keys, values, output; gate, up and their product.
    block = 2 * own * (6 * c.embed_dim + heads + queries + 3 * hidden) * width
    # Kept in float32, of both layers.
    attention = 2 * own * queries * 4
    if remat == "none":
        products = 2 * own * (2 * c.embed_dim + heads + 2 * hidden) * width
        kept, working = c.num_blocks * (stream + products + attention), 2 * block
    else:
        saved = {"block": 1.0, "offload": 0.0, "block_save_attention": 1.0}[remat]
        extra = attention if remat == "block_save_attention" else 0.0
        kept, working = c.num_blocks * (saved * stream + extra), 2 * block
    # The weights of a block, gathered; logits, their gradient and the embedding's sum of gradients.
    gathered = 2 * sum(
        math.prod(spec.shape[1:]) * width / tensor for spec in param_table(c) if spec.stacked
    )
    at_once = min(chunk, head_tokens)
    logits = 3 * at_once * c.vocab_size / tensor * 4
    words = (4 + width) * c.vocab_size * c.embed_dim / tensor if head_tokens else 0.0
    return kept + max(working + gathered, logits + words) + stream
