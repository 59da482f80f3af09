"""The host's view of the lanes: small arrays that say, for each chunk, who reads what.

Kept in NumPy and sent with every chunk; the device keeps only caches and hidden states.

Dimensions: D shards, N lanes, P pages, R ranks, M pages of a prompt, C steps of a chunk, B blocks
of the stash.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from grm_jax.sampler import attend, decode
from grm_jax.sampler.plan import Plan
from grm_jax.sampler.schedule import Admission, Page


@dataclasses.dataclass(eq=False)
class Running:
    """A sample under way: what was drawn of it so far, a piece a chunk."""

    admission: Admission
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)


class Board:
    """Arrays of `decode.Work`, changed as samples begin and end."""

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
        self.running: dict[tuple[int, int], Running] = {}

    def place(self, page: Page) -> None:
        """A page has been computed."""
        self.start[page.shard, page.index] = page.start
        self.fill[page.shard, page.index] = len(page.tokens)

    def admit(self, admission: Admission) -> None:
        """A sample begins in its lane."""
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
        self.names[at] = (*hash_id(request.example_id), admission.sample)
        self.counts[at] = self.stashed[at] = 0
        self.alive[at] = True
        self.running[at] = Running(admission)

    def crowded(self) -> np.ndarray:
        """Lanes [D, N] whose ring has no room for a chunk more: their oldest C tokens must go."""
        ahead = np.minimum(self.plan.chunk, self.plan.limit - self.counts)
        return self.alive & (self.counts - self.stashed + ahead > self.plan.ring)

    def blocks_needed(self, crowded: np.ndarray) -> int:
        """Blocks of the stash that a shard needs, the fullest."""
        return int(np.max(np.sum(self.owner >= 0, axis=1) + np.sum(crowded, axis=1)))

    def grow_stash(self, count: int) -> None:
        """The stash has `count` blocks now."""
        more = ((0, 0), (0, count - self.owner.shape[1]))
        self.owner = np.pad(self.owner, more, constant_values=-1)
        self.offset = np.pad(self.offset, more)

    def stash(self, crowded: np.ndarray) -> np.ndarray:
        """Give each crowded lane a free block; returns which [D, N], for others out of range."""
        targets = np.full(crowded.shape, self.owner.shape[1], np.int32)
        for shard, lanes in enumerate(crowded):
            (which,) = np.nonzero(lanes)
            blocks = np.nonzero(self.owner[shard] < 0)[0][: len(which)]
            targets[shard, which] = blocks
            self.owner[shard, blocks] = which
            self.offset[shard, blocks] = self.stashed[shard, which]
            self.stashed[shard, which] += self.plan.chunk
        return targets

    def compact(self, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """Put the samples under way into the first `lanes` lanes of each shard.

        Returns which lane each of these was [D, lanes], and which block of the stash each of those
        that are left was [D, B'].
        """
        shards = range(len(self.alive))
        index = np.zeros((len(shards), lanes), np.int32)
        place: dict[tuple[int, int], int] = {}
        for shard in shards:
            for new, old in enumerate(sorted(n for s, n in self.running if s == shard)):
                index[shard, new] = old
                place[shard, old] = new
        for name in ("cell", "used", "length", "page", "names", "counts", "alive", "stashed"):
            old = getattr(self, name)
            setattr(self, name, np.stack([old[shard][index[shard]] for shard in shards]))
        filled = np.bincount([shard for shard, _ in place], minlength=len(shards))
        self.alive &= np.arange(lanes) < filled[:, None]
        self.running = {(s, place[s, n]): running for (s, n), running in self.running.items()}
        for (shard, lane), running in self.running.items():
            cells = self.cell[shard, lane][: len(running.admission.ranks)]
            self.reader[shard, cells] = lane
        self.reader %= lanes  # of ranks that nobody has: any lane
        return index, self._compact_stash(lanes, place)

    def _compact_stash(self, lanes: int, place: dict[tuple[int, int], int]) -> np.ndarray:
        """The blocks in use first, no more than `lanes` can need."""
        blocks = min(self.owner.shape[1], self.plan.stash_sizes(lanes)[-1])
        taken = np.argsort(self.owner < 0, axis=1, kind="stable")[:, :blocks].astype(np.int32)
        self.offset = np.take_along_axis(self.offset, taken, axis=1)
        owner = np.take_along_axis(self.owner, taken, axis=1)
        for at in zip(*np.nonzero(owner >= 0), strict=True):
            owner[at] = place[int(at[0]), int(owner[at])]
        self.owner = owner
        return taken

    def work(self) -> decode.Work:
        """What the next chunk is given."""
        layout = attend.Layout(
            start=self.start,  # pyright: ignore[reportArgumentType]
            fill=self.fill,  # pyright: ignore[reportArgumentType]
            reader=self.reader,  # pyright: ignore[reportArgumentType]
            cell=self.cell,  # pyright: ignore[reportArgumentType]
            used=self.used,  # pyright: ignore[reportArgumentType]
            length=self.length,  # pyright: ignore[reportArgumentType]
            stashed=self.stashed,  # pyright: ignore[reportArgumentType]
            owner=self.owner,  # pyright: ignore[reportArgumentType]
            offset=self.offset,  # pyright: ignore[reportArgumentType]
        )
        return decode.Work(layout, self.page, self.names, self.counts, self.alive)  # pyright: ignore[reportArgumentType]

    def collect(self, drawn: decode.Drawn) -> list[tuple[Running, bool]]:
        """Take in what a chunk drew; returns the samples that have ended, with: by a stop id?"""
        counts, alive = np.asarray(drawn.counts), np.asarray(drawn.alive)
        tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
        stopped = np.asarray(drawn.stopped)
        ended: list[tuple[Running, bool]] = []
        for at, running in sorted(self.running.items()):
            new = counts[at] - self.counts[at]
            running.tokens.append(tokens[at][:new])
            running.logprobs.append(logprobs[at][:new])
            if not alive[at]:
                ended.append((running, bool(stopped[at])))
                del self.running[at]
                shard, lane = at
                self.owner[shard, self.owner[shard] == lane] = -1
                self.stashed[at] = 0
        self.counts, self.alive = counts.copy(), alive.copy()
        self.page = np.full_like(self.page, -1)
        return ended


def hash_id(example_id: str) -> tuple[int, int]:
    """64 bits that name an example, as two uint32."""
    digest = hashlib.blake2b(example_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
