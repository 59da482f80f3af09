"""The jitted part of sampling: the prefill of pages, and a chunk of decode steps.

Everything that these functions read is an argument or a hashable static argument, so a compiled
program never runs with another call's stop ids or seed.

Randomness belongs to a sample, not to a lane: token t of a sample is drawn with
`fold_in(sample_key, t)`, whatever is decoded beside it.

A profile names the parts of a step by `jax.named_scope`: draw, masks, the model's own scopes (in
its attention: pages, stash, ring, itself), and store.

Dimensions: D data-parallel shards, N lanes, P pages, S slots of a page, A pages computed at once, M
pages of a prompt, B blocks of the stash, C steps of a chunk, X stop ids, W watched tokens, K
key/value heads, h size of a head, V vocabulary, E embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.heads import logits
from grm_jax.model.params import Params
from grm_jax.model.transformer import forward
from grm_jax.sampler import cache
from grm_jax.sampler.attend import Layout, lane_attend, layer_inputs, page_attend
from grm_jax.sampler.draw import Settings, draw, draw_each, watched_logprobs
from grm_jax.sampler.options import Filters


class Lanes(flax.struct.PyTreeNode):
    """The state of the lanes, which stays on the device between chunks.

    Attributes:
      ring: the keys and values of each lane's newest tokens.
      hidden: [D, N, E] the final hidden state from which each lane's next token is drawn.
    """

    ring: cache.Ring
    hidden: jax.Array


@flax.struct.dataclass
class Work:
    """What a chunk has to do; the host makes it.

    Attributes:
      layout: which lane reads which pages and blocks.
      page: [D, N] for lanes whose sample begins, the last page of its prompt, whose final state the
        first token is drawn from; -1 for other lanes.
      names: [D, N, 3] uint32, a hash of the request's seed, or else of its example's id (two
        numbers), and the sample index, from which each sample's key is made.
      counts: [D, N] how many tokens each lane's sample has.
      alive: [D, N] whether a lane runs a sample.
      limit: [D, N] the most tokens that each lane's sample may have.
      settings: how each lane's tokens are drawn, where lanes differ.
    """

    layout: Layout
    page: jax.Array
    names: jax.Array
    counts: jax.Array
    alive: jax.Array
    limit: jax.Array
    settings: Settings


@flax.struct.dataclass
class Drawn:
    """What a chunk has drawn.

    Attributes:
      tokens, logprobs: [D, N, C] the chunk's tokens and their log-probabilities.
      counts: [D, N] how many tokens each lane's sample has, those of earlier chunks included.
      alive: [D, N] False for lanes without a sample, and for those whose sample has ended.
      stopped: [D, N] whether the sample has ended by a stop id.
      steps: a scalar, how many steps were made.
      watched: [D, N, C, W] the log-probabilities, at temperature 1, that watched tokens had where
        the chunk's tokens were drawn; None where no token is watched.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    alive: jax.Array
    stopped: jax.Array
    steps: jax.Array
    watched: jax.Array | None = None


def empty_lanes(
    config: ModelConfig,
    shards: int,
    lanes: int,
    capacity: int,
    *,
    int8: bool = False,
    on_cpu: bool = False,
) -> Lanes:
    """The state of `lanes` lanes in each shard, with rings of `capacity` slots (see
    `cache.empty_ring`)."""
    ring = cache.empty_ring(config, shards, lanes, capacity, int8=int8, on_cpu=on_cpu)
    shape = (shards, lanes, config.embed_dim)
    return Lanes(ring, jnp.zeros(shape, jnp.dtype(config.compute_dtype)))


def take_lanes(
    lanes: Lanes, stash: cache.Stash, index: jax.Array, blocks: jax.Array
) -> tuple[Lanes, cache.Stash]:
    """The lanes whose indices in each shard are `index` [D, N'], and the blocks of the stash whose
    indices are `blocks` [D, B']."""
    ring = lanes.ring.replace(blocks=cache.take_rows(lanes.ring.blocks, index))
    fewer = Lanes(ring, cache.rows_of(lanes.hidden, index))
    return fewer, cache.Stash(cache.take_rows(stash.blocks, blocks))


