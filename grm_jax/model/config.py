"""The shape of a Gemma-2 and the sizes that this package knows by name.

The numbers of 2b, 9b and 27b are those of the published checkpoints' `config.json`. `tiny` is the
default: a CPU trains it in minutes, by the same code.
"""

from __future__ import annotations

import dataclasses
import math

from grm_jax.errors import UserError
from grm_jax.model.options import Backend


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Gemma-2 and the numeric constants of its forward pass.

    It is hashable, and a static argument of jitted functions. Layers come in pairs: even layers
    attend within `sliding_window` positions (keys j with i - window < j <= i), odd layers attend
    globally, so `num_layers` is even.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    query_pre_attn_scalar: float
    vocab_size: int = 256_000
    sliding_window: int = 4096
    max_position: int = 8192
    attn_softcap: float | None = 50.0  # None: the scores are not capped
    final_softcap: float = 30.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"  # the checkpoint's own: what its weights were released in
    compute_dtype: str = "float32"  # what it is computed in; see model.compute_dtype
    attention: Backend = "chunked"  # how attention is computed; see model.attention_backends
    scan_unroll: int = 1  # blocks per scan iteration; tiny models run faster fully unrolled

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"{field.name}={value}; give a positive number")
        if self.num_layers % 2:
            raise UserError(
                f"num_layers={self.num_layers} is odd; Gemma-2 alternates sliding-window and "
                "global layers, so give an even number"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def num_blocks(self) -> int:
        """The number of pairs of a local and a global layer, which is the length of the scan."""
        return self.num_layers // 2

    @property
    def queries_per_kv(self) -> int:
        """G: how many query heads share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_scale(self) -> float:
        """The factor of the queries: query_pre_attn_scalar ** -0.5 (not head_dim ** -0.5)."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def shape(self) -> ModelConfig:
        """The config with fixed values for how it is computed, to compare models by their shape."""
        return self.replace(dtype="", compute_dtype="", attention="reference", scan_unroll=1)

    def replace(self, **changes) -> ModelConfig:
        return dataclasses.replace(self, **changes)


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
    "2b": ModelConfig(
        num_layers=26,
        embed_dim=2304,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        hidden_dim=9216,
        query_pre_attn_scalar=256,
        dtype="bfloat16",
    ),
    "9b": ModelConfig(
        num_layers=42,
        embed_dim=3584,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        hidden_dim=14336,
        query_pre_attn_scalar=256,
        dtype="bfloat16",
    ),
    "27b": ModelConfig(
        num_layers=46,
        embed_dim=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        hidden_dim=36864,
        query_pre_attn_scalar=144,  # embed_dim / num_heads, not head_dim
        dtype="bfloat16",
    ),
}


def model_config(size: str) -> ModelConfig:
    """The config of a size. Raises UserError that lists the sizes for an unknown name."""
    if size not in SIZES:
        raise UserError(f"unknown model size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]
