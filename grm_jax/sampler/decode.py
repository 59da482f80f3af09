"""The jitted part of sampling: computing pages of prompts, and a chunk of decode steps.

Everything these functions read is an argument or a hashable static, so a program never runs with
another call's stop ids or seed.

Randomness belongs to a sample, not to a lane: token t of a sample is drawn with
`fold_in(sample_key, t)`, whatever runs beside it.

Dimensions: D data-parallel shards, N lanes, P pages, S page slots, A pages computed at once, M
pages of a prompt, C steps of a chunk, V vocabulary, E embed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import forward
from grm_jax.model.heads import logits
from grm_jax.model.params import Params
from grm_jax.sampler import cache
from grm_jax.sampler.attend import Layout, lane_attend, layer_inputs, page_attend
from grm_jax.sampler.draw import Filters, draw


class Lanes(flax.struct.PyTreeNode):
    """What stays on the device between chunks.

    Attributes:
      ring: keys and values of the newest tokens.
      hidden: [D, N, E] final state from which a lane's next token is drawn.
    """

    ring: cache.Ring
    hidden: jax.Array


@flax.struct.dataclass
class Work:
    """What a chunk has to do, made by the host.

    Attributes:
      layout: who reads which page.
      page: [D, N] the page that a lane which begins takes its first state from, -1 for the others.
      names: [D, N, 3] uint32, example id and sample index: what a sample's key is made of.
      counts: [D, N] tokens drawn. alive: [D, N] lanes with a sample.
    """

    layout: Layout
    page: jax.Array
    names: jax.Array
    counts: jax.Array
    alive: jax.Array


@flax.struct.dataclass
class Drawn:
    """What a chunk drew: tokens, logprobs [D, N, C]; counts [D, N]; alive, stopped [D, N].

    `steps` is the number of steps made. A lane that is no longer alive has ended, by a stop id if
    `stopped`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    alive: jax.Array
    stopped: jax.Array
    steps: jax.Array


def empty_lanes(
    config: ModelConfig, shards: int, lanes: int, capacity: int, *, int8: bool = False
) -> Lanes:
    ring = cache.empty_ring(config, shards, lanes, capacity, int8=int8)
    shape = (shards, lanes, config.embed_dim)
    return Lanes(ring, jnp.zeros(shape, jnp.dtype(config.compute_dtype)))


def take_lanes(
    lanes: Lanes, stash: cache.Stash, index: jax.Array, blocks: jax.Array
) -> tuple[Lanes, cache.Stash]:
    """The lanes [D, N'] and the blocks of the stash [D, B'] of each shard."""
    ring = lanes.ring.replace(blocks=cache.take_rows(lanes.ring.blocks, index))
    taken = Lanes(ring, cache.rows_of(lanes.hidden, index))
    return taken, cache.Stash(cache.take_rows(stash.blocks, blocks))


def compute_pages(
    params: Params,
    config: ModelConfig,
    pages: cache.Pages,
    tokens: jax.Array,
    start: jax.Array,
    fill: jax.Array,
    earlier: jax.Array | None,
    targets: jax.Array,
) -> cache.Pages:
    """Run pages of prompts through the model and store their keys and values.

    Args:
      tokens: [D, A, S] right-padded; start, fill [D, A].
      earlier: [D, A, M] the pages before each, the nearest last; see `attend.page_attend`.
      targets: [D, A] where they are stored; out of range for rows that are none.
    """
    shards, count, size = tokens.shape
    attend = page_attend(config, start, fill, earlier, size)
    positions = (start[..., None] + jnp.arange(size)).reshape(-1, size)
    hidden, new = forward(
        params,
        config,
        tokens.reshape(-1, size),
        positions,
        attend,
        layer_inputs(pages),
    )
    hidden = hidden.reshape(shards, count, size, -1)
    final = jnp.maximum(fill - 1, 0)[..., None, None]
    last = jnp.take_along_axis(hidden, final, axis=2)[:, :, 0]
    return cache.write_pages(pages, _after(hidden, new), last, targets)


