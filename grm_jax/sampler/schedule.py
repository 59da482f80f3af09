"""Which sample runs where: lanes, pages of prompts, ranks. Pure Python, no arrays.

A lane decodes one sample at a time. A prompt lies in pages of S tokens; a page serves the lanes of
all the samples that read it, each at a rank 0..R-1, and is computed once:

    prompt a  = page 0, page 1         page 0: lanes 0 1 2 3     ranks 0 1 2 3
    prompt a' = page 0, page 2         page 1: lanes 0 1         ranks 0 1
    (page 0: the tokens that           page 2: lanes 2 3         ranks 0 1
     a and a' begin with)

When a sample ends, its lane goes to the next sample that waits: of a prompt that is there already,
else of the next request, whose pages are computed first. So lanes stay busy to the end of the
queue, whatever the lengths.

Lanes and pages are split over the data-parallel shards of the mesh; a prompt and its samples stay
within one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted of it.

    Attributes:
      example_id: names the randomness, with the sample's index: equal ids get equal samples.
      prompt: token ids.
      samples: an index for each sample; distinct within an example.
    """

    example_id: str
    prompt: tuple[int, ...]
    samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a shard; programs are compiled for them.

    Attributes:
      lanes: N, samples that run at once.
      pages: P. page: S, tokens of a page. ranks: R, lanes that may read a page at once.
      depth: M, most pages of a prompt.
    """

    lanes: int
    pages: int
    page: int
    ranks: int
    depth: int


@dataclasses.dataclass(eq=False)
class Page:
    """A page in use.

    Attributes:
      start: position of its first token.
      free: ranks nobody has. prompts: how many active prompts it belongs to.
      prefix: the prompt up to its end, under which it can be found; None if it is not shared.
    """

    shard: int
    index: int
    start: int
    tokens: tuple[int, ...]
    free: list[int]
    prompts: int = 0
    prefix: tuple[int, ...] | None = None


@dataclasses.dataclass(eq=False)
class Prompt:
    """An active request: its pages and the samples that still wait."""

    request: Request
    shard: int
    pages: list[Page]
    waiting: collections.deque[int]
    running: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Admission:
    """A sample that begins in a lane; ranks[m] is its rank in prompt.pages[m]."""

    shard: int
    lane: int
    prompt: Prompt
    sample: int
    ranks: tuple[int, ...]


class Scheduler:
    """Decides, between two chunks of decoding, what begins.

    Args:
      requests: in the order in which they are to be served.
      share: whether prompts of one shard that begin alike share those pages.
      crowd: a page is shared by prompts with up to so many times as many samples as it has ranks.
      wanted: asked before a sample begins, and not again; False drops it (adaptive k).
      together: most samples of an example that run at once; None: no limit. Adaptive k needs one,
        or all of them have begun before the first has ended.

    Attributes:
      dropped: samples that were not wanted.
      shared_tokens: prompt tokens that were there already.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        shape: Shape,
        shards: int = 1,
        *,
        share: bool = True,
        crowd: int = 1,
        wanted: Callable[[Request], bool] = lambda request: True,
        together: int | None = None,
    ):
        self.shape = shape
        self._together = together
        self._count: collections.Counter[str] = collections.Counter()
        self.dropped = 0
        self.shared_tokens = 0
        self._queue = collections.deque(requests)
        self._share = share
        self._crowd = crowd
        self._wanted = wanted
        self._lanes = [list(range(shape.lanes))[::-1] for _ in range(shards)]
        self._pages = [list(range(shape.pages))[::-1] for _ in range(shards)]
        self._active: list[list[Prompt]] = [[] for _ in range(shards)]
        self._known: dict[tuple[int, tuple[int, ...]], Page] = {}
        self.running: dict[tuple[int, int], Admission] = {}

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    @property
    def waiting(self) -> bool:
        """Whether any sample has not begun."""
        return bool(self._queue) or any(p.waiting for shard in self._active for p in shard)

    def fill(self) -> tuple[list[tuple[Prompt, int]], list[Admission]]:
        """What begins now: pages to compute, as (prompt, place), and samples in their lanes.

        A page's earlier ones, in the order of places, are there or among those to compute.
        """
        pages: list[tuple[Prompt, int]] = []
        admissions: list[Admission] = []
        while True:
            admissions += [a for shard in range(len(self._lanes)) for a in self._admit(shard)]
            opened = self._open()
            if opened is None:
                return pages, admissions
            prompt, known = opened
            pages += [(prompt, place) for place in range(known, len(prompt.pages))]

    def retire(self, shard: int, lane: int) -> Admission:
        """The sample in a lane has ended."""
        admission = self.running.pop((shard, lane))
        prompt = admission.prompt
        for page, rank in zip(prompt.pages, admission.ranks, strict=True):
            page.free.append(rank)
        prompt.running -= 1
        self._count[prompt.request.example_id] -= 1
        self._lanes[shard].append(lane)
        self._close(prompt)
        return admission

    def _admit(self, shard: int) -> list[Admission]:
        """Give free lanes to samples of prompts that are there."""
        found = []
        for prompt in list(self._active[shard]):
            example = prompt.request.example_id
            if prompt.waiting and not self._wanted(prompt.request):
                self.dropped += len(prompt.waiting)
                prompt.waiting.clear()
            while prompt.waiting and self._lanes[shard] and all(p.free for p in prompt.pages):
                if self._together is not None and self._count[example] >= self._together:
                    break
                sample = prompt.waiting.popleft()
                self._count[example] += 1
                lane = self._lanes[shard].pop()
                ranks = tuple(page.free.pop() for page in prompt.pages)
                prompt.running += 1
                admission = Admission(shard, lane, prompt, sample, ranks)
                self.running[shard, lane] = admission
                found.append(admission)
            self._close(prompt)
        return found

    def _open(self) -> tuple[Prompt, int] | None:
        """Make the next request's prompt active where most lanes are free.

        Returns it and how many of its pages are there already; None if no request can begin.
        """
        while self._queue and not self._wanted(self._queue[0]):
            self.dropped += len(self._queue.popleft().samples)
        most = self._together
        found = (
            index
            for index, request in enumerate(self._queue)
            if most is None or self._count[request.example_id] < most
        )
        place = next(found, None)
        if place is None:
            return None
        request = self._queue[place]
        room = sorted(range(len(self._lanes)), key=lambda shard: -len(self._lanes[shard]))
        for shard in room:
            if not self._lanes[shard]:
                return None
            known = self._find(shard, request)
            missing = -(-len(request.prompt) // self.shape.page) - len(known)
            if missing > len(self._pages[shard]):
                continue
            del self._queue[place]
            new = self._take(shard, request, len(known))
            prompt = Prompt(request, shard, known + new, collections.deque(request.samples))
            for page in prompt.pages:
                page.prompts += 1
            self._active[shard].append(prompt)
            self.shared_tokens += len(known) * self.shape.page
            return prompt, len(known)
        return None

    def _find(self, shard: int, request: Request) -> list[Page]:
        """Pages in use that hold the beginning of the prompt and have ranks for its samples."""
        found: list[Page] = []
        size = self.shape.page
        while self._share:
            end = (len(found) + 1) * size
            # Never the last token: a prompt's final state comes from a page of its own.
            page = self._known.get((shard, request.prompt[:end]))
            if end >= len(request.prompt) or page is None:
                break
            reserved = self.shape.ranks - len(page.free)
            waiting = sum(
                self._at_once(len(p.waiting)) for p in self._active[shard] if page in p.pages
            )
            meant = reserved + waiting + self._at_once(len(request.samples))
            if meant > self._crowd * self.shape.ranks:
                break
            found.append(page)
        return found

    def _at_once(self, samples: int) -> int:
        """So many of an example's samples as may run at once."""
        return samples if self._together is None else min(samples, self._together)

    def _take(self, shard: int, request: Request, known: int) -> list[Page]:
        """Free pages for the rest of the prompt after `known` pages."""
        size, new = self.shape.page, []
        for start in range(known * size, len(request.prompt), size):
            end = start + size
            ranks = list(range(self.shape.ranks))[::-1]
            index = self._pages[shard].pop()
            page = Page(shard, index, start, request.prompt[start:end], ranks)
            prefix = request.prompt[:end]
            if self._share and end < len(request.prompt):
                # The newest copy is the one that is found: it has the most ranks free.
                page.prefix = prefix
                self._known[shard, prefix] = page
            new.append(page)
        return new

    def _close(self, prompt: Prompt) -> None:
        """Let go of a prompt that has no samples left."""
        if prompt.waiting or prompt.running or prompt not in self._active[prompt.shard]:
            return
        self._active[prompt.shard].remove(prompt)
        for page in prompt.pages:
            page.prompts -= 1
            if not page.prompts:
                self._pages[prompt.shard].append(page.index)
                if page.prefix and self._known.get((page.shard, page.prefix)) is page:
                    del self._known[page.shard, page.prefix]
