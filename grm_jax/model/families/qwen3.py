"""Qwen3 (dense): as Llama, with QK-norm and heads whose size is set apart from the width.

The sizes are those of the `config.json` that Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B and -32B were
published with.
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
from grm_jax.model.families.llama import PLAIN, plain_size

FEATURES: dict[str, Any] = {"family": "qwen3", **PLAIN, "qk_norm": True}


def _size(layers: int, width: int, heads: int, hidden: int, tied: bool):
    return plain_size(
        FEATURES, layers, width, heads, 8, hidden,
        head_dim=128, vocab_size=151_936, max_position=40_960, rope_theta=1_000_000.0,
        tied_head=tied,
    )  # fmt: skip


SIZES = {
    "qwen3_0_6b": _size(28, 1024, 16, 3072, True),
    "qwen3_1_7b": _size(28, 2048, 16, 6144, True),
    "qwen3_4b": _size(36, 2560, 32, 9728, True),
    "qwen3_8b": _size(36, 4096, 32, 12_288, False),
    "qwen3_14b": _size(40, 5120, 40, 17_408, False),
    "qwen3_32b": _size(64, 5120, 64, 25_600, False),
}

QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    features=FEATURES,
    numbers=(
        *shape_numbers(
            layers=Missing(32),
            width=Missing(4096),
            heads=Missing(32),
            kv_heads=Missing(32),
            head_dim=Missing(128),
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
    only={"attention_bias": (False, None), "use_sliding_window": (False, None)},
    written={"attention_bias": False, "use_sliding_window": False},
    tensors=NORMS_BEFORE,
    language_model="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    ids={"bos_token_id": None, "eos_token_id": 151_645, "pad_token_id": 151_643},
    sizes=SIZES,
)
