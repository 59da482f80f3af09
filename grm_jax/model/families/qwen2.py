"""Qwen2 and Qwen2.5 (dense): as Llama, with biases where queries, keys and values are made.

The sizes are those of the `config.json` that Qwen/Qwen2.5-0.5B-Instruct, -1.5B-, -3B-, -7B-, -14B-,
-32B- and -72B-Instruct were published with.
"""

from __future__ import annotations

from typing import Any

from grm_jax.model.families.declaration import (
    NORMS_BEFORE,
    Family,
    Missing,
    Number,
    shape_numbers,
)
from grm_jax.model.families.llama import PLAIN, head_dim_of, plain_size

FEATURES: dict[str, Any] = {"family": "qwen2", **PLAIN, "qkv_bias": True}


def _size(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, tied: bool):
    return plain_size(
        FEATURES, layers, width, heads, kv_heads, hidden,
        vocab_size=vocab, max_position=32_768, rope_theta=1_000_000.0, tied_head=tied,
    )  # fmt: skip


SIZES = {
    "qwen2_5_0_5b": _size(24, 896, 14, 2, 4864, 151_936, True),
    "qwen2_5_1_5b": _size(28, 1536, 12, 2, 8960, 151_936, True),
    "qwen2_5_3b": _size(36, 2048, 16, 2, 11_008, 151_936, True),
    "qwen2_5_7b": _size(28, 3584, 28, 4, 18_944, 152_064, False),
    "qwen2_5_14b": _size(48, 5120, 40, 8, 13_824, 152_064, False),
    "qwen2_5_32b": _size(64, 5120, 40, 8, 27_648, 152_064, False),
    "qwen2_5_72b": _size(80, 8192, 64, 8, 29_568, 152_064, False),
}

QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    features=FEATURES,
    numbers=(
        *shape_numbers(
            layers=Missing(32),
            width=Missing(4096),
            heads=Missing(32),
            kv_heads=Missing(32),
            head_dim=head_dim_of,
            hidden=Missing(22_016),
            vocab=Missing(151_936),
        ),
        Number("max_position", "max_position_embeddings", int, 32_768),
        Number("norm_eps", "rms_norm_eps", float, 1e-6),
    ),
    thetas={"global": 10_000.0},
    pattern=("global",),
    activation=("silu", ("hidden_act",)),
    tied=False,
    only={"use_sliding_window": (False, None)},
    written={"use_sliding_window": False},
    tensors=NORMS_BEFORE,
    language_model="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    ids={"bos_token_id": None, "eos_token_id": 151_645, "pad_token_id": 151_643},
    sizes=SIZES,
)
