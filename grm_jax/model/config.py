"""The sizes that this package knows by name: `tiny`, and those that the families declare.

`tiny` is the default: a Gemma-2 that a CPU trains in minutes, by the same code; `tiny_half` and
`tiny_double` differ in width.
"""

from __future__ import annotations

from grm_jax.errors import UserError
from grm_jax.model.families import FAMILIES
from grm_jax.model.shape import ModelConfig

__all__ = ["SIZES", "TINY_SIZES", "ModelConfig", "model_config"]

SIZES: dict[str, ModelConfig] = {
    # The model of the embedded world, of about 0.6 M parameters. Its window is shorter than the
    # prompts, so that local and global layers differ.
    "tiny": ModelConfig(
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        hidden_dim=256,
        query_pre_attn_scalar=32,
        vocab_size=128,
        sliding_window=16,
        max_position=512,
        scan_unroll=2,
    ),
}
# Half and twice as wide, of about 0.16 M and 2.3 M parameters.
SIZES["tiny_half"] = SIZES["tiny"].replace(embed_dim=64, num_heads=2, hidden_dim=128)
SIZES["tiny_double"] = SIZES["tiny"].replace(
    embed_dim=256, num_heads=8, num_kv_heads=2, hidden_dim=512
)
TINY_SIZES = tuple(SIZES)  # those that learn from the embedded world
for _family in FAMILIES.values():
    SIZES |= _family.sizes


def model_config(size: str) -> ModelConfig:
    """The config of a size. Raises UserError that lists the sizes for an unknown name."""
    if size not in SIZES:
        raise UserError(f"unknown model size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]
