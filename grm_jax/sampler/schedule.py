"""Which sample runs in which lane and reads which pages. This is plain Python without arrays.

A lane decodes one sample at a time. A prompt is stored in pages of S tokens. A page is computed
once for the lanes of all samples that read it, up to R of them:

    prompt a  = page 0, page 1         readers of page 0: lanes 0 1 2 3
    prompt a' = page 0, page 2         readers of page 1: lanes 0 1
    (page 0: the tokens that           readers of page 2: lanes 2 3
     a and a' begin with)

When a sample ends, its lane goes to the next waiting sample: one of a prompt that is stored
already, or else one of the next request, whose pages are computed first. So all lanes are busy
until the queue is empty, whatever the lengths of samples.

Lanes and pages are split over the data-parallel shards of the mesh. A prompt and its samples stay
within one shard.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from grm_jax.sampler.options import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and the samples to be drawn from it.

    Attributes:
      example_id: together with a sample's index it determines the randomness of the sample, so that
        requests with equal ids, prompts and indices get equal samples.
      prompt: the token ids.
      samples: an index for each sample; distinct within an example.
      seed: determines the randomness in place of `example_id`, where that is not None. It need not
        be unique: requests of equal content can have one seed and ids of their own.
    """

    example_id: str
    prompt: tuple[int, ...]
    samples: tuple[int, ...]
    seed: str | None = None


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


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a shard, for which programs are compiled.

    Attributes:
      lanes: N, how many samples run at once.
      pages: P, how many pages there are.
      page: S, how many tokens a page has.
      readers: R, how many lanes may read a page at once.
      depth: M, the most pages of a prompt.
    """

    lanes: int
    pages: int
    page: int
    readers: int
    depth: int


@dataclasses.dataclass(eq=False)
class Page:
    """A page in use.

    Attributes:
      shard, index: which page it is.
      start: the position of its first token.
      tokens: its token ids.
      free: the numbers of readers, of 0 to R - 1, that no lane has.
      prompts: how many active prompts the page belongs to.
      prefix: the prompt's tokens up to the end of the page, by which other prompts find it; None if
        they may not share it.
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
    """An active request: its pages, the samples that still wait, and how many run."""

    request: Request
    sampling: SamplingConfig
    shard: int
    pages: list[Page]
    waiting: collections.deque[int]
    running: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Admission:
    """A sample that begins in a lane, which is reader number readers[m] of prompt.pages[m]."""

    shard: int
    lane: int
    prompt: Prompt
    sample: int
    readers: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Running:
    """A sample that is being decoded, with what each chunk has drawn of it."""

    admission: Admission
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    watched: list[np.ndarray] = dataclasses.field(default_factory=list)


