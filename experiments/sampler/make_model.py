"""The random Gemma-2 of the sampler benchmarks: `python experiments/sampler/make_model.py DIR`.

138 million parameters (12 layers, 768 wide, 8 heads on 4 key/value heads of 128, feed-forward
3,072, vocabulary 32,000, window 256), float32, as a Hugging Face folder, and a prompt of random
ids. With the package `gguf` installed also as `model.gguf`, which llama.cpp reads.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import tyro

from grm_jax.model import hf_export
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, init_params, param_table

CONFIG = ModelConfig(
    num_layers=12,
    embed_dim=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    hidden_dim=3072,
    query_pre_attn_scalar=128,
    vocab_size=32_000,
    sliding_window=256,
    max_position=8192,
)
PROMPT_TOKENS = 4096


def main(directory: tyro.conf.Positional[Path], *, seed: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    params = init_params(param_table(CONFIG), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    # Norms away from zero, so that their (1 + w) counts.
    params = jax.tree_util.tree_map_with_path(
        lambda path, w: (
            w + 0.1 * rng.normal(size=w.shape).astype(np.float32) if "norm" in str(path[-1]) else w
        ),
        params,
    )
    hf_export.save(directory, CONFIG, params)
    ids = rng.integers(300, CONFIG.vocab_size, PROMPT_TOKENS).tolist()
    (directory / "prompt.json").write_text(json.dumps(ids), encoding="utf-8")
    if importlib.util.find_spec("gguf") is not None:
        write_gguf(directory / "model.gguf", params)
        for dtype in ("BF16", "Q8_0"):
            write_gguf(directory / f"model-{dtype}.gguf", params, dtype)


def write_gguf(path: Path, params: Params, dtype: str = "F32") -> None:
    """The same weights for llama.cpp, whose norms hold 1 + w and whose matrices are [out, in].

    Args:
      dtype: that of matrices, as gguf calls it.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    c = CONFIG
    out = gguf.GGUFWriter(str(path), "gemma2")
    out.add_context_length(c.max_position)
    out.add_embedding_length(c.embed_dim)
    out.add_block_count(c.num_layers)
    out.add_feed_forward_length(c.hidden_dim)
    out.add_head_count(c.num_heads)
    out.add_head_count_kv(c.num_kv_heads)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_layer_norm_rms_eps(c.norm_eps)
    assert c.attn_softcap is not None and c.final_softcap is not None  # the file says gemma2
    out.add_attn_logit_softcapping(c.attn_softcap)
    out.add_final_logit_softcapping(c.final_softcap)
    out.add_sliding_window(c.sliding_window)
    out.add_rope_freq_base(c.rope_theta)
    # A vocabulary in name only: the benchmark gives ids.
    out.add_tokenizer_model("llama")
    out.add_token_list([f"t{i}".encode() for i in range(c.vocab_size)])
    out.add_token_scores([0.0] * c.vocab_size)
    out.add_token_types([3 if i < 4 else 1 for i in range(c.vocab_size)])
    out.add_bos_token_id(2)
    out.add_eos_token_id(1)
    out.add_unk_token_id(3)

    def put(name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        if dtype == "F32" or value.ndim == 1:
            out.add_tensor(f"{name}.weight", value)
        else:
            stored = gguf.GGMLQuantizationType[dtype]
            quantised = gguf.quants.quantize(value, stored)
            out.add_tensor(f"{name}.weight", quantised, raw_dtype=stored)

    put("token_embd", np.asarray(params["embed"]))
    put("output_norm", np.asarray(params["final_norm"]) + 1.0)
    norms = {
        "pre_attn_norm": "attn_norm",
        "post_attn_norm": "post_attention_norm",
        "pre_ffw_norm": "ffn_norm",
        "post_ffw_norm": "post_ffw_norm",
    }
    for layer in range(c.num_layers):
        kind = ("local", "global")[layer % 2]
        w = {k: np.asarray(v[layer // 2]) for k, v in params["blocks"][kind].items()}
        prefix = f"blk.{layer}."
        for name, target in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
            put(prefix + target, w[name].reshape(c.embed_dim, -1).T)
        put(prefix + "attn_output", w["o"].reshape(-1, c.embed_dim).T)
        for name, target in (("gate", "ffn_gate"), ("up", "ffn_up"), ("down", "ffn_down")):
            put(prefix + target, w[name].T)
        for name, target in norms.items():
            put(prefix + target, w[name] + 1.0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    tyro.cli(main)
