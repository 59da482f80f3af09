"""The options of the model: how it is computed, and which of its weights are trained. No JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

from grm_jax.errors import UserError

Backend = Literal["reference", "chunked", "splash", "tokamax"]
# What a model is computed in; auto: the checkpoint's own dtype where the device is fast in it.
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "block", "block_save_attention", "offload"]

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Training of low-rank adapters instead of all parameters."""

    rank: int = 0
    """The rank r of the adapters; 0 trains all parameters."""
    alpha: float = 16.0
    """The change a b is scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """The matrices of a layer that get adapters, among q, k, v, o, gate, up and down."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets or self.rank < 0:
            raise UserError(
                f"lora: rank={self.rank}, targets={self.targets}; give rank >= 0 and targets among "
                f"{', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """The factor of the change a b: alpha / rank."""
        return self.alpha / max(self.rank, 1)
