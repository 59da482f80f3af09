"""What sampling returns, and what it cost."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
      example_id, index: the request's example, and which of its samples this is.
      tokens: int32 ids, with the stop id at the end if `finish_reason` is "stop".
      logprobs: float32, the log-probability of each token under softmax(logits / temperature).
      finish_reason: "stop", or "length" for a sample that was cut after `max_new_tokens` tokens.
      watched: float32 [T, W], the log-probabilities, under softmax(logits), that the W watched
        tokens had where each of the sample's T tokens was drawn; None where none is watched.
    """

    example_id: str
    index: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    watched: np.ndarray | None = None


@dataclasses.dataclass
class SamplerStats:
    """The cost of sampling since the sampler was made.

    Attributes:
      prefill_tokens: the prompt tokens that were computed.
      shared_tokens: the prompt tokens that were in another prompt's pages already.
      decode_tokens: the tokens of samples that have ended.
      lane_steps: decode steps times lanes, whether a lane ran a sample or not.
      samples: the samples that have ended.
      dropped: the samples that were dropped before they began.
      cancelled: the samples that were cancelled after they began.
      prefill_seconds, decode_seconds: wall time on the host, without the time of compiling.
      cache_bytes: the largest plan's bytes of caches on a device.
    """

    prefill_tokens: int = 0
    shared_tokens: int = 0
    decode_tokens: int = 0
    lane_steps: int = 0
    samples: int = 0
    dropped: int = 0
    cancelled: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def occupancy(self) -> float:
        """The share of lane steps that drew a token of a sample."""
        return self.decode_tokens / max(1, self.lane_steps)

    @property
    def seconds(self) -> float:
        """The seconds of prefill and decoding."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """The tokens of ended samples for each second of prefill and decoding."""
        return self.decode_tokens / max(self.seconds, 1e-9)

    def line(self) -> dict[str, float]:
        """Values for a progress line: tokens per second, and the percentage of busy lanes."""
        return {"tokens/s": self.tokens_per_second, "lanes%": 100 * self.occupancy}
