"""The options of sampling: how tokens are drawn, and how the sampler uses the machine. No JAX."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from grm_jax.errors import UserError
from grm_jax.identity import how


class Filters(NamedTuple):
    """The static part of `SamplingConfig`: programs are compiled for it."""

    greedy: bool
    top_k: int
    top_p: float
    min_p: float


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0 is greedy. Log-probabilities are those of softmax(logits / temperature)."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 for all. Filters are for inference and not for RL
    rollouts: the reported log-probability stays that of the unfiltered distribution."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability; 1 for all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the most likely one's probability; 0 for all."""
    max_new_tokens: int = 1024
    """The most tokens of a sample; one that has not stopped by then is marked `length`."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p={self.min_p} is not in [0, 1)")
        if self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError("top_k must be >= 0 and max_new_tokens >= 1")

    @property
    def filters(self) -> Filters:
        """The static part of these settings."""
        return Filters(self.temperature == 0, self.top_k, self.top_p, self.min_p)

    @property
    def unfiltered(self) -> bool:
        """Whether reported log-probabilities are those of the distribution drawn from."""
        return self.filters == Filters(False, 0, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How the sampler uses the machine."""

    max_rows: int = how(256)
    """The most samples decoded at once, over all data-parallel shards."""
    page: int = how(512)
    """The tokens of a page; prompts are stored, and shared, in pages."""
    prefill_tokens: int = how(8192)
    """The most prompt tokens computed at once, over all shards (at least one page a shard)."""
    chunk: int = how(64)
    """The most decode steps before the host begins waiting samples in lanes that became free; also
    the tokens of a block of the stash."""
    min_lanes: int = how(16)
    """When no sample waits any more, the running ones are packed into a quarter of the lanes, and
    again later, but never into fewer lanes than this: each size is a program to compile."""
    spare: float = how(0.5)
    """Where samples wait for lanes: room for more prompts than fill the lanes, as a share of these.
    The last samples of a prompt keep its pages in use while samples of other prompts begin."""
    share: bool = how(True)
    """Prompts share the pages with which they begin alike."""
    refill: bool = how(True)
    """Begin waiting samples as soon as lanes become free; False: one batch after the other."""
    int8_weights: bool = False
    """Decode with 8-bit integer matrices: half the bytes to read at each step, but less exact."""
    int8_cache: bool = False
    """Store keys and values as 8-bit integers: twice as many fit, but less exact."""
    cache_bytes: int | None = how(None)
    """The most bytes of caches on a device; fewer samples run at once where they do not fit. None:
    what an accelerator has free at the first rollout (`CacheBudget`); no limit on a CPU."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "page", "prefill_tokens", "chunk", "min_lanes"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)}; give 1 or more")
