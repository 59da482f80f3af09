"""A small model to judge with."""

from __future__ import annotations

import pytest

from grm_jax.model.config import ModelConfig


@pytest.fixture(scope="session")
def model(small) -> ModelConfig:
    return small.replace(num_layers=2)
