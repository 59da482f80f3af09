"""Samples drawn on a GPU: their log-probabilities are the trainer's, and their bits their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.batch import completion_logprobs
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.plan import free_bytes
from grm_jax.sampler.schedule import Request

pytestmark = pytest.mark.gpu

NEW = 40  # more than the window


@pytest.fixture(scope="module")
def engine(page) -> EngineConfig:
    return EngineConfig(max_rows=16, page=page, prefill_tokens=128, chunk=8, min_lanes=4)


def requests(model, count=3, samples=4):
    rng = np.random.default_rng(0)
    return [
        Request(
            f"{i}", tuple(rng.integers(4, model.vocab_size, 20 + 17 * i)), tuple(range(samples))
        )
        for i in range(count)
    ]


def trainer_logprobs(params, model, asked, samples):
    """The log-probabilities that the trainer computes for the tokens of the samples."""
    prompts = {request.example_id: request.prompt for request in asked}
    rows = np.zeros((len(samples), 128), np.int32)
    starts = np.array([len(prompts[s.example_id]) for s in samples], np.int32)
    for row, sample, start in zip(rows, samples, starts, strict=True):
        row[:start] = prompts[sample.example_id]
        row[start : start + NEW] = sample.tokens
    batch = {
        "tokens": rows,
        "lengths": starts + NEW,
        "starts": starts,
        "targets": np.stack([s.tokens for s in samples]).astype(np.int32),
    }
    compute = jax.jit(
        lambda params, batch: completion_logprobs(
            params, model, batch, temperature=1.0, remat="none", chunk=4096
        )[0]
    )
    return np.asarray(compute(params, batch))


@pytest.mark.parametrize("dtype, bound", [("float32", 2e-3), ("bfloat16", 0.1)])
def test_log_probabilities_are_the_trainers(dtype, bound, model, params, mesh, engine):
    config = model.replace(compute_dtype=dtype)
    asked = requests(model)
    precision = "highest" if dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        sampler = Sampler(config, [model.vocab_size + 1], engine, mesh)
        settings = SamplingConfig(max_new_tokens=NEW)
        samples = list(sampler.sample(params, asked, settings, jax.random.key(0)))
        expected = trainer_logprobs(params, config, asked, samples)
    drawn = np.stack([sample.logprobs for sample in samples])
    assert len(samples) == 12 and drawn.shape == expected.shape
    assert np.abs(drawn - expected).max() < bound
    assert len({tuple(sample.tokens) for sample in samples}) == 12


def test_8_bit_weights_are_near(model, params, mesh, engine):
    """A greedy token's log-probability moves by little; on a GPU they have kernels of their own."""
    found = []
    for int8 in (False, True):
        config = dataclasses.replace(engine, int8_weights=int8)
        sampler = Sampler(model, [model.vocab_size + 1], config, mesh)
        settings = SamplingConfig(temperature=0.0, max_new_tokens=1)
        asked = requests(model, samples=1)
        drawn = sampler.sample(params, asked, settings, jax.random.key(0))
        found.append({s.example_id: float(s.logprobs[0]) for s in drawn})
    assert all(abs(found[0][name] - found[1][name]) < 0.3 for name in found[0])


def test_a_sample_has_the_same_bits_alone_and_among_others(model, params, mesh, engine):
    asked = requests(model, count=4)
    settings = SamplingConfig(max_new_tokens=NEW)

    sampler = Sampler(model, [model.vocab_size + 1], engine, mesh)

    def drawn(some):
        session = sampler.open(
            params, longest_prompt=96, max_new_tokens=NEW, samples=16, key=jax.random.key(0),
            repeatable=True,
        )  # fmt: skip
        for request in some:
            session.add(request, settings)
        found = {}
        while not session.idle:
            for s in session.step():
                found[s.example_id, s.index] = s.tokens.tobytes() + s.logprobs.tobytes()
        return found

    together, alone = drawn(asked), drawn(asked[1:2])
    assert len(together) == 16 and len(alone) == 4
    assert all(together[name] == bits for name, bits in alone.items())


def test_caches_stay_within_the_free_memory(model, params, mesh, engine, real_gpu):
    free = free_bytes(mesh)
    assert free is not None and 0 < free < real_gpu.memory_stats()["bytes_limit"]
    sampler = Sampler(model, [model.vocab_size + 1], engine, mesh)
    settings = SamplingConfig(max_new_tokens=8)
    assert len(list(sampler.sample(params, requests(model), settings, jax.random.key(0)))) == 12
    assert 0 < sampler.stats.cache_bytes < free


def test_the_weights_that_are_taken_are_deleted(model, params, mesh, engine):
    """Memory does not hold them twice."""
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    sampler = Sampler(model, [model.vocab_size + 1], engine, mesh)
    taken = sampler.take(half)
    kept = {id(leaf) for leaf in jax.tree.leaves(taken)}
    assert all(w.is_deleted() or id(w) in kept for w in jax.tree.leaves(half))
    assert any(w.is_deleted() for w in jax.tree.leaves(half))
