"""Bytes of activations, counted from the shapes of one block of layers; nothing is compiled.

They are used for devices whose compiler is not available. Weights, moments and caches are exact
wherever they are planned; activations in a real program may take more or less than is estimated
here.

Dimensions: D embed, F hidden, H heads, K key/value heads, h head, V vocabulary.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax.model.config import ModelConfig
from grm_jax.model.options import Remat
from grm_jax.model.params import param_table


def update_bytes(
    model: ModelConfig, mesh: Mesh, tokens: int, head_tokens: int, remat: Remat, chunk: int
) -> float:
    """Activations of a micro-batch's forward and backward pass, on one device.

    Args:
      tokens: the number of tokens in the rows that a device computes at a time.
      head_tokens: how many of these tokens need logits.
      chunk: for how many tokens logits are computed at once.
    """
    c, width = model, jnp.dtype(model.compute_dtype).itemsize
    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    local = tokens / sequence  # tokens on one device of the sequence axis
    stream = local * c.embed_dim * width
    queries, hidden = c.num_heads * c.head_dim / tensor, c.hidden_dim / tensor
    heads = queries + 2 * c.num_kv_heads * c.head_dim / tensor
    # Each layer of a block has norms, queries, keys, values and output; gate, up and their product.
    layers, blocks = len(c.pattern), len(c.blocks)
    block = layers * local * (6 * c.embed_dim + heads + queries + 3 * hidden) * width
    # The results of attention of all its layers, kept in float32.
    attention = layers * local * queries * 4
    if remat == "none":
        products = layers * local * (2 * c.embed_dim + heads + 2 * hidden) * width
        kept, working = blocks * (stream + products + attention), 2 * block
    else:
        saved = {"block": 1.0, "offload": 0.0, "block_save_attention": 1.0}[remat]
        extra = attention if remat == "block_save_attention" else 0.0
        kept, working = blocks * (saved * stream + extra), 2 * block
    # The gathered weights of a block; logits, their gradient, and the summed gradient of the head.
    gathered = 2 * sum(
        math.prod(spec.layer_shape) * width / tensor
        for spec in param_table(c)
        if spec.path[0] == "blocks"
    )
    at_once = min(chunk, head_tokens)
    logits = 3 * at_once * c.vocab_size / tensor * 4
    embedding = (4 + width) * c.vocab_size * c.embed_dim / tensor if head_tokens else 0.0
    return kept + max(working + gathered, logits + embedding) + stream
