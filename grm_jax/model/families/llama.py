"""Llama 3 and models of its architecture, such as SmolLM2: all layers global, norms before alone.

The sizes are those of the `config.json` that meta-llama/Llama-3.2-1B, -3.2-3B, -3.1-8B, -3.1-70B
and HuggingFaceTB/SmolLM2-135M, -360M, -1.7B were published with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grm_jax.model.families.declaration import (
    NORMS_BEFORE,
    Family,
    Missing,
    Number,
    shape_numbers,
)
from grm_jax.model.shape import ModelConfig, RopeScaling

# What Llama and the families after it have in common.
PLAIN: dict[str, Any] = {
    "norm_plus_one": False,
    "post_norms": False,
    "activation": "silu",
    "embed_scale": False,
}
FEATURES: dict[str, Any] = {"family": "llama", **PLAIN}


def plain_size(
    features: Mapping[str, Any],
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    **more: Any,
) -> ModelConfig:
    """A size without softcaps, of global layers alone, whose queries are scaled by head_dim."""
    head_dim = more.pop("head_dim", width // heads)
    return ModelConfig(
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden,
        query_pre_attn_scalar=head_dim,
        pattern=("global",),
        attn_softcap=None,
        final_softcap=None,
        dtype="bfloat16",
        **(dict(features) | more),
    )


def head_dim_of(raw: Mapping[str, Any]) -> int | None:
    """What transformers takes where `head_dim` is absent; None where it does not come out even."""
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not (type(width) is int and type(heads) is int and heads > 0) or width % heads:
        return None
    return width // heads


def kv_heads_of(raw: Mapping[str, Any]) -> Any:
    """What transformers takes where `num_key_value_heads` is absent: as many as query heads."""
    return raw.get("num_attention_heads")


def _llama3(layers: int, width: int, heads: int, hidden: int, factor: float, **more: Any):
    more |= {
        "vocab_size": 128_256,
        "max_position": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling("llama3", factor, 1.0, 4.0, 8192),
        "norm_eps": 1e-5,
    }
    return plain_size(FEATURES, layers, width, heads, 8, hidden, **more)


def _smollm2(layers: int, width: int, heads: int, kv_heads: int, hidden: int, theta: float):
    return plain_size(
        FEATURES, layers, width, heads, kv_heads, hidden,
        vocab_size=49_152, max_position=8192, rope_theta=theta, norm_eps=1e-5,
    )  # fmt: skip


SIZES = {
    "llama3_1b": _llama3(16, 2048, 32, 8192, 32.0),
    "llama3_3b": _llama3(28, 3072, 24, 8192, 32.0),
    "llama3_8b": _llama3(32, 4096, 32, 14_336, 8.0, tied_head=False),
    "llama3_70b": _llama3(80, 8192, 64, 28_672, 8.0, tied_head=False),
    "smollm2_135m": _smollm2(30, 576, 9, 3, 1536, 100_000.0),
    "smollm2_360m": _smollm2(32, 960, 15, 5, 2560, 100_000.0),
    "smollm2_1_7b": _smollm2(24, 2048, 32, 32, 8192, 130_000.0),
}

LLAMA = Family(
    name="llama",
    title="Llama",
    features=FEATURES,
    numbers=(
        *shape_numbers(
            layers=Missing(32),
            width=Missing(4096),
            heads=Missing(32),
            kv_heads=kv_heads_of,
            head_dim=head_dim_of,
            hidden=Missing(11_008),
            vocab=Missing(32_000),
        ),
        Number("max_position", "max_position_embeddings", int, 2048),
        Number("norm_eps", "rms_norm_eps", float, 1e-6),
    ),
    thetas={"global": 10_000.0},
    pattern=("global",),
    activation=("silu", ("hidden_act",)),
    tied=False,
    only={"attention_bias": (False, None), "mlp_bias": (False, None)},
    written={"attention_bias": False, "mlp_bias": False},
    tensors=NORMS_BEFORE,
    language_model="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    sizes=SIZES,
)
