"""Gemma-2: local and global layers in turn, softcapped scores and logits, norms before and behind.

The sizes are those of the `config.json` that google/gemma-2-2b, -9b and -27b were published with.
"""

from __future__ import annotations

from grm_jax.model.families.declaration import (
    NORMS_AROUND,
    Family,
    Missing,
    Number,
    shape_numbers,
)
from grm_jax.model.shape import ModelConfig

SIZES = {
    "2b": ModelConfig(
        num_layers=26,
        embed_dim=2304,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        hidden_dim=9216,
        query_pre_attn_scalar=256,
        dtype="bfloat16",
    ),
    "9b": ModelConfig(
        num_layers=42,
        embed_dim=3584,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        hidden_dim=14336,
        query_pre_attn_scalar=256,
        dtype="bfloat16",
    ),
    "27b": ModelConfig(
        num_layers=46,
        embed_dim=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        hidden_dim=36864,
        query_pre_attn_scalar=144,  # embed_dim / num_heads, not head_dim
        dtype="bfloat16",
    ),
}

GEMMA2 = Family(
    name="gemma2",
    title="Gemma-2",
    features={},  # ModelConfig's defaults
    numbers=(
        *shape_numbers(
            layers=Missing(26),
            width=Missing(2304),
            heads=Missing(8),
            kv_heads=Missing(4),
            head_dim=Missing(256),
            hidden=Missing(9216),
            vocab=Missing(256_000),
        ),
        Number("query_pre_attn_scalar", "query_pre_attn_scalar", float, 256.0),
        Number("sliding_window", "sliding_window", int, 4096),
        Number("max_position", "max_position_embeddings", int, 8192),
        Number("attn_softcap", "attn_logit_softcapping", float, 50.0, optional=True),
        Number("final_softcap", "final_logit_softcapping", float, 30.0, optional=True),
        Number("norm_eps", "rms_norm_eps", float, 1e-6),
    ),
    thetas={"global": 10_000.0},
    pattern=("local", "global"),
    activation=("gelu_pytorch_tanh", ("hidden_activation", "hidden_act")),
    tied=True,
    only={"attention_bias": (False, None), "use_bidirectional_attention": (False, None)},
    written={"attention_bias": False},
    tensors=NORMS_AROUND,
    language_model="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    ids={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    sizes=SIZES,
)
