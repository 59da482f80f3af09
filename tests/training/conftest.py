"""Critiques and records made by hand, and a small model to train."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from grm_jax.data.preferences import Preference
from grm_jax.judge.critiques import Rollout
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, param_table


@pytest.fixture(scope="session")
def model(small) -> ModelConfig:
    return small.replace(num_layers=2)


@pytest.fixture(scope="session")
def params(model, make_params) -> Params:
    return make_params(model, 0)


@pytest.fixture(scope="session")
def table(model):
    return param_table(model)


@pytest.fixture(scope="session")
def make_critique():
    """(id, index, scores, prompt length, tokens) -> a critique; without scores: no_box."""

    def make(
        id: str,
        index: int,
        scores: Sequence[float] | None = None,
        *,
        prompt: int = 3,
        tokens: int = 2,
        order: Sequence[int] | None = None,
        finish_reason="stop",
    ) -> Rollout:
        return Rollout(
            example_id=id,
            sample=index,
            order=tuple(range(len(scores or (0, 0)))) if order is None else tuple(order),
            text=f"critique {id} {index}",
            scores=None if scores is None else tuple(map(float, scores)),
            failure="no_box" if scores is None else None,
            finish_reason=finish_reason,
            prompt=tuple(range(4, 4 + prompt)),
            tokens=tokens,
            ids=np.arange(10, 10 + tokens, dtype=np.int32),
            logprobs=-0.1 * np.arange(1, tokens + 1, dtype=np.float32),
        )

    return make


@pytest.fixture(scope="session")
def make_record():
    """(id, labels) -> a preference."""

    def make(id: str, labels: Sequence[float], query: str = "q") -> Preference:
        responses = tuple(f"response {i}" for i in range(len(labels)))
        turns = ({"role": "user", "content": query},)
        return Preference(id, turns, responses, tuple(map(float, labels)))

    return make
