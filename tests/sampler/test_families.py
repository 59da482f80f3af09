"""Sampling with the families beside Gemma-2: the trainer's log-probabilities, in every layout; with
local layers of a short window and few global ones, the same tokens in every shape and on meshes."""

from __future__ import annotations

import dataclasses

import family_models
import jax
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate, collate_groups
from grm_jax.model.batch import completion_logprobs, group_logprobs
from grm_jax.model.lora import adapter_table, attach
from grm_jax.model.options import LoRAConfig
from grm_jax.model.params import init_params, param_table
from grm_jax.model.storage import param_shardings
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request

SETTINGS = SamplingConfig(max_new_tokens=11)
NEVER = 1000  # no token
# A 5:1 pattern with a remainder and a window shorter than the prompts; GQA, an untied head and
# scaled rotary embeddings; biases.
FAMILIES = ("gemma3_text", "llama", "qwen2")


@pytest.fixture(scope="module", params=FAMILIES)
def config(request):
    config = family_models.CONFIGS[request.param]
    # One block and a remainder are enough.
    return config.replace(num_layers=8 if request.param == "gemma3_text" else 2, vocab_size=40)


@pytest.fixture(scope="module")
def weights(config, make_params):
    return make_params(config, 0)


@pytest.fixture(scope="module")
def draw(config, prompts, one_device, base_engine):
    """(weights, requests, mesh, wanted, **engine) -> samples by (id, index)."""
    usual = [Request(name, prompt, (0, 1, 2)) for name, prompt in prompts.items()]

    def run(weights, requests=usual, mesh=one_device, wanted=None, **changes):
        engine = dataclasses.replace(base_engine, **changes)
        sampler = Sampler(config, [NEVER], engine, mesh)
        samples = sampler.sample(
            weights, requests, SETTINGS, jax.random.key(0),
            **({} if wanted is None else {"wanted": wanted(sampler)}),
        )  # fmt: skip
        return {(s.example_id, s.index): s for s in samples}

    return run


def trainers(weights, config, prompts, samples) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's log-probabilities [samples, 11]: of rows, and of groups that share prompts."""
    names = sorted(samples)
    rows = [Example(tuple(prompts[n]), tuple(samples[n, i].tokens.tolist())) for n, i in names]
    batch = collate(rows, length=24, completion=11)
    how = {"temperature": 1.0, "remat": "none", "chunk": 64}
    alone, _ = jax.jit(lambda w, b: completion_logprobs(w, config, b, **how))(weights, batch)
    groups = [[list(samples[n, i].tokens) for i in range(3)] for n in sorted(prompts)]
    batch = collate_groups(
        [list(prompts[n]) for n in sorted(prompts)], groups, length=16, completion=11
    )
    together, _ = jax.jit(lambda w, b: group_logprobs(w, config, b, **how))(weights, batch)
    return np.asarray(alone), np.asarray(together).reshape(-1, 11)


def test_the_samplers_logprobs_are_the_trainers(config, weights, draw, prompts):
    """Through pages, rings and the stash, whether prompts are shared or not."""
    samples = draw(weights)
    found = np.stack([samples[name].logprobs for name in sorted(samples)])
    for wanted in trainers(weights, config, prompts, samples):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    apart = draw(weights, share=False)
    for name, sample in samples.items():
        assert sample.tokens.tolist() == apart[name].tokens.tolist()


five_to_one = pytest.mark.parametrize("config", ["gemma3_text"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def usual(weights, draw):
    return draw(weights)


@five_to_one
@pytest.mark.parametrize(
    "changes",
    [{"refill": False, "max_rows": 4}, {"max_rows": 4, "chunk": 2}, {"page": 4}],
    ids=str,
)
def test_shapes_do_not_change_tokens(changes, weights, usual, draw, same_samples):
    same_samples(usual, draw(weights, **changes))


@five_to_one
def test_a_shared_prompt_is_a_repeated_prompt(weights, usual, draw, prompts, same_samples):
    single = [Request(name, prompt, (i,)) for name, prompt in prompts.items() for i in range(3)]
    same_samples(usual, draw(weights, single))


@five_to_one
def test_what_is_not_wanted_is_not_drawn(weights, usual, draw, same_samples):
    found = draw(weights, max_rows=2, wanted=lambda sampler: lambda r: sampler.stats.samples < 3)
    assert 3 <= len(found) < 9
    same_samples(found, {name: usual[name] for name in found})


@five_to_one
@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_same_tokens_on_a_mesh(shape, config, weights, usual, draw, mesh_of, same_samples):
    """In chunks of 2, so that older tokens move to the stash."""
    mesh = mesh_of(*shape)
    split = jax.device_put(weights, param_shardings(param_table(config), mesh))
    same_samples(usual, draw(split, mesh=mesh, chunk=2))


def test_adapters_and_8_bit_weights(config, weights, draw, prompts):
    """LoRA's adapters stay beside the weights of every layer; 8-bit matrices change little."""
    table, lora = param_table(config), LoRAConfig(rank=2)
    rows = adapter_table(table, lora)
    slots = {row.path[:2] for row in rows}
    assert slots == {("blocks", s) for s in config.slots} | {("rest", s) for s in config.rest}
    adapters = jax.tree.map(lambda x: x + 0.1, init_params(rows, jax.random.key(1), "float32"))
    adapted = attach(weights, adapters, table, lora.scale)
    samples = draw(adapted)
    found = np.stack([samples[name].logprobs for name in sorted(samples)])
    exact = trainers(adapted, config, prompts, samples)[0]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)  # up to 1.2e-4 on some CPUs
    rounded = draw(weights, int8_weights=True)
    exact = trainers(weights, config, prompts, rounded)[0]
    found = np.stack([rounded[name].logprobs for name in sorted(rounded)])
    assert 1e-5 < np.abs(found - exact).max() < 1.0
