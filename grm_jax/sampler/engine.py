"""The host's part of sampling: requests in, samples out as they end.

    requests -> plan (lanes, pages) -> loop: begin waiting samples -> prefill their pages -> a chunk
    of decode steps -> yield the samples that have ended, and free their lanes

Between chunks, free lanes are given to waiting samples (continuous batching), so that no sample
waits for a longer one to end. `schedule` decides which sample runs where, `decode` computes.

Dimensions: D data-parallel shards, N lanes, A pages computed at once, S slots of a page, M earlier
pages of a prompt, K key/value heads.
"""

from __future__ import annotations

import collections
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.errors import UserError
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel, replicated, sharding
from grm_jax.sampler import cache, decode
from grm_jax.sampler.board import Board, Running
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.memory import CacheBudget
from grm_jax.sampler.plan import EngineConfig, Plan, at_once, make_plan, power_of_two
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.samples import Sample, SamplerStats
from grm_jax.sampler.schedule import Prompt, Request, Scheduler
from grm_jax.sampler.weights import decode_weights, laid_out, take

log = logging.getLogger("grm_jax")


class Sampler:
    """Samples from a Gemma-2.

    Args:
      model: the model's shape.
      stop_ids: the token ids that end a sample.
      engine: how the machine is used.
      mesh: the mesh on which the parameters are; prompts are split over its data axes.

    Attributes:
      stats: the cost of sampling so far.
      programs: the compiled programs.
      budget: the memory that the caches may take.
    """

    def __init__(
        self, model: ModelConfig, stop_ids: Sequence[int], engine: EngineConfig, mesh: Mesh
    ):
        self.model = model
        self.engine = engine
        self.mesh = mesh
        self.stats = SamplerStats()
        self.programs = Programs(mesh)
        self.stop_ids = np.asarray(sorted(stop_ids), np.int32)
        self.budget = CacheBudget(model, engine, mesh)

    def summary(self) -> str:
        """One line about what was sampled so far, at which speed and cost."""
        stats, compiled = self.stats, self.programs.compilations
        return (
            f"{stats.samples:,} samples, {stats.decode_tokens:,} tokens, "
            f"{stats.tokens_per_second:,.0f}/s; lanes "
            f"{100 * stats.occupancy:.0f}% busy; {stats.prefill_tokens:,} prompt tokens computed, "
            f"{stats.shared_tokens:,} shared; caches {stats.cache_bytes / 2**20:,.0f} MiB; "
            f"{len(compiled)} programs compiled in {sum(c.seconds for c in compiled):.0f} s"
        )

    def take(self, params: Params) -> Params:
        """The parameters as decoding reads them, for `sample`; those given are deleted.

        For whoever only samples: else each call of `sample` holds a second copy of most.
        """
        return take(self.programs, self.model, params, int8=self.engine.int8_weights)

    def sample(
        self,
        params: Params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        key: jax.Array,
        *,
        wanted: Callable[[Request], bool] = lambda request: True,
        together: int | None = None,
    ) -> Iterator[Sample]:
        """Yield every sample of every request as it ends, in no particular order.

        Args:
          params: the tree of `model.params`, with or without LoRA adapters, or what `take`
            returned.
          requests: the prompts, and the samples to be drawn from each.
          sampling: how tokens are drawn, and the most tokens of a sample.
          key: the key of run, stage and step, into which each example's id and sample index are
            folded.
          wanted: called when samples of a request could begin; where it returns False, those that
            wait are dropped.
          together: the most samples of an example that run at once; None for no limit.

        Raises UserError for an empty prompt, and for one that leaves no room within the model's
        positions or the cache; ValueError for a `together` below 1.
        """
        requests = [request for request in requests if request.samples]
        for request in requests:
            self._check(request, sampling)
        if not requests:
            return
        if together is not None and together < 1:
            raise ValueError(f"together={together}; at least one sample of an example must run")
        shards = data_parallel(self.mesh)
        longest = max(len(request.prompt) for request in requests)
        plan = make_plan(
            self.model,
            self.budget.within(longest, laid_out=laid_out(params)),
            requests,
            sampling.max_new_tokens,
            shards,
            together,
            split=self.mesh.shape["tensor"],
            on_cpu=self.mesh.devices.flat[0].platform == "cpu",
        )
        if plan.bytes > self.stats.cache_bytes:
            log.info("sampler          %s", plan)
            self.stats.cache_bytes = plan.bytes
        rollout = Rollout(self, params, plan, shards, sampling, key)
        for batch in self._batches(requests, plan, shards):
            yield from rollout.run(batch, wanted, together)

    def _batches(
        self, requests: Sequence[Request], plan: Plan, shards: int
    ) -> Iterator[Sequence[Request]]:
        """All requests at once; without `refill`, one batch after the other that fits the plan."""
        if self.engine.refill:
            yield requests
            return
        lanes, pages = shards * plan.shape.lanes, shards * plan.shape.pages
        batch: list[Request] = []
        for request in requests:
            grown = [*batch, request]
            depth = sum(-(-len(r.prompt) // plan.shape.page) for r in grown)
            if batch and (sum(len(r.samples) for r in grown) > lanes or depth > pages):
                yield batch
                grown = [request]
            batch = grown
        yield batch

    def _check(self, request: Request, sampling: SamplingConfig) -> None:
        """Raise UserError for a prompt that is empty or too long for the model's positions."""
        length = len(request.prompt)
        if not length:
            raise UserError(f"example {request.example_id}: the prompt has no tokens")
        if length + sampling.max_new_tokens > self.model.max_position:
            raise UserError(
                f"example {request.example_id}: {length} prompt tokens and up to "
                f"{sampling.max_new_tokens} new ones exceed the model's {self.model.max_position} "
                "positions; lower the length limit (--max-new-tokens; in training "
                "--rl.sampling.max-new-tokens and the like) or drop the example"
            )


class Rollout:
    """One call of `Sampler.sample`: weights and caches on the device, and the loop over chunks."""

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        plan: Plan,
        shards: int,
        sampling: SamplingConfig,
        key: jax.Array,
    ):
        self.plan, self.shards, self.sampling = plan, shards, sampling
        self.model, self.engine, self.stats = sampler.model, sampler.engine, sampler.stats
        self.programs = sampler.programs
        mesh = self.programs.mesh
        self.data, self.everywhere = sharding(mesh, ("batch",)), replicated(mesh)
        self.heads = sharding(mesh, ("batch", None, "kv_heads"))
        self.key, self.stop_ids, self.temperature, self.limit = sampler.programs.put(
            (
                key,
                sampler.stop_ids,
                np.float32(sampling.temperature or 1.0),
                np.int32(sampling.max_new_tokens),
            ),
            self.everywhere,
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
            (shards, shape),
            functools.partial(
                cache.empty_pages,
                self.model,
                shards,
                shape.pages,
                shape.page,
                int8=self.engine.int8_cache,
            ),
        )

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

    def run(
        self,
        requests: Sequence[Request],
        wanted: Callable[[Request], bool],
        together: int | None,
    ) -> Iterator[Sample]:
        """Yield every sample of the requests as it ends."""
        self.reset_lanes()
        scheduler = Scheduler(
            requests,
            self.plan.shape,
            self.shards,
            share=self.plan.share,
            crowd=self.plan.crowd,
            wanted=wanted,
            together=together,
        )
        while not scheduler.idle:
            pages, admissions = scheduler.fill()
            started = self._clock()
            self._compute(pages)
            for admission in admissions:
                self.board.admit(admission)
            jax.block_until_ready(self.pages.last)
            self.stats.prefill_seconds += self._clock() - started
            if not self.board.running:
                assert not scheduler.waiting, "samples wait, and none can begin"
                break  # the samples that waited were dropped
            started = self._clock()
            ended = self._decode(scheduler.waiting)
            self.stats.decode_seconds += self._clock() - started
            for running, stopped in ended:
                scheduler.retire(running.admission.shard, running.admission.lane)
                yield self._finish(running, stopped)
        self.stats.dropped += scheduler.dropped
        self.stats.shared_tokens += scheduler.shared_tokens

    def _clock(self) -> float:
        """The time in seconds, by a clock that does not count the compilation of programs."""
        return time.perf_counter() - sum(c.seconds for c in self.programs.compilations)

    def _finish(self, running: Running, stopped: bool) -> Sample:
        """The sample that has ended, counted in `stats`."""
        request, index = running.admission.prompt.request, running.admission.sample
        tokens = np.concatenate(running.tokens)
        self.stats.samples += 1
        self.stats.decode_tokens += len(tokens)
        logprobs = np.concatenate(running.logprobs)
        return Sample(request.example_id, index, tokens, logprobs, "stop" if stopped else "length")

    def _compute(self, pages: Sequence[tuple[Prompt, int]]) -> None:
        """Prefill pages, given as (prompt, index into its pages), as many at once as is allowed.

        They are computed in the order of their indices, since a page reads its prompt's earlier
        ones.
        """
        size = self.plan.shape.page
        most = max(1, self.engine.prefill_tokens // (size * self.shards))
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

    def _decode(self, waiting: bool) -> list[tuple[Running, bool]]:
        """Decode a chunk of steps, and return the samples that have ended in it.

        A chunk ends early. While samples wait, it ends once a sixteenth of the running samples have
        ended, so that others can begin. Otherwise it ends once the running samples fit into a
        quarter of the lanes, if they may be packed into these.
        """
        if not waiting:
            self._compact()
        self._fill_stash()
        lanes = self.lanes.hidden.shape[1]
        total, running = self.shards * lanes, len(self.board.running)
        shrinks = lanes // 4 >= self.engine.min_lanes and running > total // 4
        if waiting and self.engine.refill:
            leave = max(1, min(total, running) // 16)
        else:
            leave = running - total // 4 if shrinks else running
        drawn = jax.device_get(self.steps(self.board.work(), leave))
        self.stats.lane_steps += int(drawn.steps) * total
        return self.board.collect(drawn)

    def steps(self, work: decode.Work, leave: int) -> decode.Drawn:
        """Run a chunk of steps for all lanes; see `decode.decode_chunk`."""
        work = self.programs.put(work, self.data)
        filters, chunk = self.sampling.filters, self.plan.chunk
        function = functools.partial(_decode_chunk, config=self.model, filters=filters, chunk=chunk)
        caches = self.lanes.hidden.shape[1], self.plan.ring, self.stash.count
        self.lanes, drawn = self.programs.run(
            "decode",
            # The plan's shape is part of the key even where fewer lanes are left: its lanes decided
            # the layout of the weights.
            (self.shards, self.plan.shape, *caches, filters, chunk, len(self.stop_ids)),
            function,
            self.weights,
            self.pages,
            self.stash,
            self.lanes,
            work,
            self.key,
            self.stop_ids,
            self.temperature,
            self.limit,
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


def _decode_chunk(weights, *arrays, config, filters, chunk):
    """`decode.decode_chunk`, with its static arguments as keywords."""
    return decode.decode_chunk(weights, config, *arrays, filters=filters, chunk=chunk)
