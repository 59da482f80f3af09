"""What a backbone is: the shape of its layers, and the features in which families differ.

One forward pass (`transformer.py`) reads these features; a family (`families/`) says which of them
its checkpoints have. Every default is Gemma-2's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from grm_jax.errors import UserError
from grm_jax.model.options import Backend

Kind = Literal["local", "global"]
Activation = Literal["gelu_tanh", "silu"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are changed for longer texts.

    "linear" divides all by `factor`. "llama3" divides only those whose wavelength is longer than
    original_max_position / low_freq_factor tokens, leaves those alone that are shorter than
    original_max_position / high_freq_factor, and goes from one to the other in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor={self.high_freq_factor} is not above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder and the numeric constants of its forward pass.

    It is hashable, and a static argument of jitted functions. A *block* is one repetition of
    `pattern`, the kinds of layers in their order. Where the layers are no whole number of
    repetitions, those that remain at the end are one more, shorter block: 26 layers of Gemma-3 are
    four blocks of five local layers and a global one, and a block of two local layers.

    A local layer attends within `sliding_window` positions (keys j with i - window < j <= i).
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    query_pre_attn_scalar: float
    vocab_size: int = 256_000
    sliding_window: int = 4096  # of local layers
    max_position: int = 8192
    attn_softcap: float | None = 50.0  # None: the scores are not capped
    final_softcap: float | None = 30.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"  # the checkpoint's own: what its weights were released in
    compute_dtype: str = "float32"  # what it is computed in; see model.compute_dtype
    attention: Backend = "chunked"  # how attention is computed; see model.attention_backends
    scan_unroll: int = 1  # blocks per scan iteration; tiny models run faster fully unrolled
    family: str = "gemma2"  # whose checkpoints it is read from and written to; see model.families
    pattern: tuple[Kind, ...] = ("local", "global")
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of local layers, where it is not `rope_theta`
    local_rope_scaling: RopeScaling | None = None  # of local layers; `rope_scaling` is not theirs
    norm_plus_one: bool = True  # a norm multiplies by 1 + weight, not by the weight
    post_norms: bool = True  # attention and feed-forward each have a norm behind them, too
    qk_norm: bool = False  # queries and keys are normalised, each head by itself
    qkv_bias: bool = False  # the products that make queries, keys and values have biases
    activation: Activation = "gelu_tanh"
    embed_scale: bool = True  # embeddings are multiplied by sqrt(embed_dim)
    tied_head: bool = True  # the output head is the embedding

    def __post_init__(self) -> None:
        _require_positive(self)
        if not self.pattern:
            raise UserError("pattern is empty; give the kinds of the layers of a block")
        if self.num_layers < len(self.pattern):
            raise UserError(
                f"num_layers={self.num_layers} is less than one repetition of the pattern "
                f"{', '.join(self.pattern)}; give a pattern of at most as many layers"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of a block's layers: their kinds, with a number where a kind comes twice.

        Gemma-2's are "local" and "global"; Gemma-3's are "local_0" to "local_4" and "global_5".
        """
        if len(set(self.pattern)) == len(self.pattern):
            return self.pattern
        return tuple(f"{kind}_{index}" for index, kind in enumerate(self.pattern))

    @property
    def num_blocks(self) -> int:
        """N: the number of whole repetitions of the pattern, which is the length of the scan."""
        return self.num_layers // len(self.pattern)

    @property
    def rest(self) -> tuple[str, ...]:
        """The slots of the shorter block of layers that remain after the scan; () for none."""
        return self.slots[: self.num_layers % len(self.pattern)]

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The slots of each block, in the order of the layers; the shorter block is the last."""
        return (self.slots,) * self.num_blocks + ((self.rest,) if self.rest else ())

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of layers that there are, each once."""
        return tuple(dict.fromkeys(self.pattern))

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        """The kind of every layer."""
        return tuple(kind_of(slot) for block in self.blocks for slot in block)

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

    def window(self, kind: Kind) -> int | None:
        """The sliding window of layers of a kind; None where they see all earlier positions."""
        return self.sliding_window if kind == "local" else None

    def rope(self, kind: Kind) -> tuple[float, RopeScaling | None]:
        """The base and the scaling of the rotary embedding of layers of a kind."""
        if kind == "global":
            return self.rope_theta, self.rope_scaling
        theta = self.rope_theta if self.local_rope_theta is None else self.local_rope_theta
        return theta, self.local_rope_scaling

    def replace(self, **changes) -> ModelConfig:
        return dataclasses.replace(self, **changes)


def kind_of(slot: str) -> Kind:
    """The kind of the layer in a slot (see `ModelConfig.slots`)."""
    return "local" if slot.startswith("local") else "global"


def _require_positive(config: ModelConfig | RopeScaling) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not value > 0:
            raise UserError(f"{field.name}={value}; give a positive number")
