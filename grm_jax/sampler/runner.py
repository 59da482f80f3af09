"""What a session has on the device, and the host's arrays that say which lane reads what.

    prefill: pages of prompts, as many at once as is allowed
    decode:  pack the lanes if few run -> move old tokens to the stash -> a chunk of steps -> ended

The arrays of `InputBatch` are NumPy arrays, which are sent with every chunk. Only weights, caches
and hidden states stay on the device.

Dimensions: D data-parallel shards, N lanes, P pages, S slots of a page, R readers of a page, M
pages of a prompt, A pages computed at once, C steps of a chunk and tokens of a block of the stash,
B blocks of the stash, K key/value heads, W watched tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel, replicated, sharding
from grm_jax.sampler import attend, cache, decode
from grm_jax.sampler.draw import Settings
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.plan import Plan, power_of_two
from grm_jax.sampler.programs import Programs, SamplerStats
from grm_jax.sampler.schedule import Admission, Page, Prompt, Running, hash_id, prefill_batches
from grm_jax.sampler.weights import decode_weights

# The arrays of an `InputBatch` with an entry for each lane.
LANE_ARRAYS = (
    "cell", "used", "length", "page", "names", "counts", "alive", "stashed",
    "temperature", "limit", "top_k", "top_p", "min_p",
)  # fmt: skip


class InputBatch:
    """The arrays of `decode.Work`, which are updated as samples begin and end.

    Attributes:
      running: the sample in each lane that runs one, by (shard, lane).
    The arrays are described in `attend.Layout`, `decode.Work` and `draw.Settings`.
    """

    def __init__(self, plan: Plan, shards: int):
        shape = plan.shape
        lanes, pages = (shards, shape.lanes), (shards, shape.pages)
        self.plan, self.shape = plan, shape
        self.start = np.zeros(pages, np.int32)
        self.fill = np.zeros(pages, np.int32)
        self.reader = np.zeros((shards, shape.pages * shape.readers), np.int32)
        self.cell = np.zeros((*lanes, shape.depth), np.int32)
        self.used = np.zeros((*lanes, shape.depth), bool)
        self.length = np.zeros(lanes, np.int32)
        self.page = np.full(lanes, -1, np.int32)
        self.names = np.zeros((*lanes, 3), np.uint32)
        self.counts = np.zeros(lanes, np.int32)
        self.alive = np.zeros(lanes, bool)
        self.stashed = np.zeros(lanes, np.int32)
        self.owner = np.full((shards, plan.stash_sizes(shape.lanes)[0]), -1, np.int32)
        self.offset = np.zeros_like(self.owner)
        self.temperature = np.ones(lanes, np.float32)
        self.limit = np.ones(lanes, np.int32)
        self.top_k = np.zeros(lanes, np.int32)
        self.top_p = np.ones(lanes, np.float32)
        self.min_p = np.zeros(lanes, np.float32)
        self.running: dict[tuple[int, int], Running] = {}

    def place(self, page: Page) -> None:
        """Record a page that is computed before the next chunk."""
        self.start[page.shard, page.index] = page.start
        self.fill[page.shard, page.index] = len(page.tokens)

    def admit(self, admission: Admission) -> None:
        """Record a sample that begins in its lane with the next chunk."""
        at = admission.shard, admission.lane
        pages, request = admission.prompt.pages, admission.prompt.request
        cells = [
            page.index * self.shape.readers + reader
            for page, reader in zip(pages, admission.readers, strict=True)
        ]
        self.reader[admission.shard, cells] = admission.lane
        self.cell[at] = 0
        self.cell[at][: len(cells)] = cells
        self.used[at] = np.arange(self.shape.depth) < len(cells)
        self.length[at] = len(request.prompt)
        self.page[at] = pages[-1].index
        self.names[at] = (
            *hash_id(request.example_id if request.seed is None else request.seed),
            admission.sample,
        )
        self.counts[at] = self.stashed[at] = 0
        self.alive[at] = True
        sampling = admission.prompt.sampling
        self.temperature[at], self.limit[at] = sampling.temperature, sampling.max_new_tokens
        self.top_k[at], self.top_p[at] = sampling.top_k, sampling.top_p
        self.min_p[at] = sampling.min_p
        self.running[at] = Running(admission)

    def cancel(self, example_id: str) -> int:
        """Free the lanes of an example's samples; returns how many there were."""
        cancelled = [
            at
            for at, running in self.running.items()
            if running.admission.prompt.request.example_id == example_id
        ]
        for at in cancelled:
            self.alive[at] = False
            self._free(at)
        return len(cancelled)

    def _free(self, at: tuple[int, int]) -> None:
        """Free a lane and its blocks of the stash."""
        shard, lane = at
        del self.running[at]
        self.owner[shard, self.owner[shard] == lane] = -1
        self.stashed[at] = 0

    @property
    def common(self) -> SamplingConfig | None:
        """The settings of all running samples, but for the limit; None where they differ."""
        found = [running.admission.prompt.sampling for running in self.running.values()]
        alike = {(sampling.temperature, sampling.filters) for sampling in found}
        return found[0] if len(alike) == 1 else None

    def full_rings(self) -> np.ndarray:
        """Lanes [D, N] whose ring has no room for another chunk, so that their oldest C tokens must
        be moved to the stash."""
        ahead = np.minimum(self.plan.chunk, self.limit - self.counts)
        return self.alive & (self.counts - self.stashed + ahead > self.plan.ring)

    def blocks_needed(self, full: np.ndarray) -> int:
        """The blocks of the stash that the fullest shard needs once full lanes got one more."""
        return int(np.max(np.sum(self.owner >= 0, axis=1) + np.sum(full, axis=1)))

    def grow_stash(self, count: int) -> None:
        """Record that each shard's stash has `count` blocks now."""
        more = ((0, 0), (0, count - self.owner.shape[1]))
        self.owner = np.pad(self.owner, more, constant_values=-1)
        self.offset = np.pad(self.offset, more)

    def stash(self, full: np.ndarray) -> np.ndarray:
        """Assign a free block of the stash to each lane whose ring is full: in a repeatable plan
        the next of its own blocks, else any.

        Returns the block of each lane [D, N], and an index out of range for the other lanes.
        """
        targets = np.full(full.shape, self.owner.shape[1], np.int32)
        for shard, in_shard in enumerate(full):
            (lanes,) = np.nonzero(in_shard)
            if self.plan.repeatable:
                own = self.owner.shape[1] // full.shape[1]
                blocks = lanes * own + self.stashed[shard, lanes] // self.plan.chunk
            else:
                blocks = np.nonzero(self.owner[shard] < 0)[0][: len(lanes)]
            targets[shard, lanes] = blocks
            self.owner[shard, blocks] = lanes
            self.offset[shard, blocks] = self.stashed[shard, lanes]
            self.stashed[shard, lanes] += self.plan.chunk
        return targets

    def compact(self, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """Move the running samples into the first `lanes` lanes of each shard.

        Returns the old index of each remaining lane [D, lanes], and the old index of each remaining
        block of the stash [D, B'].
        """
        shards = range(len(self.alive))
        index = np.zeros((len(shards), lanes), np.int32)
        new_lane: dict[tuple[int, int], int] = {}  # by (shard, old lane)
        for shard in shards:
            for new, old in enumerate(sorted(n for s, n in self.running if s == shard)):
                index[shard, new] = old
                new_lane[shard, old] = new
        for name in LANE_ARRAYS:
            old = getattr(self, name)
            setattr(self, name, np.stack([old[shard][index[shard]] for shard in shards]))
        filled = np.bincount([shard for shard, _ in new_lane], minlength=len(shards))
        self.alive &= np.arange(lanes) < filled[:, None]
        self.running = {(s, new_lane[s, n]): running for (s, n), running in self.running.items()}
        for (shard, lane), running in self.running.items():
            cells = self.cell[shard, lane][: len(running.admission.readers)]
            self.reader[shard, cells] = lane
        self.reader %= lanes  # where a page has fewer readers, any lane that exists
        return index, self._compact_stash(lanes, new_lane)

    def _compact_stash(self, lanes: int, new_lane: dict[tuple[int, int], int]) -> np.ndarray:
        """Move the blocks in use to the front, and keep as many blocks as `lanes` lanes can need.

        Returns the old index of each remaining block [D, B'].
        """
        blocks = min(self.owner.shape[1], self.plan.stash_sizes(lanes)[-1])
        kept = np.argsort(self.owner < 0, axis=1, kind="stable")[:, :blocks].astype(np.int32)
        self.offset = np.take_along_axis(self.offset, kept, axis=1)
        owner = np.take_along_axis(self.owner, kept, axis=1)
        for at in zip(*np.nonzero(owner >= 0), strict=True):
            owner[at] = new_lane[int(at[0]), int(owner[at])]
        self.owner = owner
        return kept

    def work(self) -> decode.Work:
        """The arguments of the next chunk."""
        # NumPy arrays, which `Programs.put` turns into the device's.
        layout: Any = attend.Layout(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(attend.Layout)}
        )
        settings: Any = Settings(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        )
        lanes: dict[str, Any] = {
            name: getattr(self, name) for name in ("page", "names", "counts", "alive", "limit")
        }
        return decode.Work(layout=layout, settings=settings, **lanes)

    def collect(self, drawn: decode.Drawn) -> list[tuple[Running, bool]]:
        """Record what a chunk has drawn.

        Returns the samples that have ended, each with whether a stop id ended it.
        """
        counts, alive = np.asarray(drawn.counts), np.asarray(drawn.alive)
        tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
        stopped = np.asarray(drawn.stopped)
        ended: list[tuple[Running, bool]] = []
        for at, running in sorted(self.running.items()):
            new = counts[at] - self.counts[at]
            running.tokens.append(tokens[at][:new])
            running.logprobs.append(logprobs[at][:new])
            if drawn.watched is not None:
                running.watched.append(np.asarray(drawn.watched[at])[:new])
            if not alive[at]:
                ended.append((running, bool(stopped[at])))
                self._free(at)
        self.counts, self.alive = counts.copy(), alive.copy()
        self.page = np.full_like(self.page, -1)
        return ended


