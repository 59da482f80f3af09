"""The host's view of the lanes: small arrays that say, for each chunk, who reads what.

Kept in NumPy and sent with every chunk; the device keeps only caches and hidden states.

Dimensions: D shards, N lanes, P pages, R ranks, M pages of a prompt, C steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from grm_jax.sampler import cache, decode
from grm_jax.sampler.schedule import Admission, Page, Shape


@dataclasses.dataclass(eq=False)
class Running:
    """A sample under way: what was drawn of it so far, a piece a chunk."""

    admission: Admission
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)


class Board:
    """Arrays of `decode.Work`, changed as samples begin and end."""

    def __init__(self, shape: Shape, shards: int):
        lanes, pages = (shards, shape.lanes), (shards, shape.pages)
        self.shape = shape
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
        self.counts[at] = 0
        self.alive[at] = True
        self.running[at] = Running(admission)

    def compact(self, lanes: int) -> np.ndarray:
        """Put the samples under way into the first `lanes` lanes of each shard.

        Returns which lane each of these was [D, lanes].
        """
        shards = range(len(self.alive))
        index = np.zeros((len(shards), lanes), np.int32)
        place: dict[tuple[int, int], int] = {}
        for shard in shards:
            for new, old in enumerate(sorted(n for s, n in self.running if s == shard)):
                index[shard, new] = old
                place[shard, old] = new
        for name in ("cell", "used", "length", "page", "names", "counts", "alive"):
            old = getattr(self, name)
            setattr(self, name, np.stack([old[shard][index[shard]] for shard in shards]))
        filled = np.bincount([shard for shard, _ in place], minlength=len(shards))
        self.alive &= np.arange(lanes) < filled[:, None]
        self.running = {(s, place[s, n]): running for (s, n), running in self.running.items()}
        for (shard, lane), running in self.running.items():
            cells = self.cell[shard, lane][: len(running.admission.ranks)]
            self.reader[shard, cells] = lane
        self.reader %= lanes  # of ranks that nobody has: any lane
        return index

    def work(self) -> decode.Work:
        """What the next chunk is given."""
        layout = cache.Layout(
            start=self.start,  # pyright: ignore[reportArgumentType]
            fill=self.fill,  # pyright: ignore[reportArgumentType]
            reader=self.reader,  # pyright: ignore[reportArgumentType]
            cell=self.cell,  # pyright: ignore[reportArgumentType]
            used=self.used,  # pyright: ignore[reportArgumentType]
            length=self.length,  # pyright: ignore[reportArgumentType]
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
        self.counts, self.alive = counts.copy(), alive.copy()
        self.page = np.full_like(self.page, -1)
        return ended


def hash_id(example_id: str) -> tuple[int, int]:
    """64 bits that name an example, as two uint32."""
    digest = hashlib.blake2b(example_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
