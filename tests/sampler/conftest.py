"""Sampling with small random models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request, Sample

STOP = 3
# Every shape is compiled: most tests draw three samples of three prompts, in two chunks; the long
# prompt has two pages.
ENGINE = EngineConfig(max_rows=9, page=8, prefill_tokens=32, chunk=6)
# Shorter and longer than the window of 6.
PROMPTS = {
    "short": (5, 9, 17),
    "window": (4, 21, 30, 8, 11, 13),
    "long": (7, 33, 12, 12, 25, 38, 6, 19, 22, 10, 31, 29, 14),
}

Found = dict[tuple[str, int], Sample]


@pytest.fixture(scope="session")
def model(small) -> ModelConfig:
    """One block: decoding runs unrolled over blocks, and is compiled for many shapes."""
    return small.replace(num_layers=2)


@pytest.fixture(scope="session")
def params(model, make_params) -> Params:
    return make_params(model, 0)


@pytest.fixture(scope="session")
def base_engine() -> EngineConfig:
    return ENGINE


@pytest.fixture(scope="session")
def prompts() -> dict[str, tuple[int, ...]]:
    return dict(PROMPTS)


@pytest.fixture(scope="session")
def make_sampler(model, one_device) -> Callable[..., Sampler]:
    """(stop_ids, engine, mesh) -> a sampler of the model."""

    def make(stop_ids: Sequence[int] = (STOP,), engine: EngineConfig = ENGINE, mesh=None):
        return Sampler(model, stop_ids, engine, mesh or one_device)

    return make


@pytest.fixture(scope="session")
def draw_samples(make_sampler, params) -> Callable[..., Found]:
    """(requests, seed, sampler, weights, **sampling) -> samples by (id, index)."""

    def run(
        requests: Sequence[Request],
        *,
        seed: int = 0,
        sampler: Sampler | None = None,
        weights: Params | None = None,
        max_new_tokens: int = 11,
        **sampling,
    ) -> Found:
        config = SamplingConfig(max_new_tokens=max_new_tokens, **sampling)
        found = (sampler or make_sampler()).sample(
            params if weights is None else weights, requests, config, jax.random.key(seed)
        )
        return {(sample.example_id, sample.index): sample for sample in found}

    return run


@pytest.fixture(scope="session")
def same_samples() -> Callable[[Found, Found], None]:
    """Asserts equal tokens and finish reasons, and log-probabilities up to float rounding."""

    def check(a: Found, b: Found) -> None:
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].tokens.tolist() == b[name].tokens.tolist(), name
            assert a[name].finish_reason == b[name].finish_reason
            np.testing.assert_allclose(a[name].logprobs, b[name].logprobs, atol=1e-4)

    return check
