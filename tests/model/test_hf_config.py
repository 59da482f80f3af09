"""config.json, special ids and tokenizer files."""

from __future__ import annotations

import json

import pytest

from grm_jax.model.config import SIZES, model_config
from grm_jax.model.hf_config import (
    CheckpointError,
    config_json,
    copy_tokenizer,
    read_config,
    read_num_labels,
    special_ids,
)

# As published with Gemma-2 9b, in the layout of transformers 4.
PUBLISHED_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


@pytest.mark.parametrize("size", SIZES)
def test_written_configs_read_back(size, tmp_path):
    config = model_config(size)
    content = config_json(config, num_labels=0, dtype=config.dtype, ids=special_ids(None))
    (tmp_path / "config.json").write_text(json.dumps(content))
    for old, new in (("hidden_act", "hidden_activation"), ("torch_dtype", "dtype")):
        assert content[old] == content[new]
    rope = content["rope_parameters"]
    assert content["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    # How the scan is compiled is no property of the checkpoint.
    assert read_config(tmp_path) == config.replace(scan_unroll=read_config(tmp_path).scan_unroll)
    assert read_num_labels(tmp_path) == 0


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_transformers_reads_what_is_written(size, tmp_path, hf_config):
    transformers = pytest.importorskip("transformers")
    config = model_config(size)
    content = config_json(config, num_labels=1, dtype="bfloat16", ids=special_ids(None))
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    want = hf_config(config, num_labels=1).to_dict()
    have = found.to_dict()
    told = set(want) - {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {key: have[key] for key in told} == {key: want[key] for key in told}
    assert found.architectures == ["Gemma2ForSequenceClassification"] and found.num_labels == 1


def test_version_4_layout(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED_9B))
    assert read_config(tmp_path) == model_config("9b")
    only_old = {k: v for k, v in PUBLISHED_9B.items() if k != "hidden_activation"}
    path.write_text(json.dumps(only_old | {"rope_theta": 5000.0, "torch_dtype": "float16"}))
    read = read_config(tmp_path)
    assert read.rope_theta == 5000.0
    assert read.dtype == "float32"  # float16 would overflow


def test_version_5_layout(files):
    files.edit_config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    files.edit_config(hidden_act=..., torch_dtype=..., dtype="bfloat16")
    read = read_config(files.directory)
    assert (read.rope_theta, read.dtype) == (77.0, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral"},
            "model_type is 'mistral'; give a checkpoint of one of the families that are "
            "implemented: gemma2, gemma3_text, llama, qwen2, qwen3, gemma3",
        ),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"hidden_activation": ..., "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"final_logit_softcapping": 0}, "must be positive"),
        ({"sliding_window": None}, "sliding_window is None; the forward pass needs an integer"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"factor": 2}}, r"rope_scaling has \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters d"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is None"),
        ({"rope_parameters": {"full_attention": {}}}, "Gemma-2 has one rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8}}, r"has \['factor'\]"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for num_hidden_l"),
        ({"layer_types": ["chunked_attention"] * 2}, "a list of sliding_attention and full_attent"),
        (
            {
                "num_hidden_layers": 14,
                "layer_types": ["full_attention"] * 13 + ["sliding_attention"],
            },
            "its local and global layers do not repeat after at most 12 layers",
        ),
        ({"hidden_size": "72"}, "hidden_size is '72'; the forward pass needs an integer"),
        ({"head_dim": ...}, "head_dim is missing"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(files, changes, message):
    files.edit_config(**changes)
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(files.directory)
    assert str(files.directory / "config.json") in str(error.value)


def test_files_that_are_not_configs(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected, not list"):
        read_config(tmp_path)


def test_other_architectures_are_refused(files):
    files.edit_config(architectures=["Gemma2ForTokenClassification"])
    with pytest.raises(CheckpointError, match="Gemma2ForTokenClassification"):
        read_num_labels(files.directory)
    files.edit_config(architectures=["Gemma2ForSequenceClassification"], num_labels=...)
    assert read_num_labels(files.directory) == 2  # transformers' default
    files.edit_config(id2label={"0": "good"})
    assert read_num_labels(files.directory) == 1


def test_special_ids_are_found_where_they_are(tmp_path):
    assert special_ids(None) == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    with pytest.raises(CheckpointError, match="which token ends a text"):
        special_ids(tmp_path)
    names = {"bos_token": None, "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"<pad>": 5, "a": 6}}}
    vocabulary["added_tokens"] = [{"id": 9, "content": "</s>"}]  # type: ignore[assignment]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert special_ids(tmp_path) == {"bos_token_id": None, "eos_token_id": 9, "pad_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": 4}))
    assert special_ids(tmp_path) == {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 107]}))
    assert special_ids(tmp_path)["eos_token_id"] == [1, 107]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    assert special_ids(tmp_path)["eos_token_id"] == 1
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[nothing]"}))
    with pytest.raises(CheckpointError, match=r"names the token '\[nothing\]'"):
        special_ids(tmp_path)


def test_tokenizer_files_are_copied_and_no_others(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "config.json"):
        (source / name).write_text(name)
    assert copy_tokenizer(source, target) == ["tokenizer.json", "chat_template.jinja"]
    assert sorted(p.name for p in target.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    assert copy_tokenizer(source, source) == ["tokenizer.json", "chat_template.jinja"]
    with pytest.raises(CheckpointError, match="no such directory"):
        copy_tokenizer(tmp_path / "c", target)
