"""`config.json` of the families beside Gemma-2: published layouts, what is refused, what is read.

The published files are written down here as transformers 4 wrote them, shortened to what matters.
"""

from __future__ import annotations

import json
from typing import Any

import family_models
import jax
import numpy as np
import pytest

from grm_jax.model import huggingface
from grm_jax.model.config import SIZES
from grm_jax.model.hf_config import CheckpointError, config_json, read_config
from grm_jax.model.params import build_tree, get_leaf, param_table
from grm_jax.model.storage import load_params, param_shardings, save_model
from grm_jax.parallel.mesh import make_mesh

LLAMA3_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    # Multimodal: most of the text model's fields are left to transformers.
    "gemma3_4b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "image_token_index": 262144,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "gemma3_1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "vocab_size": 262144,
    },
    "llama3_8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "smollm2_135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": 49152,
    },
    "qwen2_5_7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen3_8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


def write(folder, content: dict[str, Any]):
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_files_are_the_sizes(size, tmp_path):
    assert read_config(write(tmp_path, PUBLISHED[size])) == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_written_files_read_back(size, tmp_path):
    config = SIZES[size].replace(scan_unroll=1)
    content = config_json(config, num_labels=0, dtype=config.dtype, ids={})
    assert read_config(write(tmp_path, content)) == config
    for layout in (("rope_parameters", "layer_types"), ("rope_theta", "rope_local_base_freq")):
        old = layout[0] == "rope_parameters"
        part = {k: v for k, v in content.items() if k not in layout}
        if not old:
            part.pop("rope_scaling")
        assert read_config(write(tmp_path, part)) == config, layout


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ("llama3_8b", {"attention_bias": True}, "attention_bias is True"),
        ("llama3_8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama3_8b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the forward pass of Llama"),
        ("llama3_8b", {"num_attention_heads": 33}, "head_dim is missing; add the value"),
        ("llama3_8b", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_types default"),
        ("llama3_8b", {"rope_scaling": LLAMA3_SCALING | {"factor": None}}, "factor is None"),
        (
            "llama3_8b",
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            "high_freq_factor=1.0 is not above",
        ),
        ("llama3_8b", {"layer_types": ["sliding_attention"] * 32}, "for Llama only full_attention"),
        ("qwen2_5_7b", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_8b", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_8b", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; give a checkpoint"),
        ("gemma3_1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_1b", {"rope_parameters": {"rope_theta": 1e4}}, "Gemma-3 has full_attention and"),
        ("gemma3_1b", {"sliding_window_pattern": 20}, "do not repeat after at most 12 layers"),
        ("gemma3_4b", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("gemma3_4b", {"text_config": {"model_type": "gemma2"}}, "text_config: model_type is"),
    ],
)
def test_what_is_not_implemented_is_refused(size, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(write(tmp_path, PUBLISHED[size] | changes))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"activation": "gelu_tanh"}, "a Llama checkpoint can not say activation="),
        ("llama", {"final_softcap": 30.0}, "can not say final_softcap=30.0"),
        ("llama", {"query_pre_attn_scalar": 3.0}, "can not say query_pre_attn_scalar=3.0"),
        ("qwen2", {"pattern": ("local", "global")}, "can not say pattern="),
        ("gemma2", {"local_rope_theta": 5.0}, "a Gemma-2 checkpoint can not say local_rope_theta"),
    ],
)
def test_what_a_familys_files_can_not_say_is_not_written(family, changes, message):
    config = SIZES["tiny"] if family == "gemma2" else family_models.CONFIGS[family]
    with pytest.raises(CheckpointError, match=message):
        config_json(config.replace(**changes), num_labels=0, dtype="float32", ids={})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sharded_reading_gives_the_same_parameters(family, make_params, cpus, tmp_path):
    """Biases and an untied head, too; a scalar model leaves the head out."""
    config = family_models.CONFIGS[family].replace(vocab_size=64)
    params = make_params(config, 0)
    huggingface.save(tmp_path / "hf", config, params)
    save_model(tmp_path / "own", config, params)
    mesh = make_mesh(1, 2, 2, cpus)
    for labels in (0, 1):
        table = param_table(config, num_labels=labels)
        wanted = [spec for spec in table if spec.path != ("score",)]
        for folder in ("hf", "own"):
            shardings = param_shardings(table, mesh)
            _, found = load_params(tmp_path / folder, shardings=shardings)
            assert ("head" in found) == (not config.tied_head and not labels)
            for spec in wanted:
                leaf = get_leaf(found, spec.path)
                assert leaf.sharding == get_leaf(shardings, spec.path), spec.path
                np.testing.assert_array_equal(leaf, get_leaf(params, spec.path))
            assert len(jax.tree.leaves(found)) == len(wanted)


def test_a_table_without_features_is_gemma_2s():
    """The tree of earlier model directories: blocks of a local and a global layer, nothing else."""
    tree = build_tree(param_table(SIZES["tiny"]), lambda spec: spec.shape)
    assert set(tree) == {"embed", "blocks", "final_norm"}
    assert set(tree["blocks"]) == {"local", "global"}
    assert set(tree["blocks"]["local"]) == {
        "pre_attn_norm", "q", "k", "v", "o", "post_attn_norm", "pre_ffw_norm", "gate", "up",
        "down", "post_ffw_norm",
    }  # fmt: skip
