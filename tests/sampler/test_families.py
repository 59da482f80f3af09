"""Sampling with the families beside Gemma-2: the trainer's log-probabilities, in every layout."""

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
    """(weights, **engine) -> samples by (id, index)."""
    asked = [Request(name, prompt, (0, 1, 2)) for name, prompt in prompts.items()]

    def run(weights, **changes):
        engine = dataclasses.replace(base_engine, **changes)
        samples = Sampler(config, [NEVER], engine, one_device).sample(
            weights, asked, SETTINGS, jax.random.key(0)
        )
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
    np.testing.assert_allclose(found, trainers(adapted, config, prompts, samples)[0], atol=1e-4)
    rounded = draw(weights, int8_weights=True)
    exact = trainers(weights, config, prompts, rounded)[0]
    found = np.stack([rounded[name].logprobs for name in sorted(rounded)])
    assert 1e-5 < np.abs(found - exact).max() < 1.0