class Runner:
    """Weights and caches on the device, and the programs that run on them.

    Args:
      model, engine: what is computed, and how.
      programs: the compiled programs, with their mesh.
      stats: in which the cost is counted.
      params: as in `Sampler.sample`.
      plan: the sizes of everything on the device.
      key: into which each example's id (or seed) and sample index are folded.
      stop_ids: the token ids that end a sample.
      watch: W token ids; samples then have `watched`.

    Attributes:
      batch: what runs in which lane.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        programs: Programs,
        stats: SamplerStats,
        params: Params,
        plan: Plan,
        key: jax.Array,
        stop_ids: Sequence[int] | np.ndarray,
        watch: Sequence[int] = (),
    ):
        self.model, self.engine, self.programs, self.stats = model, engine, programs, stats
        self.plan, mesh = plan, programs.mesh
        self.shards = data_parallel(mesh)
        self.data, self.everywhere = sharding(mesh, ("batch",)), replicated(mesh)
        self.heads = sharding(mesh, ("batch", None, "kv_heads"))
        self.key, self.stop_ids, self.watch = programs.put(
            (key, np.asarray(stop_ids, np.int32), np.asarray(watch, np.int32)), self.everywhere
        )
        shape, int8 = plan.shape, engine.int8_cache
        self.weights = decode_weights(
            programs, model, params, shape.lanes, int8=engine.int8_weights
        )
        sizes = model, self.shards, shape.pages, shape.page
        self.pages = self._make(
            "allocate pages",
            (self.shards, shape),
            functools.partial(cache.empty_pages, *sizes, int8=int8, on_cpu=self.programs.on_cpu),
        )
        self.reset_lanes()

    def reset_lanes(self) -> None:
        """Make empty lanes and an empty stash, on the device and in the host's arrays."""
        plan, int8 = self.plan, self.engine.int8_cache
        sizes = self.model, self.shards, plan.shape.lanes
        self.lanes = self._make(
            "allocate lanes",
            (self.shards, plan.shape.lanes, plan.ring),
            functools.partial(
                decode.empty_lanes, *sizes, plan.ring, int8=int8, on_cpu=self.programs.on_cpu
            ),
        )
        blocks = plan.stash_sizes(plan.shape.lanes)[0]
        self.stash = self._make(
            "allocate stash",
            (self.shards, blocks, plan.chunk),
            functools.partial(
                cache.empty_stash, self.model, self.shards, blocks, plan.chunk, int8=int8
            ),
        )
        self.batch = InputBatch(plan, self.shards)

    @property
    def packed(self) -> bool:
        """Whether the running samples are in fewer lanes than the plan has."""
        return self.lanes.hidden.shape[1] < self.plan.shape.lanes

    def prefill(self, pages: Sequence[tuple[Prompt, int]]) -> None:
        """Compute pages, given as (prompt, index into its pages), as many at once as is allowed."""
        most = max(1, self.engine.prefill_tokens // (self.plan.shape.page * self.shards))
        if self.plan.repeatable:
            most = 1
        for place, rows, prompts in prefill_batches(pages, self.shards, most):
            self.prefill_batch(prompts, place, rows)

    def prefill_batch(self, batch: list[list[Prompt]], place: int, rows: int) -> None:
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
                self.batch.place(page)
                self.stats.prefill_tokens += len(page.tokens)
        self.compute_pages(tokens, start, fill, earlier, targets)

    def compute_pages(self, tokens, start, fill, earlier, targets) -> None:
        """Compute and store pages; the arguments are those of `decode.compute_pages`."""
        arrays = self.programs.put((tokens, start, fill, earlier, targets), self.data)
        self.pages = self.programs.run(
            "prefill",
            (self.shards, tokens.shape[1], self.plan.shape, earlier.shape[2]),
            functools.partial(_compute_pages, config=self.model),
            self.weights,
            self.pages,
            *arrays,
            donate=(1,),
            out_shardings=self._shardings(self.pages),
        )

    def decode(self, waiting: bool, last: bool) -> list[tuple[Running, bool]]:
        """Decode a chunk of steps, and return the samples that have ended in it.

        Args:
          waiting: whether samples wait for lanes.
          last: whether none will be added before all samples have ended.

        A chunk ends early, but not in a repeatable session. While samples wait, or may be added, it
        ends once a sixteenth of the running samples have ended, so that others can begin. Otherwise
        it ends once the running samples fit into a quarter of the lanes, if they may be packed into
        these.
        """
        fixed = self.plan.repeatable
        if last and not waiting and not fixed:
            self._compact()
        if (full := self.batch.full_rings()).any():
            self.fill_stash(full)
        lanes = self.lanes.hidden.shape[1]
        total, running = self.shards * lanes, len(self.batch.running)
        shrinks = lanes // 4 >= self.engine.min_lanes and running > total // 4
        if (waiting or not last) and self.engine.refill and not fixed:
            leave = max(1, min(total, running) // 16)
        else:
            leave = running - total // 4 if shrinks and not fixed else running
        common = None if fixed else self.batch.common
        drawn = jax.device_get(self.steps(self.batch.work(), leave, common))
        self.stats.lane_steps += int(drawn.steps) * total
        return self.batch.collect(drawn)

    def steps(self, work: decode.Work, leave: int, common: SamplingConfig | None) -> decode.Drawn:
        """Run a chunk of steps for all lanes; see `decode.decode_chunk`.

        Args:
          common: settings that all lanes have in common; None where they differ.
        """
        work = self.programs.put(work, self.data)
        filters, temperature = (common.filters, common.temperature) if common else (None, 0.0)
        numbers = np.float32(temperature or 1.0), np.int32(leave)
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
            *self.programs.put(numbers, self.everywhere),
            donate=(3,),
            # Every process reads all that was drawn, so that all make the same decisions.
            out_shardings=(self._shardings(self.lanes), self.everywhere),
        )
        return drawn

    def _compact(self) -> None:
        """Pack the running samples into fewer lanes, where they fit into a quarter of them."""
        lanes = self.lanes.hidden.shape[1]
        fullest = max(collections.Counter(shard for shard, _ in self.batch.running).values())
        fewer = lanes
        while fullest <= fewer // 4 and fewer // 4 >= self.engine.min_lanes:
            fewer //= 4
        if fewer == lanes:
            return
        before = self.shards, lanes, self.stash.count
        index, blocks = self.programs.put(self.batch.compact(fewer), self.data)
        caches = self.lanes, self.stash, index, blocks
        shardings = self._shardings(jax.eval_shape(decode.take_lanes, *caches))
        shape = (*before, fewer, self.batch.owner.shape[1], self.plan.ring, self.plan.chunk)
        self.lanes, self.stash = self.programs.run(
            "compact", shape, decode.take_lanes, *caches, out_shardings=shardings
        )

    def fill_stash(self, full: np.ndarray) -> None:
        """Move the oldest tokens of rings that have no room for another chunk, those of the lanes
        in `full` [D, N], into the stash."""
        lanes, ring, chunk = full.shape[1], self.plan.ring, self.plan.chunk
        before, needed = self.stash.count, self.batch.blocks_needed(full)
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
            self.batch.grow_stash(count)
        held = self.batch.counts - self.batch.stashed
        arrays = self.programs.put((held, self.batch.stash(full)), self.data)
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


def _compute_pages(weights, *arrays, config):
    return decode.compute_pages(weights, config, *arrays)


def _decode_chunk(weights, *arrays, config, **static):
    return decode.decode_chunk(weights, config, *arrays, **static)
