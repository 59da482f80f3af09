"""Tiny models of the families beside Gemma-2, whose shapes differ in every feature, and the
configs of transformers that describe them: written out by hand, independent of `hf_fields.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grm_jax.model.config import ModelConfig
from grm_jax.model.families import gemma3, llama, qwen2, qwen3
from grm_jax.model.shape import RopeScaling

# Of the 14 layers of Gemma-3 two remain after two blocks; windows are shorter than the sequences;
# the original length of the llama3 scaling is so short that all three of its ranges are met.
PLAIN: dict[str, Any] = {"pattern": ("global",), "attn_softcap": None, "final_softcap": None}
CONFIGS: dict[str, ModelConfig] = {
    "gemma3_text": ModelConfig(
        num_layers=14, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=40,
        query_pre_attn_scalar=24, vocab_size=67, sliding_window=5, max_position=64,
        pattern=gemma3.PATTERN, attn_softcap=None, final_softcap=None, rope_theta=2000.0,
        local_rope_theta=100.0, rope_scaling=RopeScaling("linear", 4.0), **gemma3.FEATURES,
    ),
    "llama": ModelConfig(
        num_layers=3, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=16, hidden_dim=56,
        query_pre_attn_scalar=16, vocab_size=61, max_position=64, rope_theta=500.0, norm_eps=1e-3,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32), tied_head=False,
        **llama.FEATURES, **PLAIN,
    ),
    "qwen2": ModelConfig(
        num_layers=2, embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=12, hidden_dim=40,
        query_pre_attn_scalar=12, vocab_size=53, max_position=64, rope_theta=300.0,
        **qwen2.FEATURES, **PLAIN,
    ),
    "qwen3": ModelConfig(
        num_layers=2, embed_dim=40, num_heads=4, num_kv_heads=1, head_dim=16, hidden_dim=44,
        query_pre_attn_scalar=16, vocab_size=59, max_position=64, rope_theta=300.0,
        tied_head=False, **qwen3.FEATURES, **PLAIN,
    ),
}  # fmt: skip
CLASSES: dict[str, tuple[str, str, str]] = {
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
}
# A change of each feature that must show in the logits.
CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "gemma3_text": (
        {"sliding_window": 6}, {"rope_theta": 1000.0}, {"local_rope_theta": 200.0},
        {"rope_scaling": None}, {"query_pre_attn_scalar": 16}, {"embed_scale": False},
        {"norm_plus_one": False}, {"activation": "silu"}, {"attn_softcap": 5.0},
    ),
    "llama": (
        {"rope_scaling": None}, {"rope_scaling": RopeScaling("linear", 8.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)}, {"norm_eps": 1e-2},
        {"activation": "gelu_tanh"}, {"norm_plus_one": True}, {"embed_scale": True},
    ),
    "qwen2": ({"rope_theta": 200.0}, {"final_softcap": 5.0}),
    "qwen3": ({"rope_theta": 200.0}, {"query_pre_attn_scalar": 10}),
}  # fmt: skip


def hf_config(config: ModelConfig, **changes: Any) -> Any:
    """transformers' config of a ModelConfig."""
    import transformers

    more: dict[str, Any] = {}
    if config.family == "gemma3_text":
        more = {
            "query_pre_attn_scalar": int(config.query_pre_attn_scalar),
            "sliding_window": config.sliding_window,
            "layer_types": [
                "full_attention" if layer % 6 == 5 else "sliding_attention"
                for layer in range(config.num_layers)
            ],
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": config.rope("local")[0],
                },
                "full_attention": {"rope_theta": config.rope_theta} | _scaling(config),
            },
        }
    else:
        more = {"rope_parameters": {"rope_theta": config.rope_theta} | _scaling(config)}
    return getattr(transformers, CLASSES[config.family][0])(
        num_hidden_layers=config.num_layers,
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        **(more | changes),
    )


def _scaling(config: ModelConfig) -> Mapping[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    numbers = dataclasses.asdict(scaling)
    if numbers.pop("kind") == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    numbers["original_max_position_embeddings"] = numbers.pop("original_max_position")
    return {"rope_type": "llama3"} | numbers
