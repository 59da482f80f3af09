"""Decoding weights: what is shared with the parameters, what is copied, what is deleted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.linear import FEW, OutMajor
from grm_jax.model.lora import adapter_table, attach
from grm_jax.model.options import LoRAConfig
from grm_jax.model.params import init_params, param_table
from grm_jax.model.storage import param_shardings
from grm_jax.sampler.options import EngineConfig
from grm_jax.sampler.plan import cache_room, decode_weight_bytes
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.schedule import Request
from grm_jax.sampler.weights import INPUTS, decode_weights, laid_out, take

MANY = FEW + 1  # lanes, for which no matrix is turned


def buffers(tree) -> dict[int, int]:
    """Bytes of each buffer, by its address."""
    return {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        if not leaf.is_deleted()
        for shard in leaf.addressable_shards
    }


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture
def config(model):
    return model.replace(compute_dtype="bfloat16")


@pytest.fixture
def half(params):
    """Parameters in the compute dtype, of a test's own."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)


def test_what_is_in_the_layout_already_is_shared(config, half, one_device):
    weights = decode_weights(Programs(one_device), config, half, MANY)
    shared = buffers(half).keys() & buffers(weights).keys()
    assert shared == buffers([half["embed"], half["final_norm"]]).keys()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(half))


def test_masters_of_another_dtype_are_not_shared(config, params, one_device):
    weights = decode_weights(Programs(one_device), config, params, MANY)
    shared = buffers(params).keys() & buffers(weights).keys()
    assert shared == buffers(params["final_norm"]).keys(), "norms are read in float32"
    assert weights["embed"].dtype == jnp.bfloat16


def test_taken_parameters_are_held_once(config, half, one_device):
    """Bytes: without `take` nearly two copies while sampling; with it one."""
    programs = Programs(one_device)
    one = sum(buffers(half).values())
    embed = buffers([half["embed"], half["final_norm"]])
    expected = decode_weights(programs, config, half, MANY)
    both = buffers([half, expected])
    assert sum(both.values()) == 2 * one - sum(embed.values())
    taken = take(programs, config, half)
    assert laid_out(taken) and not laid_out(half)
    assert buffers(half) == embed, "all others are deleted"
    assert sum(buffers([half, taken]).values()) == one
    jax.tree.map(np.testing.assert_array_equal, taken, expected)
    again = decode_weights(programs, config, taken, MANY)
    assert buffers([half, taken, again]) == buffers(taken)
    assert take(programs, config, taken) is taken


def test_only_matrices_are_turned(config, half, one_device):
    """A CPU multiplies few rows by copies of the matrices; the rest is shared."""
    programs = Programs(one_device)
    expected = decode_weights(programs, config, half, 1)
    taken = take(programs, config, half)
    found = decode_weights(programs, config, taken, 1)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    matrices = [found["blocks"][0][kind][name] for kind in config.slots for name in INPUTS]
    assert all(isinstance(w, OutMajor) for w in matrices)
    assert buffers(found).keys() - buffers(taken).keys() == buffers(matrices).keys()
    assert found["head"].matrix is taken["embed"]


@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("form", ["int8", "adapters"])
def test_taken_or_not_the_weights_are_the_same(form, rows, config, half, one_device):
    programs, int8 = Programs(one_device), form == "int8"
    if form == "adapters":
        table, lora = param_table(config), LoRAConfig(rank=2)
        adapters = init_params(adapter_table(table, lora), jax.random.key(1), "float32")
        half = attach(half, adapters, table, lora.scale)
    expected = decode_weights(programs, config, half, rows, int8=int8)
    taken = take(programs, config, copied(half), int8=int8)
    found = decode_weights(programs, config, taken, rows, int8=int8)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if int8:
        assert buffers(found) == buffers(taken)


def test_split_parameters_are_gathered_and_deleted(model, params, mesh_of):
    """Split over data axes nothing has decoding's layout but the norms, which nothing splits."""
    mesh = mesh_of(1, 2, 2)
    given = jax.device_put(copied(params), param_shardings(param_table(model), mesh))
    programs = Programs(mesh)
    expected = decode_weights(programs, model, given, MANY)
    taken = take(programs, model, given)
    jax.tree.map(np.testing.assert_array_equal, taken, expected)
    for found, wanted in zip(jax.tree.leaves(taken), jax.tree.leaves(expected), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
    assert [leaf.is_deleted() for leaf in jax.tree.leaves(given)].count(False) == 1
    assert not given["final_norm"].is_deleted()


def test_samples_of_taken_parameters_are_the_same(
    prompts, params, make_sampler, draw_samples, same_samples
):
    requests = [Request(name, prompt, (0, 1, 2)) for name, prompt in prompts.items()]
    sampler = make_sampler()
    usual = draw_samples(requests, sampler=sampler)
    taken = sampler.take(copied(params))
    same_samples(usual, draw_samples(requests, sampler=sampler, weights=taken))
    same_samples(usual, draw_samples(requests, sampler=sampler))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_weights_that_are_there_are_not_planned_again(small, one_device):
    engine = EngineConfig(max_rows=8, page=8, prefill_tokens=32)
    rooms = [
        cache_room(small, engine, one_device, 100, 1e9, laid_out=there) for there in (False, True)
    ]
    assert rooms[1] - rooms[0] == decode_weight_bytes(small, one_device)
