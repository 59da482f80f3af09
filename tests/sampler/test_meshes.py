"""Four devices draw the same tokens as one, however parameters and prompts are split."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from grm_jax.model.params import param_table
from grm_jax.model.storage import param_shardings
from grm_jax.sampler.schedule import Request


@pytest.fixture(scope="module")
def requests(prompts) -> list[Request]:
    return [Request(name, prompt, (0, 1, 2)) for name, prompt in prompts.items()]


@pytest.fixture(scope="module")
def alone(requests, draw_samples):
    return draw_samples(requests)


@pytest.mark.parametrize(
    "shape", [pytest.param((2, 2, 1), marks=pytest.mark.slow), (1, 2, 2)], ids=str
)
def test_same_tokens_on_a_mesh(
    shape,
    model,
    params,
    requests,
    alone,
    mesh_of,
    base_engine,
    make_sampler,
    draw_samples,
    same_samples,
):
    """In chunks of 6, and of 2, with which older tokens move to the stash."""
    mesh = mesh_of(*shape)
    weights = jax.device_put(params, param_shardings(param_table(model), mesh))
    split = any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(weights))
    assert split == (shape[1] * shape[2] > 1)
    for chunk in (6, 2):
        engine = dataclasses.replace(base_engine, chunk=chunk)
        sampler = make_sampler(engine=engine, mesh=mesh)
        same_samples(alone, draw_samples(requests, sampler=sampler, weights=weights))


def test_a_session_on_a_mesh(
    model, params, requests, alone, mesh_of, base_engine, make_sampler, same_samples
):
    """Repeatable there too: the same bits for requests that come one by one, or all at once."""
    mesh = mesh_of(2, 1, 2)
    weights = jax.device_put(params, param_shardings(param_table(model), mesh))
    sampler = make_sampler(engine=dataclasses.replace(base_engine, chunk=2), mesh=mesh)
    session = sampler.open(
        weights,
        longest_prompt=16,
        max_new_tokens=11,
        samples=8,
        readers=2,
        key=jax.random.key(0),
        repeatable=True,
    )
    assert session.plan.shape.lanes == 4
    one_by_one, together = {}, {}
    for request in requests:
        session.add(request)
        while not session.idle:
            one_by_one |= {(s.example_id, s.index): s for s in session.step()}
    same_samples(alone, one_by_one)
    for request in reversed(requests):
        session.add(request)
    while not session.idle:
        together |= {(s.example_id, s.index): s for s in session.step()}
    same_samples(alone, together)
    for name, sample in one_by_one.items():
        assert sample.logprobs.tobytes() == together[name].logprobs.tobytes()
