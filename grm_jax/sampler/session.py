"""A session: requests are added while others run, and samples come back as they end.

    add(request) -> waits for lanes -> step: prefill of its pages, a chunk of decode steps -> Sample

Between chunks, free lanes are given to waiting samples (continuous batching), so that no sample
waits for a longer one to end. `schedule` decides which sample runs where, `decode` computes.

Dimensions: D data-parallel shards, N lanes, A pages computed at once, S slots of a page, M earlier
pages of a prompt, K key/value heads, W watched tokens.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from grm_jax.errors import UserError
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel, replicated, sharding
from grm_jax.sampler import cache, decode
from grm_jax.sampler.board import Board, Running
from grm_jax.sampler.draw import Filters, SamplingConfig
from grm_jax.sampler.plan import EngineConfig, Plan, at_once, power_of_two
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.samples import Sample, SamplerStats
from grm_jax.sampler.schedule import Prompt, Request, Scheduler
from grm_jax.sampler.weights import decode_weights


class Host(Protocol):
    """What a session uses of its sampler: see `engine.Sampler`."""

    model: ModelConfig
    engine: EngineConfig
    stats: SamplerStats
    programs: Programs
    stop_ids: np.ndarray


class Session:
    """Weights and caches on the device, and the requests that wait for them or run.

    `Sampler.open` makes one. It is not thread-safe: one thread adds, steps and cancels. After an
    exception from `step` the caches are lost; open another session.

    Args:
      sampler: whose model, programs and statistics it uses.
      params: as in `Sampler.sample`.
      plan: the sizes of everything on the device.
      key: into which each example's id (or seed) and sample index are folded.
      longest: the most tokens of a prompt.
      watch: W token ids; samples then have `watched`.
      wanted, together: as in `Sampler.sample`.
    """

    def __init__(
        self,
        sampler: Host,
        params: Params,
        plan: Plan,
        key: jax.Array,
        *,
        longest: int,
        watch: Sequence[int] = (),
        wanted: Callable[[Request], bool] = lambda request: True,
        together: int | None = None,
    ):
        self.plan, self.longest = plan, longest
        self.model, self.engine, self.stats = sampler.model, sampler.engine, sampler.stats
        self.programs = sampler.programs
        mesh = self.programs.mesh
        self.shards = data_parallel(mesh)
        self.data, self.everywhere = sharding(mesh, ("batch",)), replicated(mesh)
        self.heads = sharding(mesh, ("batch", None, "kv_heads"))
        self.key, self.stop_ids, self.watch = self.programs.put(
            (key, sampler.stop_ids, np.asarray(watch, np.int32)), self.everywhere
        )
        self.weights = decode_weights(
            self.programs,
            self.model,
            params,
            plan.shape.lanes,
            int8=self.engine.int8_weights,
        )
        shape = plan.shape
        self.pages = self._make(
            "allocate pages",
            (self.shards, shape),
            functools.partial(
                cache.empty_pages,
                self.model,
                self.shards,
                shape.pages,
                shape.page,
                int8=self.engine.int8_cache,
            ),
        )
        self.scheduler = Scheduler(
            shape,
            self.shards,
            share=plan.share,
            crowd=plan.crowd,
            wanted=wanted,
            together=together,
        )
        self.reset_lanes()

    @property
    def idle(self) -> bool:
        """Whether no sample runs and none waits."""
        return self.scheduler.idle

    def add(self, request: Request, sampling: SamplingConfig | None = None) -> None:
        """Put a request at the end of the queue; its samples begin when it is their turn.

        Args:
          request: the prompt and the samples to be drawn from it.
          sampling: how its tokens are drawn; None for SamplingConfig() with as many tokens as the
            session has room for.

        Raises UserError for an empty prompt, and where prompt or sample are too long for the
        session or the model; ValueError for a sample that waits or runs already.
        """
        if sampling is None:
            sampling = SamplingConfig(max_new_tokens=self.plan.limit)
        check(request, sampling, self.model)
        length = len(request.prompt)
        if length > self.longest:
            raise UserError(
                f"example {request.example_id}: {length} prompt tokens; the sampler was started "
                f"for prompts of at most {self.longest}"
            )
        if sampling.max_new_tokens > self.plan.limit:
            raise UserError(
                f"example {request.example_id}: {sampling.max_new_tokens} new tokens; the sampler "
                f"was started for samples of at most {self.plan.limit}"
            )
        if self.lanes.hidden.shape[1] < self.plan.shape.lanes:
            if not self.idle:
                raise ValueError("nothing can be added until `drain` has ended")
            self.reset_lanes()
        if request.samples:
            self.scheduler.add(request, sampling)

    def cancel(self, example_id: str) -> None:
        """Drop the samples of an example that wait, and free the lanes of those that run.

        Its samples that have not been returned never are. Nothing happens for an unknown example.
        """
        self.stats.cancelled += self.board.cancel(example_id)
        self.scheduler.cancel(example_id)
        self._count_prompts()

    def step(self) -> list[Sample]:
        """Begin what has room, decode a chunk, and return the samples that ended in it."""
        return self._step(last=False)

    def drain(self) -> Iterator[Sample]:
        """Step until nothing runs or waits, and yield each sample as it ends.

        When none waits any more, the running samples are packed into fewer lanes, so nothing may be
        added before the end.
        """
        while not self.idle:
            yield from self._step(last=True)

    def reset_lanes(self) -> None:
        """Make empty lanes and an empty stash, on the device and on the host's board."""
        plan, int8 = self.plan, self.engine.int8_cache
        sizes = self.model, self.shards, plan.shape.lanes
        self.lanes = self._make(
            "allocate lanes",
            (self.shards, plan.shape.lanes, plan.ring),
            functools.partial(decode.empty_lanes, *sizes, plan.ring, int8=int8),
        )
        blocks = plan.stash_sizes(plan.shape.lanes)[0]
        self.stash = self._make(
            "allocate stash",
            (self.shards, blocks, plan.chunk),
            functools.partial(
                cache.empty_stash, self.model, self.shards, blocks, plan.chunk, int8=int8
            ),
        )
        self.board = Board(plan, self.shards)

    def _step(self, *, last: bool) -> list[Sample]:
        """As `step`; `last`: nothing will be added before all samples have ended."""
        pages, admissions = self.scheduler.fill()
        self._count_prompts()
        started = self._clock()
        self._compute(pages)
        for admission in admissions:
            self.board.admit(admission)
        jax.block_until_ready(self.pages.last)
        self.stats.prefill_seconds += self._clock() - started
        waiting = self.scheduler.waiting
        if not self.board.running:
            assert not waiting, "samples wait, and none can begin"
            return []
        started = self._clock()
        ended = self._decode(waiting, last)
        self.stats.decode_seconds += self._clock() - started
        for running, _ in ended:
            self.scheduler.retire(running.admission.shard, running.admission.lane)
        return [self._finish(running, stopped) for running, stopped in ended]

    def _count_prompts(self) -> None:
        """Count in `stats` what the scheduler has dropped and shared since the last call."""
        scheduler, stats = self.scheduler, self.stats
        stats.dropped += scheduler.dropped
        stats.shared_tokens += scheduler.shared_tokens
        scheduler.dropped = scheduler.shared_tokens = 0

    def _clock(self) -> float:
        """The time in seconds, by a clock that does not count the compilation of programs."""
        return time.perf_counter() - sum(c.seconds for c in self.programs.compilations)

    def _finish(self, running: Running, stopped: bool) -> Sample:
        """The sample that has ended, counted in `stats`."""
        request, index = running.admission.prompt.request, running.admission.sample
        tokens = np.concatenate(running.tokens)
        self.stats.samples += 1
        self.stats.decode_tokens += len(tokens)
        return Sample(
            request.example_id,
            index,
            tokens,
            np.concatenate(running.logprobs),
            "stop" if stopped else "length",
            np.concatenate(running.watched) if running.watched else None,
        )

    def _compute(self, pages: Sequence[tuple[Prompt, int]]) -> None:
        """Prefill pages, given as (prompt, index into its pages), as many at once as is allowed.

        They are computed in the order of their indices, since a page reads its prompt's earlier
        ones.
        """
        size = self.plan.shape.page
        most = max(1, self.engine.prefill_tokens // (size * self.shards))
        if self.plan.repeatable:
            most = 1
        for place in sorted({place for _, place in pages}):
            queues: list[list[Prompt]] = [[] for _ in range(self.shards)]
            for prompt, at in pages:
                if at == place:
                    queues[prompt.shard].append(prompt)
            while any(queues):
                rows = at_once(max(map(len, queues)), most)
                batch = [queue[:rows] for queue in queues]
                queues = [queue[rows:] for queue in queues]
                self._compute_batch(batch, place, rows)

    def _compute_batch(self, batch: list[list[Prompt]], place: int, rows: int) -> None:
        """Prefill page `place` of up to `rows` prompts of each shard."""
        shape = self.plan.shape
        tokens = np.zeros((self.shards, rows, shape.page), np.int32)
        start = np.full((self.shards, rows), place * shape.page, np.int32)
        fill = np.zeros((self.shards, rows), np.int32)
        # The number of earlier pages is rounded to a few sizes, to compile few programs. It is not
        # that of the longest prompt for all, since most pages have few pages before them.
        before = power_of_two(place) if place else 0
        earlier = np.zeros((self.shards, rows, before), np.int32)
        targets = np.full((self.shards, rows), shape.pages, np.int32)
        for shard, prompts in enumerate(batch):
            for row, prompt in enumerate(prompts):
                page = prompt.pages[place]
                tokens[shard, row, : len(page.tokens)] = page.tokens
                fill[shard, row] = len(page.tokens)
                earlier[shard, row, before - place :] = [p.index for p in prompt.pages[:place]]
                targets[shard, row] = page.index
                self.board.place(page)
                self.stats.prefill_tokens += len(page.tokens)
        self.prefill(tokens, start, fill, earlier, targets)

    def prefill(self, tokens, start, fill, earlier, targets) -> None:
        """Compute and store pages; the arguments are those of `decode.compute_pages`."""
        arrays = self.programs.put((tokens, start, fill, earlier, targets), self.data)
        self.pages = self.programs.run(
            "prefill",
            (self.shards, tokens.shape[1], self.plan.shape, earlier.shape[2]),
            functools.partial(_compute_pages, self.model),
            self.weights,
            self.pages,
            *arrays,
            donate=(1,),
            out_shardings=self._shardings(self.pages),
        )

    def _decode(self, waiting: bool, last: bool) -> list[tuple[Running, bool]]:
        """Decode a chunk of steps, and return the samples that have ended in it.

        A chunk ends early, but not in a repeatable session. While samples wait, or may be added, it
        ends once a sixteenth of the running samples have ended, so that others can begin. Otherwise
        it ends once the running samples fit into a quarter of the lanes, if they may be packed into
        these.
        """
        fixed = self.plan.repeatable
        if last and not waiting and not fixed:
            self._compact()
        self._fill_stash()
        lanes = self.lanes.hidden.shape[1]
        total, running = self.shards * lanes, len(self.board.running)
        shrinks = lanes // 4 >= self.engine.min_lanes and running > total // 4
        if (waiting or not last) and self.engine.refill and not fixed:
            leave = max(1, min(total, running) // 16)
        else:
            leave = running - total // 4 if shrinks and not fixed else running
        filters = None if fixed else self.board.filters
        drawn = jax.device_get(self.steps(self.board.work(), leave, filters))
        self.stats.lane_steps += int(drawn.steps) * total
        return self.board.collect(drawn)

    def steps(self, work: decode.Work, leave: int, filters: Filters | None) -> decode.Drawn:
        """Run a chunk of steps for all lanes; see `decode.decode_chunk`."""
        work = self.programs.put(work, self.data)
        chunk, grid = self.plan.chunk, self.plan.repeatable
        function = functools.partial(
            _decode_chunk, config=self.model, filters=filters, chunk=chunk, grid=grid
        )
        caches = self.lanes.hidden.shape[1], self.plan.ring, self.stash.count
        sizes = len(self.stop_ids), len(self.watch)
        self.lanes, drawn = self.programs.run(
            "decode",
            # The plan's shape is part of the key even where fewer lanes are left: its lanes decided
            # the layout of the weights.
            (self.shards, self.plan.shape, *caches, filters, chunk, *sizes, grid),
            function,
            self.weights,
            self.pages,
            self.stash,
            self.lanes,
            work,
            self.key,
            self.stop_ids,
            self.watch,
            self.programs.put(np.int32(leave), self.everywhere),
            donate=(3,),
            # Every process reads all that was drawn, so that all make the same decisions.
            out_shardings=(self._shardings(self.lanes), self.everywhere),
        )
        return drawn

    def _compact(self) -> None:
        """Pack the running samples into fewer lanes, where they fit into a quarter of them."""
        lanes = self.lanes.hidden.shape[1]
        fullest = max(collections.Counter(shard for shard, _ in self.board.running).values())
        fewer = lanes
        while fullest <= fewer // 4 and fewer // 4 >= self.engine.min_lanes:
            fewer //= 4
        if fewer == lanes:
            return
        before = self.shards, lanes, self.stash.count
        index, blocks = self.programs.put(self.board.compact(fewer), self.data)
        caches = self.lanes, self.stash, index, blocks
        shardings = self._shardings(jax.eval_shape(decode.take_lanes, *caches))
        shape = (*before, fewer, self.board.owner.shape[1], self.plan.ring, self.plan.chunk)
        self.lanes, self.stash = self.programs.run(
            "compact", shape, decode.take_lanes, *caches, out_shardings=shardings
        )

    def _fill_stash(self) -> None:
        """Move the oldest tokens of rings that have no room for another chunk into the stash."""
        crowded = self.board.crowded()
        if not crowded.any():
            return
        lanes, ring, chunk = crowded.shape[1], self.plan.ring, self.plan.chunk
        before, needed = self.stash.count, self.board.blocks_needed(crowded)
        if needed > before:
            count = next(size for size in self.plan.stash_sizes(lanes) if size >= needed)
            function = functools.partial(cache.grow_stash, count=count)
            self.stash = self.programs.run(
                "grow stash",
                (self.shards, before, count, chunk),
                function,
                self.stash,
                out_shardings=self._shardings(jax.eval_shape(function, self.stash)),
            )
            self.board.grow_stash(count)
        held = self.board.counts - self.board.stashed
        arrays = self.programs.put((held, self.board.stash(crowded)), self.data)
        self.stash = self.programs.run(
            "stash",
            (self.shards, lanes, ring, self.stash.count, chunk),
            cache.stash_oldest,
            self.stash,
            self.lanes.ring,
            *arrays,
            donate=(0,),
            out_shardings=self._shardings(self.stash),
        )

    def _make(self, name: str, shape: Any, function: Callable[[], Any]) -> Any:
        """The tree that `function` returns, made on the devices."""
        shardings = self._shardings(jax.eval_shape(function))
        return self.programs.run(name, shape, function, out_shardings=shardings)

    def _shardings(self, tree: Any) -> Any:
        """The shardings of a tree of caches.

        Keys, values and scales [D, rows, K, ...] are split over shards and heads, hidden states
        [D, rows, E] over shards; scalars are replicated.
        """

        def leaf_sharding(leaf: Any) -> Any:
            return (self.everywhere, self.data, self.heads)[(leaf.ndim > 0) + (leaf.ndim >= 4)]

        return jax.tree.map(leaf_sharding, tree)


def _compute_pages(config, weights, pages, tokens, start, fill, earlier, targets):
    """`decode.compute_pages`, without earlier pages where their array has none."""
    before = earlier if earlier.shape[2] else None
    return decode.compute_pages(weights, config, pages, tokens, start, fill, before, targets)


def _decode_chunk(weights, *arrays, config, **static):
    """`decode.decode_chunk`, with its static arguments as keywords."""
    return decode.decode_chunk(weights, config, *arrays, **static)


def check(request: Request, sampling: SamplingConfig, model: ModelConfig) -> None:
    """Raise UserError for a prompt that is empty or too long for the model's positions."""
    length = len(request.prompt)
    if not length:
        raise UserError(f"example {request.example_id}: the prompt has no tokens")
    if length + sampling.max_new_tokens > model.max_position:
        raise UserError(
            f"example {request.example_id}: {length} prompt tokens and up to "
            f"{sampling.max_new_tokens} new ones exceed the model's {model.max_position} "
            "positions; lower the length limit (--max-new-tokens; in training "
            "--rl.sampling.max-new-tokens and the like) or drop the example"
        )
