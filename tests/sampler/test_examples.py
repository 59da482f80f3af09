"""The examples that `cache` and `attend` draw in their docstrings, computed by the code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.sampler import attend, cache
from grm_jax.sampler.plan import Plan
from grm_jax.sampler.runner import InputBatch
from grm_jax.sampler.schedule import Shape

SHAPE = Shape(lanes=3, pages=3, page=4, readers=3, depth=2)
PLAN = Plan(SHAPE, share=True, oversubscription=1, limit=8, chunk=2, ring=4, bytes=0)
BEGIN = np.asarray([0, 4, 2])  # the step at which each lane's sample begins


def table(module, *labels: str) -> dict[str, list[str]]:
    """The rows of a module's docstring that begin with a label, as lists of words."""
    found = {}
    for line in module.__doc__.splitlines():
        for label in labels:
            if line.strip().startswith(f"{label} "):
                found[label] = line.replace(label, "", 1).split()
    return found


@pytest.fixture(scope="module")
def config(small):
    return small.replace(num_layers=2, sliding_window=8)


@pytest.fixture(scope="module")
def after_six_steps(config) -> tuple[InputBatch, cache.Ring, cache.Stash]:
    """Lane n's token t has the number 10 n + t + 1 as its values; 0 is no token."""
    batch = InputBatch(PLAN, 1)
    ring = cache.empty_ring(config, 1, 3, PLAN.ring)
    stash = cache.empty_stash(config, 1, PLAN.stash_sizes(3)[0], PLAN.chunk)
    shape = (1, 3, config.num_kv_heads, config.head_dim)
    for step in range(6):
        batch.alive[0], batch.limit[0] = step >= BEGIN, PLAN.limit
        if step % PLAN.chunk == 0:
            stash = move_oldest(batch, ring, stash)
        token = np.where(batch.alive[0], 10 * np.arange(3) + batch.counts[0] + 1, 0)
        new = jnp.broadcast_to(token[None, :, None, None], shape).astype(jnp.float32)
        layer = {"k": new, "v": new}
        ring = cache.write_ring(ring, [{slot: layer for slot in config.slots}])
        batch.counts[0] += batch.alive[0]
    return batch, ring, stash


def move_oldest(batch: InputBatch, ring: cache.Ring, stash: cache.Stash) -> cache.Stash:
    full = batch.full_rings()
    if not full.any():
        return stash
    held = batch.counts - batch.stashed
    return cache.stash_oldest(stash, ring, jnp.asarray(held), jnp.asarray(batch.stash(full)))


def names(tokens: np.ndarray) -> list[str]:
    return ["." if t == 0 else f"{'abc'[t // 10]}{t % 10 - 1}" for t in tokens.astype(int)]


def rows(blocks) -> list[list[str]]:
    return [names(np.asarray(row)) for row in blocks[0]["local"]["v"][0, :, 0, :, 0]]


def test_the_drawn_cache(after_six_steps):
    batch, ring, stash = after_six_steps
    lanes = table(cache, "lane 0", "lane 1", "lane 2")
    assert [words[:4] for words in lanes.values()] == rows(ring.blocks)
    blocks = table(cache, "block 0", "block 1", "block 2")
    assert [words[:2] for words in blocks.values()] == rows(stash.blocks)
    assert int(ring.slot) == 2
    # Before the next chunk, a2 a3 go to block 1 and c0 c1 to block 2.
    assert batch.full_rings().tolist() == [[True, False, True]]
    assert batch.owner.tolist() == [[0, -1, -1]]


def test_the_worked_mask(after_six_steps, config, monkeypatch):
    batch, ring, stash = after_six_steps
    batch.stash(batch.full_rings())
    # Page 0 is read by all lanes, page 1 by lanes 0 and 1, page 2 by lane 2.
    layout = attend.Layout(
        start=jnp.asarray([[0, 4, 4]]),
        fill=jnp.asarray([[4, 2, 3]]),
        reader=jnp.asarray([[0, 1, 2, 0, 1, 0, 2, 0, 0]]),
        cell=jnp.asarray([[[0, 3], [1, 4], [2, 6]]]),
        used=jnp.ones((1, 3, 2), bool),
        length=jnp.asarray([[6, 6, 7]]),
        stashed=jnp.asarray(batch.stashed),
        owner=jnp.asarray(batch.owner),
        offset=jnp.asarray(batch.offset),
    )
    pages = cache.empty_pages(config, 1, 3, 4)
    masks = []

    def record(raw: jax.Array, mask: jax.Array | None, **settings) -> tuple[jax.Array, None]:
        masks.append(np.asarray(True if mask is None else mask))
        return jnp.ones_like(raw), None

    monkeypatch.setattr(attend, "soft_weights", record)
    compute = attend.lane_attend(config, layout, jnp.asarray(batch.counts), pages, stash, ring)
    (inputs,) = attend.layer_inputs(pages, stash, ring)
    k = jnp.zeros((1, 3, config.num_kv_heads, config.head_dim))
    q = jnp.zeros((1, 3, config.num_kv_heads, config.queries_per_kv, config.head_dim))
    for kind in config.kinds:
        masks.clear()
        compute(q, k, k, kind, inputs[kind])
        in_page, in_stash, in_ring, itself = masks
        seen = [
            *in_page[0, 0, 0, 0, 0],  # page 0 as its reader 0, which is lane 0
            *in_page[0, 1, 0, 0, 0],
            *in_stash[0, 0, 0, 0],
            *in_stash[0, 1, 0, 0],
            *in_ring[0, 0, 0, 0],
            itself,
        ]
        assert [str(int(x)) for x in seen] == table(attend, kind)[kind], kind
