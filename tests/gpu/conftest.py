"""Tests that need an NVIDIA GPU: `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/gpu`.

They are skipped where JAX has none. With GRM_JAX_CPU_AS_GPU set the CPU stands in, so that the
tests themselves can be tried without one; those of the GPU's own abilities are skipped then, too.
"""

from __future__ import annotations

import os

import jax
import pytest

from grm_jax.model.config import SIZES, ModelConfig
from grm_jax.parallel.mesh import make_mesh

STAND_IN = bool(os.environ.get("GRM_JAX_CPU_AS_GPU"))


@pytest.fixture(scope="session")
def gpu():
    """The device under test."""
    if STAND_IN:
        return jax.devices("cpu")[0]
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("needs an NVIDIA GPU; where there is one, set JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(scope="session")
def real_gpu(gpu):
    """The device under test, if it is a GPU."""
    if STAND_IN:
        pytest.skip("a CPU can not stand in for a GPU here")
    return gpu


@pytest.fixture(scope="session")
def mesh(gpu):
    return make_mesh(1, 1, 1, [gpu])


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """Heads, softcaps and dtype of 2b, but narrow; a window shorter than the rows."""
    return SIZES["2b"].replace(
        num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, hidden_dim=512, vocab_size=1024,
        sliding_window=24, max_position=512, compute_dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture(scope="session")
def params(model, make_params, gpu):
    return jax.device_put(make_params(model, 0), gpu)


@pytest.fixture(scope="session")
def page() -> int:
    """The tokens of a page of a sampler's prompts, which have up to 54."""
    # For prompts of several pages XLA's CPU backend has no product in bfloat16 on some processors.
    return 64 if STAND_IN else 32
