"""Gemma-3 (text): five local layers to a global one, QK-norm, no softcaps, norms before and behind.

Local and global layers have their own rotary embeddings; from 4b on that of global layers is
scaled. Multimodal checkpoints (`model_type` gemma3) hold the same text model; their vision parts
are left out.

The sizes are those of the `config.json` that google/gemma-3-270m, -1b-it, -4b-it, -12b-it and
-27b-it were published with. The published multimodal files name only some of the sizes and leave
the others to transformers, so an absent key has the value of its Gemma3TextConfig.
"""

from __future__ import annotations

from typing import Any

from grm_jax.model.families.declaration import (
    NORMS_AROUND,
    Family,
    Number,
    Wrapper,
    shape_numbers,
)
from grm_jax.model.shape import Kind, ModelConfig, RopeScaling

FEATURES: dict[str, Any] = {"family": "gemma3_text", "qk_norm": True}
PATTERN: tuple[Kind, ...] = ("local", "local", "local", "local", "local", "global")


def _size(layers: int, width: int, heads: int, kv_heads: int, hidden: int, **more: Any):
    rest: dict[str, Any] = {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262_208,
        "sliding_window": 1024,
        "max_position": 131_072,
        "rope_scaling": RopeScaling("linear", 8.0),
    }
    return ModelConfig(
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_dim=hidden,
        pattern=PATTERN,
        attn_softcap=None,
        final_softcap=None,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        dtype="bfloat16",
        **(FEATURES | rest | more),
    )


_SMALL: dict[str, Any] = {
    "vocab_size": 262_144,
    "sliding_window": 512,
    "max_position": 32_768,
    "rope_scaling": None,
}
SIZES = {
    "gemma3_270m": _size(18, 640, 4, 1, 2048, **_SMALL),
    "gemma3_1b": _size(26, 1152, 4, 1, 6912, **_SMALL),
    "gemma3_4b": _size(34, 2560, 8, 4, 10_240),
    "gemma3_12b": _size(48, 3840, 16, 8, 15_360),
    # query_pre_attn_scalar: embed_dim / num_heads
    "gemma3_27b": _size(62, 5376, 32, 16, 21_504, head_dim=128, query_pre_attn_scalar=168),
}

GEMMA3 = Family(
    name="gemma3_text",
    title="Gemma-3",
    features=FEATURES,
    numbers=(
        *shape_numbers(
            layers=26, width=2304, heads=8, kv_heads=4, head_dim=256, hidden=9216, vocab=262_208
        ),
        Number("query_pre_attn_scalar", "query_pre_attn_scalar", float, 256.0),
        Number("sliding_window", "sliding_window", int, 4096),
        Number("max_position", "max_position_embeddings", int, 131_072),
        Number("attn_softcap", "attn_logit_softcapping", float, None),
        Number("final_softcap", "final_logit_softcapping", float, None),
        Number("norm_eps", "rms_norm_eps", float, 1e-6),
    ),
    thetas={"global": 1_000_000.0, "local": 10_000.0},
    pattern=PATTERN,
    pattern_key="sliding_window_pattern",
    activation=("gelu_pytorch_tanh", ("hidden_activation", "hidden_act")),
    tied=True,
    only={"attention_bias": (False, None), "use_bidirectional_attention": (False, None)},
    written={"attention_bias": False},
    tensors=NORMS_AROUND,
    language_model="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    ids={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    sizes=SIZES,
    wrapper=Wrapper(
        model_type="gemma3",
        architecture="Gemma3ForConditionalGeneration",
        prefixes=(
            ("language_model.model.", "model."),  # as published, and as transformers writes it
            ("model.language_model.", "model."),  # as transformers names the model's own parts
            ("language_model.lm_head.", "lm_head."),
        ),
        others=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    ),
)
