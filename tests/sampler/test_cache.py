"""Decoding through prompt and suffix caches against the uncached forward pass, logit by logit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import gemma2, heads
from grm_jax.sampler import cache

PROMPT_SLOTS = 16
STEPS = 10


@functools.partial(jax.jit, static_argnums=1)
def row_logits(params, config, tokens, lengths):
    return heads.logits(params, config, gemma2.encode(params, config, tokens, lengths))


def uncached(params, config, row: list[int]) -> np.ndarray:
    """Logits [T, V] of a row computed alone."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(row)] = row
    found = row_logits(params, config, tokens, np.asarray([len(row)]))
    return np.asarray(found[0, : len(row)])


@functools.partial(jax.jit, static_argnums=1)
def prefill(params, config, tokens, lengths):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = cache.prefill_attend(config, positions, positions < lengths[:, None])
    _, layers = gemma2.forward(params, config, tokens, positions, attend)
    return cache.prompt_cache(config, layers, lengths)


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, prompt, suffix, last, slot):
    here = prompt.lengths[:, None] + slot + jnp.zeros_like(last)
    attend = cache.decode_attend(config, prompt.lengths, here, slot, prompt.slots, suffix.capacity)
    inputs = cache.layer_inputs(prompt, suffix)
    hidden, new = gemma2.forward(params, config, last, here, attend, inputs)
    return heads.logits(params, config, hidden), cache.write_suffix(suffix, new, slot)


def cached(params, config, prompts, suffixes: np.ndarray, capacities: list[int]) -> np.ndarray:
    """Logits [P, R, STEPS, V] after each suffix token, through caches that grow as listed."""
    lengths = jnp.asarray([len(p) for p in prompts])
    tokens = np.zeros((len(prompts), PROMPT_SLOTS), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    prompt = prefill(params, config, tokens, lengths)
    assert prompt.slots == PROMPT_SLOTS
    capacities = list(capacities)
    suffix = cache.empty_suffix(config, *suffixes.shape[:2], capacities.pop(0))

    found = []
    for slot in range(STEPS):
        if slot == suffix.capacity:
            suffix = cache.grow_suffix(suffix, capacities.pop(0))
        z, suffix = decode(params, config, prompt, suffix, suffixes[:, :, slot], np.int32(slot))
        found.append(np.asarray(z))
    assert not capacities
    return np.stack(found, axis=2)


@pytest.mark.parametrize("capacities", [[STEPS], [3, 5, 9, 12]], ids=["whole", "growing"])
def test_cached_logits_are_those_of_the_uncached_forward(small, small_params, prompts, capacities):
    rng = np.random.default_rng(1)
    some = list(prompts.values())
    suffixes = rng.integers(4, small.vocab_size, (len(some), 2, STEPS)).astype(np.int32)
    z = cached(small_params, small, some, suffixes, capacities)
    for p, prompt in enumerate(some):
        for r in range(2):
            whole = uncached(small_params, small, [*prompt, *suffixes[p, r].tolist()])
            np.testing.assert_allclose(z[p, r], whole[len(prompt) :], atol=2e-5)


def test_window_and_global_layers_both_matter(small, small_params):
    """What the comparison above rests on: the window reaches into the logits."""
    row = list(range(4, 24))
    near = uncached(small_params, small.replace(sliding_window=3), row)
    assert np.abs(near - uncached(small_params, small, row))[10:].max() > 0.1
