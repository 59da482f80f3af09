"""How much runs at once: lanes, pages and their readers for the requests, within a budget of bytes.

The plan is made before anything is allocated, from the model's shape and the requests alone, so
that sampling does not run out of memory half-way. Sizes are rounded so that few programs are
compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax.errors import UserError
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import param_table
from grm_jax.parallel.mesh import data_parallel
from grm_jax.parallel.multihost import least_of
from grm_jax.sampler.cache import ring_dtype
from grm_jax.sampler.options import EngineConfig
from grm_jax.sampler.schedule import Request, Shape

MARGIN = 0.9  # the rest is for fragments and what compilers add

# On a CPU, sharing the pages with which an example's prompts begin is faster for up to this many
# readers of a page. With more it is not, since every page is then multiplied by as many rows of
# queries; an accelerator is limited by the bytes that it reads instead. Measured by
# `experiments/sampler/refill.py`.
CPU_READERS = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is allocated on each shard.

    Attributes:
      shape: lanes, pages and their readers.
      share: whether prompts share the pages with which they begin alike.
      oversubscription: of shared pages; see `schedule.Scheduler`.
      limit: the most tokens of a sample.
      chunk: the most steps of a chunk, and the tokens of a block of the stash.
      ring: the slots of each lane's ring, all of which are read at every step.
      bytes: the bytes of pages, rings and the largest stash on a device.
      repeatable: a sample's tokens and log-probabilities have the same bits whatever runs beside
        it. The sizes of all programs then stay as they are while samples come and go, and sums have
        a fixed order: chunks end early only when nothing runs, the ring has room for one chunk,
        which then goes to the lane's own blocks of the stash, and pages are computed one at a time.
    """

    shape: Shape
    share: bool
    oversubscription: int
    limit: int
    chunk: int
    ring: int
    bytes: int
    repeatable: bool = False

    def stash_sizes(self, lanes: int) -> tuple[int, ...]:
        """The sizes, in blocks, to which the stash of `lanes` lanes grows.

        They are (0,) if the rings have room for whole samples; else one block a lane, four times
        that, and so on, up to enough blocks for samples of `limit` tokens in all lanes. In a
        repeatable plan only the last.
        """
        deepest = -(-(self.limit - self.ring) // self.chunk)
        if self.repeatable:
            return (deepest * lanes,)
        sizes = [min(1, deepest) * lanes]
        while sizes[-1] < deepest * lanes:
            sizes.append(min(4 * sizes[-1], deepest * lanes))
        return tuple(sizes)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt."""
        return self.shape.depth * self.shape.page

    @property
    def grid(self) -> int:
        """The rows of queries that all pages together are multiplied by at every step."""
        return self.shape.pages * self.shape.readers

    def covers(self, other: Plan) -> bool:
        """Whether requests that `other` was made for find as much room here."""
        mine, theirs = dataclasses.astuple(self.shape), dataclasses.astuple(other.shape)
        return (
            (self.share, self.repeatable) == (other.share, other.repeatable)
            and self.shape.page == other.shape.page
            and self.limit >= other.limit
            and self.oversubscription >= other.oversubscription
            and all(a >= b for a, b in zip(mine, theirs, strict=True))
        )

    def __str__(self) -> str:
        s = self.shape
        shared = f"each read by up to {s.readers} of them" if s.readers > 1 else "a copy a sample"
        beginnings = "shared" if self.share else "apart"
        return (
            f"{s.lanes} samples at once, up to {self.limit} tokens each; prompts in {s.pages} "
            f"pages of {s.page} tokens, {shared}, common beginnings {beginnings}; "
            f"{self.bytes / 2**20:,.0f} MiB of caches a device"
        )


def token_bytes(model: ModelConfig, int8: bool = False) -> int:
    """The bytes of one token's keys and values in all layers.

    As 8-bit integers, each vector has a float32 scale.
    """
    width = jnp.dtype(model.compute_dtype).itemsize
    vector = model.head_dim + 4 if int8 else model.head_dim * width
    return model.num_layers * 2 * model.num_kv_heads * vector


def make_plan(
    model: ModelConfig,
    engine: EngineConfig,
    requests: Sequence[Request],
    max_new_tokens: int,
    shards: int,
    together: int | None = None,
    *,
    repeatable: bool = False,
    split: int = 1,
    on_cpu: bool = False,
) -> Plan:
    """The largest plan that the requests can use and the budget allows.

    Args:
      max_new_tokens: the most tokens of a sample.
      shards: how many data-parallel shards there are.
      together: the most samples of an example that run at once; None for no limit.
      repeatable: see `Plan`.
      split: over how many devices a shard's caches are split, by heads.
      on_cpu: if so, pages with more than `CPU_READERS` readers are not shared, and rings are wider
        (`cache.ring_dtype`).

    Raises UserError when not even one sample fits.
    """
    wanted_of: collections.Counter[str] = collections.Counter()
    for request in requests:
        wanted_of[request.example_id] += len(request.samples)
    wanted = sum(min(count, together or count) for count in wanted_of.values())
    lanes = min(max(1, engine.max_rows // shards), power_of_two(-(-wanted // shards)))
    while True:
        rest = requests, max_new_tokens, lanes, together, split, on_cpu, repeatable
        plan = _plan(model, engine, *rest)
        if plan.share and on_cpu and plan.oversubscription * plan.shape.readers > CPU_READERS:
            engine = dataclasses.replace(engine, share=False)
            plan = _plan(model, engine, *rest)
        if _fits(plan, engine):
            return plan
        lanes = power_of_two(lanes) // 2


def _plan(
    model: ModelConfig,
    engine: EngineConfig,
    requests: Sequence[Request],
    max_new_tokens: int,
    lanes: int,
    together: int | None,
    split: int,
    on_cpu: bool,
    repeatable: bool,
) -> Plan:
    """The plan with this many lanes, whatever its bytes."""
    most = together or lanes
    samples = [min(most, len(request.samples)) for request in requests]
    depths = [-(-len(request.prompt) // engine.page) for request in requests]
    # The average over samples of how many samples of the same example read the same first page.
    # (Pages of the template, which all examples share, are stored once for that many readers.)
    same_first: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for index, request in enumerate(requests):
        common = engine.share and len(request.prompt) > engine.page
        first = request.prompt[: engine.page] if common else (-index - 1,)
        same_first[request.example_id, first] += samples[index]
    typical = sum(n * min(n, most) for n in same_first.values()) / sum(samples)
    readers, oversubscription = min(lanes, power_of_two(math.ceil(typical))), 1
    queue = engine.refill and sum(len(request.samples) for request in requests) > lanes
    if queue and readers > 1 and together is None:
        # Half of a prompt's samples run at once. As some end the others begin, so that its pages
        # have nearly as many readers to the end. If all ran at once, the pages would be in use for
        # the last few samples alone.
        readers, oversubscription = readers // 2, 2
        samples = [min(count, readers) for count in samples]
    prompts = math.ceil(lanes * sum(samples) / sum(s * s for s in samples))
    if queue:
        prompts = math.ceil((1 + engine.spare) * prompts) + 1
    deepest, total = max(depths), _distinct_pages(engine, requests)
    pages = max(deepest, math.ceil(prompts * total / len(requests)))
    pages = step_up(max(deepest, min(pages, total)))
    shape = Shape(lanes, pages, engine.page, readers, power_of_two(deepest))
    return _sized(model, engine, shape, oversubscription, max_new_tokens, split, on_cpu, repeatable)


def joined(
    model: ModelConfig,
    engine: EngineConfig,
    plan: Plan,
    other: Plan,
    *,
    split: int = 1,
    on_cpu: bool = False,
) -> Plan:
    """A plan that covers both, where that is cheap; else `plan`.

    It is not where the budget does not allow it, where the two differ in more than their sizes, and
    where the pages of the one and the readers of the other make more than twice the work of either.
    """
    mine, theirs = dataclasses.astuple(plan.shape), dataclasses.astuple(other.shape)
    shape = Shape(*map(max, mine, theirs))
    engine = dataclasses.replace(engine, share=plan.share)
    both = _sized(
        model, engine, shape, max(plan.oversubscription, other.oversubscription),
        max(plan.limit, other.limit), split, on_cpu, plan.repeatable,
    )  # fmt: skip
    within = engine.cache_bytes is None or both.bytes <= engine.cache_bytes
    cheap = within and both.grid <= 2 * max(plan.grid, other.grid)
    return both if cheap and both.covers(plan) and both.covers(other) else plan


def _sized(
    model: ModelConfig,
    engine: EngineConfig,
    shape: Shape,
    oversubscription: int,
    max_new_tokens: int,
    split: int,
    on_cpu: bool,
    repeatable: bool = False,
) -> Plan:
    """The plan of this shape, with its bytes."""
    chunk = min(engine.chunk, max_new_tokens)
    ring = min(max_new_tokens, chunk if repeatable else 2 * chunk)
    plan = Plan(shape, engine.share, oversubscription, max_new_tokens, chunk, ring, 0, repeatable)
    # While the stash grows, the old and the new one are in memory at the same time.
    stash = sum(plan.stash_sizes(shape.lanes)[-2:])
    tokens, ringed = shape.pages * engine.page + stash * chunk, shape.lanes * plan.ring
    in_ring = model.replace(compute_dtype=ring_dtype(model, on_cpu))
    size = tokens * token_bytes(model, engine.int8_cache)
    size += ringed * token_bytes(in_ring, engine.int8_cache)
    return dataclasses.replace(plan, bytes=size // split)


def open_plan(
    model: ModelConfig,
    engine: EngineConfig,
    shards: int,
    *,
    longest_prompt: int,
    max_new_tokens: int,
    samples: int,
    readers: int,
    repeatable: bool = False,
    split: int = 1,
    on_cpu: bool = False,
) -> Plan:
    """A plan for requests that are not known yet.

    Args:
      shards, split, on_cpu: as in `make_plan`.
      longest_prompt, max_new_tokens: the most tokens of a prompt and of a sample.
      samples: how many samples run at once, on all shards together, if the budget allows.
      readers: how many samples of one prompt run at once. There is room for as many of the longest
        prompts as have `samples` samples together, and for some more (`EngineConfig.spare`).
      repeatable: see `Plan`.

    Raises UserError when not even one sample fits.
    """
    depth = -(-longest_prompt // engine.page)
    lanes = max(1, min(samples, engine.max_rows) // shards)
    while True:
        most = min(lanes, power_of_two(readers))
        share = engine.share and not (on_cpu and most > CPU_READERS)
        prompts = math.ceil((1 + engine.spare) * lanes / most) + 1
        shape = Shape(lanes, step_up(prompts * depth), engine.page, most, power_of_two(depth))
        shared = dataclasses.replace(engine, share=share)
        plan = _sized(model, shared, shape, 1, max_new_tokens, split, on_cpu, repeatable)
        if _fits(plan, engine):
            return plan
        lanes //= 2


def _fits(plan: Plan, engine: EngineConfig) -> bool:
    """Whether the budget allows a plan. Raises UserError where it does not allow one sample."""
    if engine.cache_bytes is None or plan.bytes <= engine.cache_bytes:
        return True
    if plan.shape.lanes > 1:
        return False
    raise UserError(
        f"one sample needs {plan.bytes / 2**20:.0f} MiB of cache, and there is room for "
        f"{engine.cache_bytes / 2**20:.0f} MiB; lower the length limit (--max-new-tokens; "
        "in training --rl.sampling.max-new-tokens and the like), use more devices, or give "
        "a larger --engine.cache-bytes if that set the limit"
    )


def _distinct_pages(engine: EngineConfig, requests: Sequence[Request]) -> int:
    """The pages of all prompts; those that several prompts of an example share count once."""
    distinct: set[tuple] = set()
    for index, request in enumerate(requests):
        length, size = len(request.prompt), engine.page
        for start in range(0, length, size):
            shared = engine.share and start + size < length
            piece = request.prompt[start : start + size] if shared else index
            distinct.add((request.example_id, start, piece))
    return len(distinct)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def step_up(value: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `value`."""
    power = power_of_two(value)
    return power * 3 // 4 if power >= 4 and value <= power * 3 // 4 else power


class CacheBudget:
    """The engine's sizes with a limit for caches, where the user or the devices set one."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, mesh: Mesh):
        self._model, self._engine, self._mesh = model, engine, mesh
        self.forget()

    def forget(self) -> None:
        """Ask the devices again, at the next call, what they have free. Until then the first answer
        holds: a plan that changed with every free byte would compile again and again.
        """
        self._asked, self._free = False, None

    def within(self, longest: int, *, laid_out: bool = False) -> EngineConfig:
        """Settings for prompts of at most `longest` tokens; `laid_out` as in `cache_room`."""
        if self._engine.cache_bytes is not None:
            return self._engine
        if not self._asked:
            self._asked, self._free = True, free_bytes(self._mesh)
        if self._free is None:
            return self._engine
        room = cache_room(
            self._model, self._engine, self._mesh, longest, self._free, laid_out=laid_out
        )
        return dataclasses.replace(self._engine, cache_bytes=room)


def free_bytes(mesh: Mesh) -> float | None:
    """Memory that nothing holds, on the fullest device of the mesh; None where devices do not tell
    (a CPU). All processes must ask."""
    here = jax.process_index()
    told = [d.memory_stats() for d in mesh.devices.flat if d.process_index == here]
    if not all(told):
        return None
    return least_of(min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in told))


def cache_room(
    model: ModelConfig,
    engine: EngineConfig,
    mesh: Mesh,
    length: int,
    free: float,
    *,
    laid_out: bool = False,
) -> int:
    """Bytes of caches a device has room for.

    Args:
      mesh: for decoding.
      length: of the longest prompt.
      free: bytes before the rollout.
      laid_out: the decoding weights are there already (`weights.take`), and not in `free`.
    """
    weights = 0.0 if laid_out else decode_weight_bytes(model, mesh)
    at_once = max(engine.page, engine.prefill_tokens // data_parallel(mesh))
    activations = prefill_bytes(model, mesh, at_once, length)
    return max(0, int(MARGIN * free - weights - activations))


def decode_weight_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """Weights of decoding on one device: split over the tensor axis alone, in the compute dtype."""
    width = jnp.dtype(model.compute_dtype).itemsize
    split = ("vocab", "heads", "kv_heads", "mlp")
    return float(
        sum(
            math.prod(spec.shape) * width
            / (mesh.shape["tensor"] if any(axis in split for axis in spec.axes) else 1)
            for spec in param_table(model)
        )
    )  # fmt: skip


def prefill_bytes(model: ModelConfig, mesh: Mesh, tokens: int, length: int) -> float:
    """Activations of computing `tokens` prompt tokens at once, after prompts of `length`."""
    c, width = model, jnp.dtype(model.compute_dtype).itemsize
    tensor = mesh.shape["tensor"]
    linear = tokens * (4 * c.embed_dim + 3 * c.hidden_dim / tensor) * width
    scores = 2 * tokens * length * c.num_heads / tensor * 4
    return linear + scores
