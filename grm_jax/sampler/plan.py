"""How much runs at once: lanes, pages and ranks for a list of requests, within a budget of bytes.

Decided before anything is allocated, from the model's shape alone, so sampling never runs out of
memory half-way. Sizes are rounded so that few programs are compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from grm_jax.errors import UserError
from grm_jax.identity import how
from grm_jax.model.config import ModelConfig
from grm_jax.sampler.schedule import Request, Shape

# A CPU gains by sharing what the prompts of an example begin with for up to so many readers. With
# more it gains nothing: every page is then multiplied by as many rows; accelerators wait for bytes
# instead. Measured by `experiments/sampler/refill.py`.
CPU_READERS = 16


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How the sampler uses the machine."""

    max_rows: int = how(256)
    """Samples decoded at once, over all data-parallel shards."""
    page: int = how(512)
    """Tokens of a page: prompts are stored, and shared, in pages."""
    prefill_tokens: int = how(8192)
    """Prompt tokens computed at once."""
    chunk: int = how(64)
    """Most decode steps between two looks of the host, which begins samples in lanes that fell
    free; drawn tokens are kept in pieces of as many."""
    min_lanes: int = how(16)
    """When nothing waits any more, those still under way are packed into a quarter of the lanes,
    and again, but not below this: each size is a program to compile."""
    spare: float = how(0.5)
    """Where samples wait for lanes: room for prompts beyond those that fill the lanes, as a share.
    The last samples of a prompt hold its pages while others have begun."""
    share: bool = how(True)
    """Prompts that begin alike share those pages."""
    refill: bool = how(True)
    """Begin waiting samples as soon as lanes fall free; False: a batch at a time."""
    int8_weights: bool = False
    """Decode with matrices of 8-bit integers: half the bytes to read a step, at some accuracy."""
    int8_cache: bool = False
    """Keep keys and values as 8-bit integers: twice as many fit, at some accuracy."""
    cache_bytes: int | None = how(None)
    """Bytes a device may spend on caches; fewer samples run at once where they do not fit. None:
    what an accelerator has free at the first rollout (`sampler.memory`); no limit on a CPU."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "page", "prefill_tokens", "chunk", "min_lanes"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)}; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is allocated on each shard.

    Attributes:
      shape: lanes, pages, ranks.
      share: whether prompts that begin alike share those pages.
      crowd: how many times as many samples as ranks a shared page may be meant for.
      limit: most tokens of a sample. chunk: most steps at once, tokens of a block of the stash.
      ring: newest tokens of each lane, read at every step.
      bytes: of pages, rings and the stash at their largest, a device.
    """

    shape: Shape
    share: bool
    crowd: int
    limit: int
    chunk: int
    ring: int
    bytes: int

    def stash_sizes(self, lanes: int) -> tuple[int, ...]:
        """Blocks of the stash of so many lanes: (0,) if the rings suffice, else as many as lanes,
        four times that, ..., enough for every sample's longest."""
        deepest = -(-(self.limit - self.ring) // self.chunk)
        sizes = [min(1, deepest) * lanes]
        while sizes[-1] < deepest * lanes:
            sizes.append(min(4 * sizes[-1], deepest * lanes))
        return tuple(sizes)

    def __str__(self) -> str:
        s = self.shape
        shared = f"each read by up to {s.ranks} of them" if s.ranks > 1 else "a copy a sample"
        heads = "shared" if self.share else "apart"
        return (
            f"{s.lanes} samples at once, up to {self.limit} tokens each; prompts in {s.pages} "
            f"pages of {s.page} tokens, {shared}, common beginnings {heads}; "
            f"{self.bytes / 2**20:,.0f} MiB of caches a device"
        )


def token_bytes(model: ModelConfig, int8: bool = False) -> int:
    """Keys and values of one token, all layers; as 8-bit integers, with a float32 scale each."""
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
    split: int = 1,
    on_cpu: bool = False,
) -> Plan:
    """The largest plan that the requests can use and the budget allows.

    Args:
      together: most samples of an example that run at once.
      split: devices that share a shard's caches, each with some of the heads.
      on_cpu: beginnings with more than `CPU_READERS` readers are not shared.

    Raises ValueError when not even one sample fits.
    """
    wanted_of: collections.Counter[str] = collections.Counter()
    for request in requests:
        wanted_of[request.example_id] += len(request.samples)
    wanted = sum(min(count, together or count) for count in wanted_of.values())
    lanes = min(max(1, engine.max_rows // shards), power_of_two(-(-wanted // shards)))
    while True:
        plan = _plan(model, engine, requests, max_new_tokens, lanes, together, split)
        if plan.share and on_cpu and plan.crowd * plan.shape.ranks > CPU_READERS:
            engine = dataclasses.replace(engine, share=False)
            plan = _plan(model, engine, requests, max_new_tokens, lanes, together, split)
        if engine.cache_bytes is None or plan.bytes <= engine.cache_bytes:
            return plan
        if lanes == 1:
            raise UserError(
                f"one sample needs {plan.bytes / 2**20:.0f} MiB of cache, and there is room for "
                f"{engine.cache_bytes / 2**20:.0f} MiB; lower the length limit (--max-new-tokens; "
                "in training --rl.sampling.max-new-tokens and the like), use more devices, or give "
                "a larger --engine.cache-bytes if that set the limit"
            )
        lanes = power_of_two(lanes) // 2


def _plan(
    model: ModelConfig,
    engine: EngineConfig,
    requests: Sequence[Request],
    max_new_tokens: int,
    lanes: int,
    together: int | None,
    split: int,
) -> Plan:
    most = together or lanes
    samples = [min(most, len(request.samples)) for request in requests]
    depths = [-(-len(request.prompt) // engine.page) for request in requests]
    # How many of an example's samples read the first page that a sample reads, on average. (A page
    # that all examples share, of the template, is there once for so many readers.)
    readers: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for index, request in enumerate(requests):
        common = engine.share and len(request.prompt) > engine.page
        first = request.prompt[: engine.page] if common else (-index - 1,)
        readers[request.example_id, first] += samples[index]
    typical = sum(n * min(n, most) for n in readers.values()) / sum(samples)
    ranks, crowd = min(lanes, power_of_two(math.ceil(typical))), 1
    queue = engine.refill and sum(len(request.samples) for request in requests) > lanes
    if queue and ranks > 1 and together is None:
        # Half of a prompt's samples at once: as some end the others begin, so that its pages are
        # read by nearly as many to the end. With all at once they would serve the last few alone.
        ranks, crowd = ranks // 2, 2
        samples = [min(count, ranks) for count in samples]
    prompts = math.ceil(lanes * sum(samples) / sum(s * s for s in samples))
    if queue:
        prompts = math.ceil((1 + engine.spare) * prompts) + 1
    deepest, total = max(depths), _distinct_pages(engine, requests)
    pages = max(deepest, math.ceil(prompts * total / len(requests)))
    pages = step_up(max(deepest, min(pages, total)))
    shape = Shape(lanes, pages, engine.page, ranks, power_of_two(deepest))
    chunk = min(engine.chunk, max_new_tokens)
    ring = min(max_new_tokens, 2 * chunk)
    plan = Plan(shape, engine.share, crowd, max_new_tokens, chunk, ring, bytes=0)
    # A stash that grows is there twice for a moment, at its old and at its new size.
    stash = sum(plan.stash_sizes(lanes)[-2:])
    tokens = pages * engine.page + lanes * plan.ring + stash * chunk
    width = token_bytes(model, engine.int8_cache)
    return dataclasses.replace(plan, bytes=tokens * width // split)


def _distinct_pages(engine: EngineConfig, requests: Sequence[Request]) -> int:
    """Pages of all prompts; those with which several prompts of an example begin count once."""
    found: set[tuple] = set()
    for index, request in enumerate(requests):
        length, size = len(request.prompt), engine.page
        for start in range(0, length, size):
            shared = engine.share and start + size < length
            piece = request.prompt[start : start + size] if shared else index
            found.add((request.example_id, start, piece))
    return len(found)


def power_of_two(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()


def step_up(value: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = power_of_two(value)
    return power * 3 // 4 if power >= 4 and value <= power * 3 // 4 else power


def at_once(waiting: int, most: int) -> int:
    """How many of the waiting prompts to compute together: 1, 8, 64, ... or `most`.

    Few sizes, each a program to compile; the next larger one where it is at least half full.
    """
    size = 1
    while size < min(waiting, most):
        larger = min(most, 8 * size)
        if 2 * waiting < larger:
            break
        size = larger
    return size