class Scheduler:
    """Decides, between two chunks of decoding, which samples begin.

    Requests are served in the order in which they were added: while the first that waits has no
    room, no other one begins, so that none waits for ever. Those whose example has as many samples
    as run `together` are passed over.

    Args:
      shape: the sizes of a shard.
      shards: how many shards there are.
      share: whether prompts of one shard share the pages with which they begin alike.
      oversubscription: the prompts that share a page may have up to oversubscription * readers
        samples that run or wait (of each prompt, at most `together` that wait).
      wanted: called whenever samples of a request could begin; where it returns False, all of them
        that wait are dropped (adaptive k).
      together: the most samples of an example that run at once; None for no limit. Adaptive k needs
        a limit: without one, all samples may have begun before the first has ended.

    Attributes:
      running: the sample in each lane that runs one, by (shard, lane).
      dropped: how many samples were dropped.
      shared_tokens: how many prompt tokens were in pages of another prompt already.
    """

    def __init__(
        self,
        shape: Shape,
        shards: int = 1,
        *,
        share: bool = True,
        oversubscription: int = 1,
        wanted: Callable[[Request], bool] = lambda request: True,
        together: int | None = None,
    ):
        self.shape = shape
        self._together = together
        self._count: collections.Counter[str] = collections.Counter()
        self.dropped = 0
        self.shared_tokens = 0
        self._queue: collections.deque[tuple[Request, SamplingConfig]] = collections.deque()
        self._names: set[tuple[str, int]] = set()  # of all samples that wait or run
        self._share = share
        self._oversubscription = oversubscription
        self._wanted = wanted
        self._lanes = [list(range(shape.lanes))[::-1] for _ in range(shards)]
        self._pages = [list(range(shape.pages))[::-1] for _ in range(shards)]
        self._active: list[list[Prompt]] = [[] for _ in range(shards)]
        self._by_prefix: dict[tuple[int, tuple[int, ...]], Page] = {}
        self.running: dict[tuple[int, int], Admission] = {}

    def add(self, request: Request, sampling: SamplingConfig) -> None:
        """Put a request at the end of the queue.

        Raises ValueError for a sample that waits or runs already, by its example's id and index.
        """
        names = {(request.example_id, sample) for sample in request.samples}
        if len(names) < len(request.samples) or names & self._names:
            raise ValueError(f"example {request.example_id}: two samples with the same index")
        self._names |= names
        self._queue.append((request, sampling))

    def cancel(self, example_id: str) -> None:
        """Drop the samples of an example that wait, and free the lanes of those that run."""
        for request, _ in [entry for entry in self._queue if entry[0].example_id == example_id]:
            self._drop(request, request.samples)
        self._queue = collections.deque(
            entry for entry in self._queue if entry[0].example_id != example_id
        )
        for shard in self._active:
            for prompt in [p for p in shard if p.request.example_id == example_id]:
                self._drop_waiting(prompt)
                self._close(prompt)
        for at, admission in list(self.running.items()):
            if admission.prompt.request.example_id == example_id:
                self.retire(*at)

    def _drop(self, request: Request, samples: Sequence[int]) -> None:
        """Count samples that will not begin."""
        self.dropped += len(samples)
        self._names -= {(request.example_id, sample) for sample in samples}

    def _drop_waiting(self, prompt: Prompt) -> None:
        self._drop(prompt.request, list(prompt.waiting))
        prompt.waiting.clear()

    @property
    def idle(self) -> bool:
        """Whether no sample runs and none waits."""
        return not self.running and not self.waiting

    @property
    def waiting(self) -> bool:
        """Whether any sample has not begun."""
        return bool(self._queue) or any(p.waiting for shard in self._active for p in shard)

    def fill(self) -> tuple[list[tuple[Prompt, int]], list[Admission]]:
        """What begins now: pages to compute, as (prompt, index into its pages), and samples.

        The pages that come before such a page in its prompt are computed already, or are among
        those to compute.
        """
        pages: list[tuple[Prompt, int]] = []
        admissions: list[Admission] = []
        while True:
            admissions += [a for shard in range(len(self._lanes)) for a in self._admit(shard)]
            opened = self._open()
            if opened is None:
                return pages, admissions
            prompt, shared = opened
            pages += [(prompt, place) for place in range(shared, len(prompt.pages))]

    def retire(self, shard: int, lane: int) -> Admission:
        """Free the lane of a sample that has ended; it no longer reads its pages."""
        admission = self.running.pop((shard, lane))
        prompt = admission.prompt
        for page, reader in zip(prompt.pages, admission.readers, strict=True):
            page.free.append(reader)
        prompt.running -= 1
        self._count[prompt.request.example_id] -= 1
        self._names.remove((prompt.request.example_id, admission.sample))
        self._lanes[shard].append(lane)
        self._close(prompt)
        return admission

    def _admit(self, shard: int) -> list[Admission]:
        """Give free lanes to waiting samples of active prompts."""
        admissions = []
        for prompt in list(self._active[shard]):
            example = prompt.request.example_id
            if prompt.waiting and not self._wanted(prompt.request):
                self._drop_waiting(prompt)
            while prompt.waiting and self._lanes[shard] and all(p.free for p in prompt.pages):
                if self._together is not None and self._count[example] >= self._together:
                    break
                sample = prompt.waiting.popleft()
                self._count[example] += 1
                lane = self._lanes[shard].pop()
                readers = tuple(page.free.pop() for page in prompt.pages)
                prompt.running += 1
                admission = Admission(shard, lane, prompt, sample, readers)
                self.running[shard, lane] = admission
                admissions.append(admission)
            self._close(prompt)
        return admissions

    def _open(self) -> tuple[Prompt, int] | None:
        """Make the next request's prompt active, in the shard with the most free lanes that has
        room for its pages.

        Returns the prompt and how many of its pages it shares; None if no request can begin.
        """
        while self._queue and not self._wanted(self._queue[0][0]):
            request, _ = self._queue.popleft()
            self._drop(request, request.samples)
        most = self._together
        below_limit = (
            index
            for index, (request, _) in enumerate(self._queue)
            if most is None or self._count[request.example_id] < most
        )
        chosen = next(below_limit, None)
        if chosen is None:
            return None
        request, sampling = self._queue[chosen]
        by_free_lanes = sorted(range(len(self._lanes)), key=lambda shard: -len(self._lanes[shard]))
        for shard in by_free_lanes:
            if not self._lanes[shard]:
                return None
            shared = self._shared_pages(shard, request)
            missing = -(-len(request.prompt) // self.shape.page) - len(shared)
            if missing > len(self._pages[shard]):
                continue
            del self._queue[chosen]
            new = self._new_pages(shard, request, len(shared))
            samples = collections.deque(request.samples)
            prompt = Prompt(request, sampling, shard, shared + new, samples)
            for page in prompt.pages:
                page.prompts += 1
            self._active[shard].append(prompt)
            self.shared_tokens += len(shared) * self.shape.page
            return prompt, len(shared)
        return None

    def _shared_pages(self, shard: int, request: Request) -> list[Page]:
        """Pages in use that hold the beginning of the prompt and may serve its samples, too."""
        shared: list[Page] = []
        size = self.shape.page
        while self._share:
            end = (len(shared) + 1) * size
            # The page with the last token is never shared: the prompt's final state comes from it.
            page = self._by_prefix.get((shard, request.prompt[:end]))
            if end >= len(request.prompt) or page is None:
                break
            reserved = self.shape.readers - len(page.free)
            waiting = sum(
                self._at_once(len(p.waiting)) for p in self._active[shard] if page in p.pages
            )
            subscribed = reserved + waiting + self._at_once(len(request.samples))
            if subscribed > self._oversubscription * self.shape.readers:
                break
            shared.append(page)
        return shared

    def _at_once(self, samples: int) -> int:
        """How many of an example's samples may run at once."""
        return samples if self._together is None else min(samples, self._together)

    def _new_pages(self, shard: int, request: Request, shared: int) -> list[Page]:
        """Free pages for the rest of the prompt, after the `shared` pages that it shares."""
        size, new = self.shape.page, []
        for start in range(shared * size, len(request.prompt), size):
            end = start + size
            free = list(range(self.shape.readers))[::-1]
            index = self._pages[shard].pop()
            page = Page(shard, index, start, request.prompt[start:end], free)
            prefix = request.prompt[:end]
            if self._share and end < len(request.prompt):
                # Of several copies the newest is found by its prefix: it has the fewest readers.
                page.prefix = prefix
                self._by_prefix[shard, prefix] = page
            new.append(page)
        return new

    def _close(self, prompt: Prompt) -> None:
        """Free the pages of a prompt that has no samples left."""
        if prompt.waiting or prompt.running or prompt not in self._active[prompt.shard]:
            return
        self._active[prompt.shard].remove(prompt)
        for page in prompt.pages:
            page.prompts -= 1
            if not page.prompts:
                self._pages[prompt.shard].append(page.index)
                if page.prefix and self._by_prefix.get((page.shard, page.prefix)) is page:
                    del self._by_prefix[page.shard, page.prefix]


def prefill_batches(
    pages: Sequence[tuple[Prompt, int]], shards: int, most: int
) -> Iterator[tuple[int, int, list[list[Prompt]]]]:
    """Pages to compute, given as (prompt, index into its pages), in batches of equal indices.

    A page reads its prompt's earlier ones, so those with lower indices come first. Yields the
    index, how many rows are computed in each shard, and the prompts of each shard, at most as many.
    """
    for place in sorted({place for _, place in pages}):
        queues: list[list[Prompt]] = [[] for _ in range(shards)]
        for prompt, at in pages:
            if at == place:
                queues[prompt.shard].append(prompt)
        while any(queues):
            rows = at_once(max(map(len, queues)), most)
            yield place, rows, [queue[:rows] for queue in queues]
            queues = [queue[rows:] for queue in queues]


def at_once(waiting: int, most: int) -> int:
    """How many of the waiting prompts to compute together: 1, 8, 64, ... or `most`.

    There are few sizes, since each is a program to compile. A larger one is taken where the waiting
    prompts fill at least half of it.
    """
    size = 1
    while size < min(waiting, most):
        larger = min(most, 8 * size)
        if 2 * waiting < larger:
            break
        size = larger
    return size


def hash_id(example_id: str) -> tuple[int, int]:
    """A hash of an example's id: 64 bits, as two 32-bit numbers."""
    digest = hashlib.blake2b(example_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
