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


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)], ids=str)
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
