"""The sampler: a model from which samples are drawn, all at once or as requests come.

    all requests at once:    sample(params, requests, ...) -> plan -> session -> samples
    requests as they come:   open(params, ...)             -> plan -> session; add, step, cancel
    the first ones known:    plan(params, requests, ...)   -> plan; open_planned -> session

A session begins waiting samples, prefills the pages of their prompts, decodes a chunk of steps, and
returns the samples that ended in it. Between chunks, free lanes are given to waiting samples
(continuous batching), so that no sample waits for a longer one to end. `schedule` decides which
sample runs where, `runner` has the device.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.errors import UserError
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.plan import CacheBudget, Plan, joined, make_plan, open_plan, power_of_two
from grm_jax.sampler.programs import Programs, SamplerStats
from grm_jax.sampler.runner import Runner
from grm_jax.sampler.schedule import Request, Running, Sample, Scheduler, Shape
from grm_jax.sampler.weights import laid_out, take

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
        watch: Sequence[int] = (),
    ) -> Iterator[Sample]:
        """Yield every sample of every request as it ends, in no particular order.

        Args:
          params: the tree of `model.params`, with or without LoRA adapters, or what `take`
            returned.
          requests: the prompts, and the samples to be drawn from each.
          sampling: how tokens are drawn, and the most tokens of a sample.
          key: the key of run, stage and step, into which each request's seed (or else its example's
            id) and sample index are folded.
          wanted: called when samples of a request could begin; where it returns False, those that
            wait are dropped.
          together: the most samples of an example that run at once; None for no limit.
          watch: the token ids whose log-probabilities each sample has in `watched`.

        Raises UserError for an empty prompt, and for one that leaves no room within the model's
        positions or the cache; ValueError for a `together` below 1.
        """
        requests = [request for request in requests if request.samples]
        if together is not None and together < 1:
            raise ValueError(f"together={together}; at least one sample of an example must run")
        if not requests:
            return
        shards = data_parallel(self.mesh)
        longest = max(len(request.prompt) for request in requests)
        for request in requests:
            check(request, sampling, self.model)
        plan = make_plan(
            self.model,
            self.budget.within(longest, laid_out=laid_out(params)),
            requests,
            sampling.max_new_tokens,
            shards,
            together,
            split=self.mesh.shape["tensor"],
            on_cpu=self.programs.on_cpu,
        )
        runner = self._runner(params, plan, key, watch)
        session = Session(runner, longest, wanted=wanted, together=together)
        for number, batch in enumerate(self._batches(requests, plan, shards)):
            if number:
                session.reset()
            for request in batch:
                session.add(request, sampling)
            yield from session.drain()

    def open(
        self,
        params: Params,
        *,
        longest_prompt: int,
        max_new_tokens: int,
        samples: int,
        key: jax.Array,
        readers: int = 8,
        watch: Sequence[int] = (),
        repeatable: bool = False,
    ) -> Session:
        """A session for requests that are not known yet, with settings of their own.

        Args:
          params: as in `sample`.
          longest_prompt: the most tokens of a prompt.
          max_new_tokens: the most tokens of a sample.
          samples: how many samples run at once at most, on all shards together. Fewer do where the
            memory for caches (`CacheBudget`) does not suffice.
          key: as in `sample`.
          readers: how many samples of one prompt run at once at most. With many, a prompt's pages
            are read once for all of them; with few, there is room for more prompts.
          watch: as in `sample`.
          repeatable: give a sample the same bits whatever runs beside it, at some cost (see
            `plan.Plan`). On other devices, or with another plan, they may differ.

        Raises UserError where one sample needs more memory than there is.
        """
        plan = open_plan(
            self.model,
            self.budget.within(longest_prompt, laid_out=laid_out(params)),
            data_parallel(self.mesh),
            longest_prompt=longest_prompt,
            max_new_tokens=max_new_tokens,
            samples=samples,
            readers=readers,
            repeatable=repeatable,
            split=self.mesh.shape["tensor"],
            on_cpu=self.programs.on_cpu,
        )
        return Session(self._runner(params, plan, key, watch), longest_prompt)

    def plan(
        self,
        params: Params,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        longest_prompt: int,
        samples: int = 1,
        also: Plan | None = None,
    ) -> Plan:
        """The plan of a repeatable session that begins with these requests and takes more later.

        Args:
          params: as in `sample`.
          requests: the first ones. The plan has room for as many of them as run together.
          max_new_tokens: as in `open`.
          longest_prompt: the most tokens of a later prompt, where it is longer than these.
          samples: how many samples run at once at least, on all shards together.
          also: the plan of earlier requests, which is covered, too, where that is cheap
            (`plan.joined`).

        Raises UserError where one sample needs more memory than there is.
        """
        shards = data_parallel(self.mesh)
        longest = max(longest_prompt, *(len(request.prompt) for request in requests))
        engine = self.budget.within(longest, laid_out=laid_out(params))
        split, on_cpu = self.mesh.shape["tensor"], self.programs.on_cpu
        plan = make_plan(
            self.model, engine, requests, max_new_tokens, shards,
            repeatable=True, split=split, on_cpu=on_cpu,
        )  # fmt: skip
        pages = -(-longest // engine.page)
        least = Shape(max(1, samples // shards), pages, engine.page, 1, power_of_two(pages))
        for other in (dataclasses.replace(plan, shape=least), also):
            if other is not None:
                plan = joined(self.model, engine, plan, other, split=split, on_cpu=on_cpu)
        return plan

    def open_planned(
        self, params: Params, plan: Plan, *, key: jax.Array, watch: Sequence[int] = ()
    ) -> Session:
        """A session of a plan that `plan` has made; the arguments are those of `open`."""
        return Session(self._runner(params, plan, key, watch), plan.longest)

    def _runner(self, params: Params, plan: Plan, key: jax.Array, watch: Sequence[int]) -> Runner:
        """What the plan says on the device; a plan that is larger than those before is logged."""
        if plan.bytes > self.stats.cache_bytes:
            log.info("sampler          %s", plan)
            self.stats.cache_bytes = plan.bytes
        return Runner(
            self.model, self.engine, self.programs, self.stats,
            params, plan, key, self.stop_ids, watch,
        )  # fmt: skip

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


class Session:
    """A queue of requests, and the lanes in which their samples run.

    `Sampler.open` makes one. It is not thread-safe: one thread adds, steps and cancels. After an
    exception from `step` the caches are lost; open another session.

    Args:
      runner: weights and caches on the device.
      longest: the most tokens of a prompt.
      wanted, together: as in `Sampler.sample`.
    """

    def __init__(
        self,
        runner: Runner,
        longest: int,
        *,
        wanted: Callable[[Request], bool] = lambda request: True,
        together: int | None = None,
    ):
        self.runner, self.longest = runner, longest
        self.model, self.plan, self.stats = runner.model, runner.plan, runner.stats
        self._wanted, self._together = wanted, together
        self.scheduler = self._new_scheduler()

    def reset(self) -> None:
        """Forget all samples, and empty the lanes; all have their first order again."""
        self.runner.reset_lanes()
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.plan.shape,
            self.runner.shards,
            share=self.plan.share,
            oversubscription=self.plan.oversubscription,
            wanted=self._wanted,
            together=self._together,
        )

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
        if self.runner.packed:
            if not self.idle:
                raise ValueError("nothing can be added until `drain` has ended")
            self.reset()
        if request.samples:
            self.scheduler.add(request, sampling)

    def warm_up(self) -> None:
        """Compile all that later steps can need, and run it once with nothing to do.

        Nothing is sampled, and no later sample changes. Raises ValueError unless the session is
        repeatable: in others it depends on the requests which programs are needed.
        """
        if not self.plan.repeatable:
            raise ValueError("only the programs of a repeatable session are known beforehand")
        runner = self.runner
        pages = -(-self.longest // self.plan.shape.page)
        # One page for each size to which the number of pages before it is rounded.
        places = {power_of_two(place) if place else 0: place for place in range(pages)}
        for place in places.values():
            runner.prefill_batch([[] for _ in range(runner.shards)], place, 1)
        runner.steps(runner.batch.work(), 0, None)
        if runner.stash.count:
            runner.fill_stash(np.zeros_like(runner.batch.alive))
        jax.block_until_ready((runner.pages, runner.lanes, runner.stash))

    def cancel(self, example_id: str) -> None:
        """Drop the samples of an example that wait, and free the lanes of those that run.

        Its samples that have not been returned never are. Nothing happens for an unknown example.
        """
        self.stats.cancelled += self.runner.batch.cancel(example_id)
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

    def _step(self, *, last: bool) -> list[Sample]:
        """As `step`; `last`: nothing will be added before all samples have ended."""
        pages, admissions = self.scheduler.fill()
        self._count_prompts()
        started = self._clock()
        self.runner.prefill(pages)
        for admission in admissions:
            self.runner.batch.admit(admission)
        jax.block_until_ready(self.runner.pages.last)
        self.stats.prefill_seconds += self._clock() - started
        waiting = self.scheduler.waiting
        if not self.runner.batch.running:
            assert not waiting, "samples wait, and none can begin"
            return []
        started = self._clock()
        ended = self.runner.decode(waiting, last)
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
        return time.perf_counter() - sum(c.seconds for c in self.runner.programs.compilations)

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