def decode_chunk(
    params: Params,
    config: ModelConfig,
    pages: cache.Pages,
    stash: cache.Stash,
    lanes: Lanes,
    work: Work,
    key: jax.Array,
    stop_ids: jax.Array,
    temperature: jax.Array,
    limit: jax.Array,
    leave: jax.Array,
    *,
    filters: Filters,
    chunk: int,
) -> tuple[Lanes, Drawn]:
    """Up to `chunk` steps: draw a token a lane, run it through the model, store its keys.

    Args:
      key: of the run, stage and step; sample keys are folded from it.
      stop_ids: [X].
      limit: most tokens a sample may have.
      leave: end early once so many samples have ended (or all have).
      filters, chunk: static.
    """
    fresh = work.page >= 0
    first = cache.rows_of(pages.last, jnp.maximum(work.page, 0))
    keys = sample_keys(key, work.names)
    shape = (*work.counts.shape, chunk)
    drawn = Drawn(
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        counts=work.counts,
        alive=work.alive,
        stopped=jnp.zeros_like(work.alive),
        steps=jnp.zeros((), jnp.int32),
    )
    lanes = lanes.replace(hidden=jnp.where(fresh[..., None], first, lanes.hidden))
    began = jnp.sum(work.alive)

    def unfinished(carry: tuple[Lanes, Drawn]) -> jax.Array:
        drawn = carry[1]
        alive = jnp.sum(drawn.alive)
        return (drawn.steps < chunk) & (alive > 0) & (began - alive < leave)

    def step(carry: tuple[Lanes, Drawn]) -> tuple[Lanes, Drawn]:
        lanes, drawn = carry
        uniform = jax.vmap(jax.vmap(_uniform))(keys, drawn.counts)
        token, logprob = draw(logits(params, config, lanes.hidden), uniform, temperature, filters)
        token = jnp.where(drawn.alive, token, 0)
        attend = lane_attend(config, work.layout, drawn.counts, pages, stash, lanes.ring)
        hidden, new = forward(
            params,
            config,
            token,
            work.layout.length + drawn.counts,
            attend,
            layer_inputs(pages, stash, lanes.ring),
        )
        lanes = Lanes(cache.write_ring(lanes.ring, _after(hidden, new)), hidden)
        return lanes, _record(drawn, token, logprob, stop_ids, limit)

    return jax.lax.while_loop(unfinished, step, (lanes, drawn))


def _after(hidden: jax.Array, new: Sequence[cache.Block]) -> Sequence[cache.Block]:
    """New keys and values [..., K, h], that come after the final states [..., E].

    Nothing else is added to them. XLA sees that all caches have been read by then, and writes in
    place instead of in a copy of them. (An `optimization_barrier` is gone before it decides on
    copies.)
    """
    nothing = 0 * hidden[..., :1, None]
    return jax.tree.map(lambda x: x + nothing.astype(x.dtype), new)


def _record(
    drawn: Drawn, token: jax.Array, logprob: jax.Array, stop_ids: jax.Array, limit: jax.Array
) -> Drawn:
    """Append a token to every live sample."""
    alive = drawn.alive
    # A stop id counts as a token of the sample: the policy has to learn to stop.
    hit = alive & jnp.any(token[..., None] == stop_ids, axis=-1)
    counts = drawn.counts + alive

    def put(array: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, value[..., None], drawn.steps, axis=2)

    return Drawn(
        tokens=put(drawn.tokens, token),
        logprobs=put(drawn.logprobs, jnp.where(alive, logprob, 0.0)),
        counts=counts,
        alive=alive & ~hit & (counts < limit),
        stopped=drawn.stopped | hit,
        steps=drawn.steps + 1,
    )


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    """What token `count` of the sample with this key is drawn with: [2]; see `draw.pick`."""
    return jax.random.uniform(jax.random.fold_in(key, count), (2,))


def sample_keys(key: jax.Array, names: jax.Array) -> jax.Array:
    """fold_in(key, id, id, sample index) for names [D, N, 3] -> keys [D, N]."""

    def one(name: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, name, key)

    return jax.vmap(jax.vmap(one))(names)
