"""The sampler: a model, and what is planned and compiled for sampling from it.

all requests at once:    sample(params, requests, ...) -> plan -> session -> samples
requests as they come:   open(params, ...)             -> plan -> session; add, step, cancel
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.parallel.mesh import data_parallel
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.memory import CacheBudget
from grm_jax.sampler.plan import EngineConfig, Plan, make_plan, open_plan
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.samples import Sample, SamplerStats
from grm_jax.sampler.schedule import Request
from grm_jax.sampler.session import Session, check
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
          key: the key of run, stage and step, into which each example's id and sample index are
            folded.
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
            on_cpu=self._on_cpu,
        )
        self._log(plan)
        session = Session(
            self, params, plan, key, longest=longest, watch=watch, wanted=wanted, together=together
        )
        for number, batch in enumerate(self._batches(requests, plan, shards)):
            if number:
                session.reset_lanes()
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
            on_cpu=self._on_cpu,
        )
        self._log(plan)
        return Session(self, params, plan, key, longest=longest_prompt, watch=watch)

    @property
    def _on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    def _log(self, plan: Plan) -> None:
        """Log a plan that is larger than those before it."""
        if plan.bytes > self.stats.cache_bytes:
            log.info("sampler          %s", plan)
            self.stats.cache_bytes = plan.bytes

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
