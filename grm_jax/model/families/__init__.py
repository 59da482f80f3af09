"""The families of backbones that are read, trained, sampled and written: one file each.

A family that differs only by the features of `shape.ModelConfig` is one file, with a `Family` in
it, and one line here.
"""

from __future__ import annotations

from grm_jax.model.families.declaration import Family
from grm_jax.model.families.gemma2 import GEMMA2
from grm_jax.model.families.gemma3 import GEMMA3
from grm_jax.model.families.llama import LLAMA
from grm_jax.model.families.qwen2 import QWEN2
from grm_jax.model.families.qwen3 import QWEN3
from grm_jax.model.shape import ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GEMMA2,
        GEMMA3,
        LLAMA,
        QWEN2,
        QWEN3,
    )
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The declaration of a model's family."""
    return FAMILIES[config.family]
