"""Sampling in bfloat16 with several of everything at once: prompts, pages, heads, samples.

XLA's CPU compiler has no program for some products in bfloat16, depending on which dimensions are
larger than one.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate
from grm_jax.model.batch import completion_logprobs
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request

LENGTHS = (21, 30, 13, 27)  # in tokens; a page has 8


@pytest.fixture(scope="module")
def half(model):
    assert model.num_kv_heads > 1
    return model.replace(compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def asked(half) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(4, half.vocab_size, n).tolist()) for n in LENGTHS]
    return [Request(str(i), prompt, (0, 1, 2)) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("changes", [{}, {"share": False}, {"int8_cache": True}], ids=str)
def test_of_several_prompts_of_several_pages(changes, half, params, asked, one_device, base_engine):
    engine = dataclasses.replace(base_engine, chunk=2, **changes)
    sampler = Sampler(half, [half.vocab_size], engine, one_device)
    settings = SamplingConfig(max_new_tokens=5)
    found = list(sampler.sample(params, asked, settings, jax.random.key(0)))
    assert len(found) == 3 * len(asked)
    if "int8_cache" in changes:
        return
    by_id = {request.example_id: request for request in asked}
    rows = [Example(by_id[s.example_id].prompt, tuple(s.tokens.tolist())) for s in found]
    batch = collate(rows, length=40, completion=5)
    compute = jax.jit(
        lambda batch: completion_logprobs(
            params, half, batch, temperature=1.0, remat="none", chunk=1024
        )[0]
    )
    expected = np.asarray(compute(batch))
    for sample, row in zip(found, expected, strict=True):
        # Sums of float32 in another order now and then round to the next bfloat16 number.
        np.testing.assert_allclose(sample.logprobs, row[: len(sample.tokens)], atol=0.02)


def test_in_a_repeatable_session(half, params, asked, one_device, base_engine):
    sampler = Sampler(half, [half.vocab_size], base_engine, one_device)
    session = sampler.open(
        params, longest_prompt=32, max_new_tokens=5, samples=9, key=jax.random.key(0),
        repeatable=True,
    )  # fmt: skip
    for request in asked:
        session.add(request, SamplingConfig(max_new_tokens=5))
    found = []
    while not session.idle:
        found += session.step()
    assert len(found) == 3 * len(asked)
