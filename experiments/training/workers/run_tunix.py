"""tunix' PeftTrainer with its own loss (supervised training of all parameters)."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from common import LENGTH, ROWS, arguments, serve, tokens
from tunix.models.gemma import model as gemma
from tunix.models.gemma import params_safetensors
from tunix.sft import peft_trainer

args = arguments()
kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL)
config = gemma.ModelConfig(
    num_layers=12, num_embed=32_000, embed_dim=768, hidden_dim=3072, num_heads=8, head_dim=128,
    num_kv_heads=4, final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True,
    attention_types=kinds * 6, attn_logits_soft_cap=50.0, sliding_window_size=256,
)  # fmt: skip
if args.remat:
    config.remat_config = gemma.RematConfig.BLOCK
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = params_safetensors.create_model_from_safe_tensors(
    str(args.model), config, mesh, dtype=jnp.float32
)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
trainer = peft_trainer.PeftTrainer(model, optimizer, settings)
rows = jnp.asarray(tokens())
mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (ROWS, LENGTH, LENGTH))
positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
trainer.with_gen_model_input_fn(
    lambda batch: {
        "input_tokens": batch["rows"],
        "input_mask": jnp.ones((ROWS, LENGTH), bool),
        "positions": positions,
        "attention_mask": mask,
    }
)
with mesh:
    step, _ = trainer.jit_train_and_eval_step()


def run(seed: int) -> float:
    del seed
    with mesh:
        out = step({"rows": rows})
        jax.block_until_ready(jax.tree.leaves(out))
    return float(out[0])


serve(f"tunix {importlib.metadata.version('google-tunix')}", run)