def compute_pages(
    params: Params,
    config: ModelConfig,
    pages: cache.Pages,
    tokens: jax.Array,
    start: jax.Array,
    fill: jax.Array,
    earlier: jax.Array,
    targets: jax.Array,
) -> cache.Pages:
    """Prefill: run pages of prompts through the model and store their keys and values.

    Args:
      tokens: [D, A, S] the tokens of the pages, right-padded.
      start, fill: [D, A] the position of each page's first token, and the number of its tokens.
      earlier: [D, A, M] the pages before each, the nearest last; see `attend.page_attend`. M is 0
        where no page has an earlier one.
      targets: [D, A] the index under which each page is stored; out of range for rows that hold
        no page.
    """
    shards, count, size = tokens.shape
    attend = page_attend(config, start, fill, earlier if earlier.shape[2] else None, size)
    positions = (start[..., None] + jnp.arange(size)).reshape(-1, size)
    hidden, new = forward(
        params,
        config,
        tokens.reshape(-1, size),
        positions,
        attend,
        layer_inputs(pages),
    )
    hidden = hidden.reshape(shards, count, size, -1)  # [D, A, S, E]
    final = jnp.maximum(fill - 1, 0)[..., None, None]
    last = jnp.take_along_axis(hidden, final, axis=2)[:, :, 0]  # [D, A, E]
    with jax.named_scope("store"):
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
    watch: jax.Array,
    temperature: jax.Array,
    leave: jax.Array,
    *,
    filters: Filters | None,
    chunk: int,
    grid: bool = False,
) -> tuple[Lanes, Drawn]:
    """Up to `chunk` decode steps: draw a token for each lane, run it through the model and store
    its keys and values.

    Args:
      params: the tree of `weights.decode_weights`.
      pages, stash, lanes: the caches; only `lanes` are changed.
      work: what the lanes have to do.
      key: the key of run, stage and step, from which the samples' keys are folded.
      stop_ids: [X] the token ids that end a sample.
      watch: [W] the token ids whose log-probabilities are returned at every step.
      temperature: a scalar, where all lanes have the same.
      leave: the chunk ends early once this many samples have ended, or all of them.
      filters: static; where lanes differ in these or in the temperature, None, and
        `work.settings` are read.
      chunk: static.
      grid: static; see `attend.lane_attend`.
    """
    fresh = work.page >= 0  # [D, N]
    pages = cache.Pages(cache.map_layers(cache.as_numbers, pages.blocks), pages.last)
    first = cache.rows_of(pages.last, jnp.maximum(work.page, 0))  # [D, N, E]
    keys = sample_keys(key, work.names)  # [D, N]
    shape = (*work.counts.shape, chunk)
    drawn = Drawn(
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        counts=work.counts,
        alive=work.alive,
        stopped=jnp.zeros_like(work.alive),
        steps=jnp.zeros((), jnp.int32),
        watched=jnp.zeros((*shape, watch.size), jnp.float32) if watch.size else None,
    )
    lanes = lanes.replace(hidden=jnp.where(fresh[..., None], first, lanes.hidden))
    if grid:  # all tokens are in the stash: each chunk begins with the ring's first slot
        lanes = lanes.replace(ring=lanes.ring.replace(slot=jnp.zeros((), jnp.int32)))
    began = jnp.sum(work.alive)

    def unfinished(carry: tuple[Lanes, Drawn]) -> jax.Array:
        drawn = carry[1]
        alive = jnp.sum(drawn.alive)
        return (drawn.steps < chunk) & (alive > 0) & (began - alive < leave)

    def step(carry: tuple[Lanes, Drawn]) -> tuple[Lanes, Drawn]:
        lanes, drawn = carry
        z = logits(params, config, lanes.hidden)  # [D, N, V]
        with jax.named_scope("draw"):
            uniform = jax.vmap(jax.vmap(_uniform))(keys, drawn.counts)  # [D, N, 2]
            if filters is None:
                token, logprob = draw_each(z, uniform, work.settings)  # [D, N] each
            else:
                token, logprob = draw(z, uniform, temperature, filters)
            token = jnp.where(drawn.alive, token, 0)
            watched = watched_logprobs(z, watch) if watch.size else None  # [D, N, W]
        with jax.named_scope("masks"):
            attend = lane_attend(
                config, work.layout, drawn.counts, pages, stash, lanes.ring, grid=grid
            )
        hidden, new = forward(
            params,
            config,
            token,
            work.layout.length + drawn.counts,
            attend,
            layer_inputs(pages, stash, lanes.ring),
        )
        with jax.named_scope("store"):
            lanes = Lanes(cache.write_ring(lanes.ring, _after(hidden, new)), hidden)
            return lanes, _record(drawn, token, logprob, watched, stop_ids, work.limit)

    return jax.lax.while_loop(unfinished, step, (lanes, drawn))


def _after(hidden: jax.Array, new: Sequence[cache.Block]) -> Sequence[cache.Block]:
    """New keys and values [..., K, h], made to depend on the final states [..., E].

    Zero is added to them. XLA then sees that all caches have been read before these values are
    written, and writes them in place instead of into a copy of the caches. (XLA removes an
    `optimization_barrier` before it decides on copies.)
    """
    zero = 0 * hidden[..., :1, None]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), new)


def _record(
    drawn: Drawn,
    token: jax.Array,
    logprob: jax.Array,
    watched: jax.Array | None,
    stop_ids: jax.Array,
    limit: jax.Array,
) -> Drawn:
    """`drawn` with a token [D, N] appended to every sample that has not ended."""
    alive = drawn.alive
    # A stop id counts as a token of the sample, since the policy has to learn to stop.
    hit = alive & jnp.any(token[..., None] == stop_ids, axis=-1)
    counts = drawn.counts + alive

    def put(array: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, value, drawn.steps, axis=2)

    return Drawn(
        tokens=put(drawn.tokens, token),
        logprobs=put(drawn.logprobs, jnp.where(alive, logprob, 0.0)),
        counts=counts,
        alive=alive & ~hit & (counts < limit),
        stopped=drawn.stopped | hit,
        steps=drawn.steps + 1,
        watched=None if drawn.watched is None or watched is None else put(drawn.watched, watched),
    )


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    """The two random numbers [2] by which token `count` of a sample is drawn (see `draw.pick`)."""
    return jax.random.uniform(jax.random.fold_in(key, count), (2,))


def sample_keys(key: jax.Array, names: jax.Array) -> jax.Array:
    """Keys [D, N] of samples: `key`, into which the three numbers of names [D, N, 3] are folded."""

    def sample_key(name: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, name, key)

    return jax.vmap(jax.vmap(sample_key))(names)
