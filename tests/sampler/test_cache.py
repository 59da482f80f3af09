"""Decoding through pages and rings against the uncached forward pass, logit by logit."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from grm_jax.model import heads, transformer
from grm_jax.sampler import cache, decode
from grm_jax.sampler.attend import Layout, lane_attend, layer_inputs

STEPS = 10


@functools.partial(jax.jit, static_argnums=1)
def row_logits(params, config, tokens, lengths):
    return heads.logits(params, config, transformer.encode(params, config, tokens, lengths))


def uncached(params, config, row: list[int]) -> np.ndarray:
    """Logits [T, V] of a row computed alone."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(row)] = row
    found = row_logits(params, config, tokens, np.asarray([len(row)]))
    return np.asarray(found[0, : len(row)])


PAGE = 4
# Pages in no order; the second prompt (two pages) begins with a page of the third (four pages).
PLACES = {"short": (5,), "window": (2, 0), "long": (3, 6, 1, 4)}
PAGES, DEPTH = 7, 4


@functools.partial(jax.jit, static_argnums=1)
def compute(params, config, pages, tokens, start, fill, earlier, targets):
    return decode.compute_pages(params, config, pages, tokens, start, fill, earlier, targets)


@functools.partial(jax.jit, static_argnums=1)
def one_step(params, config, pages, layout, stash, ring, tokens, counts):
    attend = lane_attend(config, layout, counts, pages, stash, ring)
    inputs = layer_inputs(pages, stash, ring)
    hidden, new = transformer.forward(
        params, config, tokens, layout.length + counts, attend, inputs
    )
    return heads.logits(params, config, hidden), cache.write_ring(ring, new)


def stored(params, config, prompts):
    """All prompts in pages: computed a page at a time, in one shard."""
    pages = cache.empty_pages(config, 1, PAGES, PAGE)
    for name, places in PLACES.items():
        for m, place in enumerate(places):
            piece = prompts[name][m * PAGE : (m + 1) * PAGE]
            tokens = np.zeros((1, 2, PAGE), np.int32)
            tokens[0, 0, : len(piece)] = piece
            earlier = np.full((1, 2, DEPTH), 6, np.int32)
            earlier[0, 0, DEPTH - m :] = places[:m]
            pages = compute(
                params, config, pages, tokens, np.full((1, 2), m * PAGE, np.int32),
                np.asarray([[len(piece), 0]], np.int32), earlier if m else earlier[..., :0],
                np.asarray([[place, PAGES]], np.int32),  # the second row is none: dropped
            )  # fmt: skip
    return pages


def layout_of(prompts, lanes: list[str], readers: int) -> Layout:
    """Lanes that read the named prompts; the readers of a page are numbered as they come."""
    start, fill = np.zeros((1, PAGES), np.int32), np.zeros((1, PAGES), np.int32)
    for name, places in PLACES.items():
        for m, place in enumerate(places):
            start[0, place] = m * PAGE
            fill[0, place] = len(prompts[name][m * PAGE : (m + 1) * PAGE])
    reader = np.zeros((1, PAGES * readers), np.int32)
    cell = np.zeros((1, len(lanes), DEPTH), np.int32)
    used = np.zeros((1, len(lanes), DEPTH), bool)
    taken = dict.fromkeys(range(PAGES), 0)
    for lane, name in enumerate(lanes):
        for m, place in enumerate(PLACES[name]):
            cell[0, lane, m] = place * readers + taken[place]
            used[0, lane, m] = True
            reader[0, place * readers + taken[place]] = lane
            taken[place] += 1
    length = np.asarray([[len(prompts[name]) for name in lanes]], np.int32)
    stashed = np.zeros((1, len(lanes)), np.int32)
    nobody = np.zeros((1, 0), np.int32)
    return Layout(start, fill, reader, cell, used, length, stashed, nobody, nobody)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("capacity, block", [(STEPS, 1), (4, 2), (3, 1)], ids=str)
def test_cached_logits_are_those_of_the_uncached_forward(
    small, small_params, prompts, capacity, block
):
    """Lanes that read one page each, or several; two that read the same; a ring that is too small,
    so that older tokens move to the stash, whose blocks are taken in turn."""
    rng = np.random.default_rng(1)
    readers = ["long", "short", "window", "long"]
    drawn = rng.integers(4, small.vocab_size, (len(readers), STEPS)).astype(np.int32)
    pages = stored(small_params, small, prompts)
    layout = layout_of(prompts, readers, readers=3)
    ring = cache.empty_ring(small, 1, len(readers), capacity)
    blocks = -(-(STEPS - capacity) // block) * len(readers)
    stash = cache.empty_stash(small, 1, blocks, block)
    order = iter(rng.permutation(blocks).tolist())
    layout = layout.replace(  # pyright: ignore[reportAttributeAccessIssue]
        owner=np.full((1, blocks), -1, np.int32), offset=np.zeros((1, blocks), np.int32)
    )
    found = []
    for step in range(STEPS):
        counts = np.full((1, len(readers)), step, np.int32)
        held = counts - layout.stashed
        if held.max() == capacity:
            targets = np.asarray([[next(order) for _ in readers]])
            stash = cache.stash_oldest(stash, ring, held, targets)
            layout.owner[0, targets[0]] = np.arange(len(readers))
            layout.offset[0, targets[0]] = layout.stashed[0]
            layout.stashed[...] += block
        given = pages, layout, stash, ring, drawn[None, :, step], counts
        z, ring = one_step(small_params, small, *given)
        found.append(np.asarray(z[0]))
    assert next(order, None) is None
    z = np.stack(found, axis=1)
    for lane, name in enumerate(readers):
        whole = uncached(small_params, small, [*prompts[name], *drawn[lane].tolist()])
        np.testing.assert_allclose(z[lane], whole[len(prompts[name]) :], atol=2e-5)


def test_the_last_state_of_a_page_is_the_prompts(small, small_params, prompts):
    pages = stored(small_params, small, prompts)
    for name, places in PLACES.items():
        state = heads.logits(small_params, small, pages.last[0, places[-1]])
        expected = uncached(small_params, small, list(prompts[name]))[-1]
        np.testing.assert_allclose(state, expected, atol=2e-5)


def test_window_and_global_layers_both_matter(small, small_params):
    """What the comparison above rests on: the window reaches into the logits."""
    row = list(range(4, 24))
    near = uncached(small_params, small.replace(sliding_window=3), row)
    assert np.abs(near - uncached(small_params, small, row))[10:].max() > 0.1
