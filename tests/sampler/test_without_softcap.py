"""Sampling with a model whose scores are not capped and reach hundreds: the trainer's numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate, collate_groups
from grm_jax.model.batch import completion_logprobs, group_logprobs
from grm_jax.model.params import param_table
from grm_jax.model.storage import param_shardings
from grm_jax.model.transformer import forward, self_attend
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request

SETTINGS = SamplingConfig(max_new_tokens=11)
NEVER = 1000  # no token


@pytest.fixture(scope="module")
def uncapped(model):
    return model.replace(attn_softcap=None, query_pre_attn_scalar=0.01)


@pytest.fixture(scope="module")
def asked(prompts) -> list[Request]:
    return [Request(name, prompt, (0, 1, 2)) for name, prompt in prompts.items()]


@pytest.fixture(scope="module")
def draw(uncapped, params, one_device, base_engine):
    """(requests, mesh, weights, dtype, **engine) -> samples by (id, index)."""

    def run(requests, *, mesh=None, weights=None, dtype="float32", wanted=None, **changes):
        config = uncapped.replace(compute_dtype=dtype)
        engine = dataclasses.replace(base_engine, **changes)
        sampler = Sampler(config, [NEVER], engine, mesh or one_device)
        samples = sampler.sample(
            params if weights is None else weights, requests, SETTINGS, jax.random.key(0),
            **({} if wanted is None else {"wanted": wanted(sampler)}),
        )  # fmt: skip
        return {(s.example_id, s.index): s for s in samples}

    return run


@pytest.fixture(scope="module")
def usual(asked, draw):
    return draw(asked)


@pytest.fixture(scope="module")
def trainers(uncapped, params, prompts):
    """(samples, dtype, backend) -> the trainer's log-probabilities [samples, 11]."""

    @functools.partial(jax.jit, static_argnums=1)
    def compute(batch, config):
        return completion_logprobs(
            params, config, batch, temperature=1.0, remat="none", chunk=1024
        )[0]

    def run(samples, dtype="float32", backend="chunked") -> np.ndarray:
        config = uncapped.replace(compute_dtype=dtype, attention=backend)
        rows = [Example(prompts[s.example_id], tuple(s.tokens.tolist())) for s in samples]
        return np.asarray(compute(collate(rows, length=32, completion=11), config))

    return run


def test_the_scores_reach_hundreds(uncapped, params, prompts):
    tokens = jnp.asarray([prompts["long"]])
    positions = jnp.arange(tokens.shape[1])[None]
    attend = self_attend(uncapped, positions)

    def largest(q, k, v, kind, layer_input):
        raw = jnp.einsum("btkgh,bskh->bkgts", q, k)
        return attend(q, k, v, kind, layer_input)[0], jnp.max(jnp.abs(raw))

    _, found = forward(params, uncapped, tokens, positions, largest)
    assert min(jax.tree.leaves(found)) > 200


@pytest.mark.parametrize("chunk", [6, 2], ids=["ring", "stash"])
def test_logprobs_are_the_trainers(chunk, asked, draw, trainers):
    samples = list(draw(asked, chunk=chunk).values())
    found = np.stack([s.logprobs for s in samples])
    np.testing.assert_allclose(found, trainers(samples), atol=3e-4)
    np.testing.assert_allclose(found, trainers(samples, backend="reference"), atol=3e-4)


@pytest.mark.parametrize("chunk", [6, 2], ids=["ring", "stash"])
def test_in_bfloat16_logprobs_are_the_trainers(chunk, asked, draw, trainers):
    samples = list(draw(asked, chunk=chunk, dtype="bfloat16").values())
    expected = trainers(samples, "bfloat16")
    np.testing.assert_allclose(np.stack([s.logprobs for s in samples]), expected, atol=1e-5)
    assert np.abs(expected - trainers(samples)).max() > 0.01  # it was bfloat16


def test_completions_beside_one_prompt_have_the_same_logprobs(
    usual, uncapped, params, prompts, trainers
):
    groups = [[tuple(usual[name, i].tokens.tolist()) for i in range(3)] for name in prompts]
    batch = collate_groups(list(prompts.values()), groups, length=16, completion=11)
    found, _ = group_logprobs(params, uncapped, batch, temperature=1.0, remat="none", chunk=1024)
    samples = [usual[name, i] for name in prompts for i in range(3)]
    np.testing.assert_allclose(found.reshape(9, 11), trainers(samples), atol=3e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_rows": 4, "chunk": 2}, {"refill": False, "max_rows": 4}, {"page": 4},
        {"share": False}, {"chunk": 2, "min_lanes": 1},
    ],
    ids=str,
)  # fmt: skip
def test_shapes_do_not_change_tokens(changes, asked, usual, draw, same_samples):
    same_samples(usual, draw(asked, **changes))


def test_a_shared_prompt_is_a_repeated_prompt(prompts, usual, draw, same_samples):
    single = [Request(name, prompt, (i,)) for name, prompt in prompts.items() for i in range(3)]
    same_samples(usual, draw(single))


def test_what_is_not_wanted_is_not_drawn(asked, usual, draw, same_samples):
    """Adaptive k: an example's samples that have not begun are dropped."""
    found = draw(asked, max_rows=2, wanted=lambda sampler: lambda r: sampler.stats.samples < 3)
    assert 3 <= len(found) < 9
    same_samples(found, {name: usual[name] for name in found})


def test_8_bit_caches_stay_near(asked, draw, trainers):
    """The typical log-probability: scores of hundreds move by whole units, and some tokens' with
    them."""
    samples = list(draw(asked, chunk=2, int8_cache=True).values())
    gaps = np.abs(np.stack([s.logprobs for s in samples]) - trainers(samples))
    assert 1e-4 < np.median(gaps) < 0.3


def test_a_repeatable_session_gives_the_same_bits_in_a_crowd(
    uncapped, params, asked, usual, one_device, base_engine, same_samples
):
    engine = dataclasses.replace(base_engine, chunk=2)
    session = Sampler(uncapped, [NEVER], engine, one_device).open(
        params, longest_prompt=16, max_new_tokens=11, samples=9, readers=3,
        key=jax.random.key(0), repeatable=True,
    )  # fmt: skip
    alone, crowd = {}, {}
    for request in asked:
        session.add(request, SETTINGS)
        while not session.idle:
            alone |= {(s.example_id, s.index): s for s in session.step()}
    for request in reversed(asked):
        session.add(request, SETTINGS)
    while not session.idle:
        crowd |= {(s.example_id, s.index): s for s in session.step()}
    same_samples(usual, alone)
    for name, sample in alone.items():
        assert sample.tokens.tolist() == crowd[name].tokens.tolist()
        assert sample.logprobs.tobytes() == crowd[name].logprobs.tobytes()


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_same_tokens_on_a_mesh(shape, uncapped, params, asked, usual, mesh_of, draw, same_samples):
    mesh = mesh_of(*shape)
    weights = jax.device_put(params, param_shardings(param_table(uncapped), mesh))
    same_samples(usual, draw(asked, mesh=mesh, weights=weights, chunk=2))
