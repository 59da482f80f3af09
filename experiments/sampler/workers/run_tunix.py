"""tunix' Sampler, which repeats the prompt k times."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from common import arguments, serve
from tunix.generate import sampler as generate
from tunix.models.gemma import model as gemma
from tunix.models.gemma import params_safetensors

args = arguments()
LAYERS, KV_HEADS, HEAD = 12, 4, 128
kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL)
config = gemma.ModelConfig(
    num_layers=LAYERS, num_embed=32_000, embed_dim=768, hidden_dim=3072, num_heads=8,
    head_dim=HEAD, num_kv_heads=KV_HEADS, final_logit_softcap=30.0, use_post_attn_norm=True,
    use_post_ffw_norm=True, attention_types=kinds * (LAYERS // 2), attn_logits_soft_cap=50.0,
    sliding_window_size=256,
)  # fmt: skip
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = params_safetensors.create_model_from_safe_tensors(
    str(args.model), config, mesh, dtype=jnp.float32
)


class Ids:
    """A tokenizer whose every text is the benchmark's prompt."""

    def encode(self, text, **_):
        return list(args.ids)

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return 0  # none: the prompt's tokens are given whole

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0


length = len(args.ids)
cache = generate.CacheConfig(
    cache_size=length + args.new, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD
)
sampler = generate.Sampler(model, Ids(), cache)


def run(seed: int) -> int:
    out = sampler(
        ["prompt"] * args.k, max_generation_steps=args.new, max_prompt_length=length,
        temperature=1.0, top_p=1.0, top_k=None, seed=seed, eos_tokens=[31_999_999],
    )  # fmt: skip
    return sum(len(tokens) for tokens in out.tokens)


serve(f"tunix {importlib.metadata.version('google-tunix')}", run)
