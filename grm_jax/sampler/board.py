"""The host's view of the lanes: small arrays that say, for each chunk, which lane reads what.

They are NumPy arrays and are sent with every chunk; only caches and hidden states stay on the
device.

Dimensions: D shards, N lanes, P pages, R ranks of a page, M pages of a prompt, C steps of a chunk
and tokens of a block of the stash, B blocks of the stash.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from grm_jax.sampler import attend, decode
from grm_jax.sampler.draw import Filters, Settings
from grm_jax.sampler.plan import Plan
from grm_jax.sampler.schedule import Admission, Page

# The arrays of a board with an entry for each lane.
LANE_ARRAYS = (
    "cell", "used", "length", "page", "names", "counts", "alive", "stashed",
    "temperature", "limit", "top_k", "top_p", "min_p",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Running:
    """A sample that is being decoded, with what each chunk has drawn of it."""

    admission: Admission
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    watched: list[np.ndarray] = dataclasses.field(default_factory=list)


class Board:
    """The arrays of `decode.Work`, which are updated as samples begin and end.

    Attributes:
      running: the sample in each lane that runs one, by (shard, lane).
    The arrays are described in `attend.Layout` and `decode.Work`.
    """

    def __init__(self, plan: Plan, shards: int):
        shape = plan.shape
        lanes, pages = (shards, shape.lanes), (shards, shape.pages)
        self.plan, self.shape = plan, shape
        self.start = np.zeros(pages, np.int32)
        self.fill = np.zeros(pages, np.int32)
        self.reader = np.zeros((shards, shape.pages * shape.ranks), np.int32)
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
            page.index * self.shape.ranks + rank
            for page, rank in zip(pages, admission.ranks, strict=True)
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
    def filters(self) -> Filters | None:
        """The filters that all running samples have in common; None where they differ."""
        found = {running.admission.prompt.sampling.filters for running in self.running.values()}
        return found.pop() if len(found) == 1 else None

    def crowded(self) -> np.ndarray:
        """Lanes [D, N] whose ring has no room for another chunk, so that their oldest C tokens must
        be moved to the stash."""
        ahead = np.minimum(self.plan.chunk, self.limit - self.counts)
        return self.alive & (self.counts - self.stashed + ahead > self.plan.ring)

    def blocks_needed(self, crowded: np.ndarray) -> int:
        """The blocks of the stash that the fullest shard needs once crowded lanes got one more."""
        return int(np.max(np.sum(self.owner >= 0, axis=1) + np.sum(crowded, axis=1)))

    def grow_stash(self, count: int) -> None:
        """Record that each shard's stash has `count` blocks now."""
        more = ((0, 0), (0, count - self.owner.shape[1]))
        self.owner = np.pad(self.owner, more, constant_values=-1)
        self.offset = np.pad(self.offset, more)

    def stash(self, crowded: np.ndarray) -> np.ndarray:
        """Assign a free block of the stash to each crowded lane: in a repeatable plan the next of
        the lane's own blocks, else any.

        Returns the block of each lane [D, N], and an index out of range for the other lanes.
        """
        targets = np.full(crowded.shape, self.owner.shape[1], np.int32)
        for shard, in_shard in enumerate(crowded):
            (lanes,) = np.nonzero(in_shard)
            if self.plan.repeatable:
                own = self.owner.shape[1] // crowded.shape[1]
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
            cells = self.cell[shard, lane][: len(running.admission.ranks)]
            self.reader[shard, cells] = lane
        self.reader %= lanes  # a free rank may name any lane, but one that exists
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
            name: getattr(self, name) for name in ("page", "names", "counts", "alive")
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


def hash_id(example_id: str) -> tuple[int, int]:
    """A hash of an example's id: 64 bits, as two 32-bit numbers."""
    digest = hashlib.blake2b(example_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
