"""What stands between clients and the engine's thread: a bounded queue, deadlines, shared answers.

    event loop                          engine's thread
    judge(request) ── Job ── add ─────► session.add(request)
         ▲                              session.step()
         └── future ◄── on_step ◄────── (ticket, Verdict)

Requests of all clients are in one session, which batches their samples together. Equal requests
that wait or run are one job with several waiters; finished ones are kept for clients that ask
again. A job whose last waiter has gone is cancelled in the session.

All of it lives on one event loop.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, LabelRequest
from grm_jax.judge.verdict import Completion, LabelLogprobs, ScalarScores, Verdict
from grm_jax.serving.engine import Engine, Session
from grm_jax.serving.limits import Limits
from grm_jax.serving.problems import (
    DeadlineExceeded,
    EngineFailed,
    Overloaded,
    ServiceProblem,
    Unavailable,
)

_RATE_SECONDS = 60.0  # what the rate of samples remembers


@dataclasses.dataclass(frozen=True)
class Served:
    """What is known of the judge that answers.

    Attributes:
      model: the name that clients see.
      fingerprint: of weights and templates.
      guided, scalar: whether it has a meta RM, a scalar RM.
      scale, single_scale: the range of a score with several responses, and with a single one.
      longest_prompt, max_new_tokens: in tokens.
      temperature: at which it was trained to be sampled.
    """

    model: str
    fingerprint: str = ""
    guided: bool = False
    scalar: bool = False
    scale: tuple[float, float] = (1.0, 10.0)
    single_scale: tuple[float, float] = (0.0, 1.0)
    longest_prompt: int = 4096
    max_new_tokens: int = 1024
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that the model goes on with, without a judge's template.

    Attributes:
      messages: (role, content); the last is the user's.
      n: how many texts. seed: equal chats with equal seeds get equal texts.
      max_new_tokens: None: the judge's own.
    """

    messages: tuple[tuple[str, str], ...]
    n: int = 1
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None


@dataclasses.dataclass
class Stats:
    """Counts since the start; `metrics.py` shows them.

    Attributes:
      finished, cancelled, refused, expired: requests that ended, whose clients went away, that
        found the queue full, that were given up at their deadline.
      shared, cached: requests answered by the work for an equal one: still running, or finished.
      samples, tokens: drawn for requests that ended. failures: critiques without scores, by name.
      busy_seconds: the engine's time in steps.
    """

    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    expired: int = 0
    shared: int = 0
    cached: int = 0
    samples: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Progress:
    """A request that has no answer yet.

    Attributes:
      state: `waiting` or `running`.
      seconds: since it was asked.
      finished: how many of its k samples have ended. k: the most that are drawn of it.
      samples: that wait or run, of all requests.
    """

    state: str
    seconds: float
    finished: int
    k: int
    samples: int


@dataclasses.dataclass(eq=False)
class _Job:
    """The work for equal requests; lives on the event loop. finished: samples that have ended."""

    key: Hashable
    add: Callable[[Session], int]
    cost: int
    waiters: set[asyncio.Future[Any]] = dataclasses.field(default_factory=set)
    running: bool = False
    finished: int = 0


class Service:
    """A judge for many clients at once.

    Args:
      open_session: makes the session; called in the engine's thread, as everything of the session.
      limits: what requests may ask for; checked for each.
      defaults: options of `ScoreOptions` that hold where a request does not say.
      cache: how many finished answers are kept for clients that ask again; 0: none.

    `start` must be called on the event loop that serves; `ready` says whether the model is loaded.
    """

    def __init__(
        self,
        open_session: Callable[[], tuple[Session, Served]],
        *,
        limits: Limits = Limits(),
        defaults: Mapping[str, Any] | None = None,
        cache: int = 1024,
    ):
        self._open_session = open_session
        self.limits = limits
        self.defaults = dict(defaults or {})
        self.stats = Stats()
        self._served: Served | None = None
        self._jobs: dict[Hashable, _Job] = {}
        self._pending = 0
        self._finished: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._cache = cache
        self._engine: Engine[_Job] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._empty: asyncio.Event = asyncio.Event()
        self._draining = False
        self._error: BaseException | None = None
        self._rate = _Rate()

    # Life

    def start(self) -> None:
        """Start the engine's thread, if it is not; returns at once."""
        if self._engine is None:
            loop = asyncio.get_running_loop()
            self._opened = loop.create_future()
            self._engine = Engine(self._open_session, self, loop)

    async def opened(self) -> None:
        """Wait until the model is loaded. Raises what loading raised."""
        assert self._opened is not None, "start() comes first"
        await asyncio.shield(self._opened)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, room in the queue aside."""
        return self._served is not None and self._error is None and not self._draining

    @property
    def alive(self) -> bool:
        """False once an error of the program has ended the engine."""
        return self._error is None

    @property
    def working(self) -> bool:
        """Whether the engine's thread is there."""
        return self._engine is not None and self._engine.working

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def served(self) -> Served:
        """The judge that answers. Raises Unavailable until it is loaded."""
        if self._served is None:
            raise Unavailable("the model is being loaded", retry_after=5)
        return self._served

    @property
    def pending(self) -> int:
        """Samples that wait or run."""
        return self._pending

    @property
    def jobs(self) -> int:
        """Requests that wait or run; equal ones are one."""
        return len(self._jobs)

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, wait for what runs, stop the thread. False: some did not end in time
        and were told so."""
        self._draining = True
        whole = True
        if self._jobs:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), seconds)
            except TimeoutError:
                whole = False
                self._fail_all(Unavailable("the server is stopping; ask another one"))
        if self._engine is not None:
            self._engine.stop()
        return whole

    # What clients ask

    def request(self, values: Mapping[str, Any]) -> JudgeRequest:
        """`JudgeRequest.from_json` with this server's defaults. Raises UserError."""
        return JudgeRequest.from_json(values, **self.defaults)

    async def judge(self, request: JudgeRequest, *, deadline: float | None = None) -> Verdict:
        """The verdict of a request.

        Args:
          deadline: seconds from now; None: the limit.

        Raises UserError for what can not be judged, and a `ServiceProblem`.
        """
        self.limits.check(request)
        key = ("judge", request.digest)
        return await self._answer(key, lambda s: s.add(request), request.samples, deadline)

    async def chat(self, chat: Chat, *, deadline: float | None = None) -> tuple[Completion, ...]:
        """`chat.n` texts. Raises as `judge` does."""
        self.limits.check_samples("n", chat.n)
        self.limits.check_tokens("max_new_tokens", chat.max_new_tokens)
        tokens = chat.max_new_tokens or self.served.max_new_tokens

        def add(session: Session) -> int:
            from grm_jax.sampler.options import SamplingConfig

            turns = [Turn(role=role, content=content) for role, content in chat.messages]
            sampling = SamplingConfig(
                temperature=chat.temperature, top_k=chat.top_k, top_p=chat.top_p,
                min_p=chat.min_p, max_new_tokens=tokens,
            )  # fmt: skip
            return session.add_chat(turns, sampling, n=chat.n, seed=chat.seed)

        return await self._answer(_key("chat", dataclasses.astuple(chat)), add, chat.n, deadline)

    async def scalar(
        self, turns: Sequence[Turn], responses: Sequence[str], *, deadline: float | None = None
    ) -> ScalarScores:
        """The scalar RM's score of each response. Raises as `judge` does."""
        self.limits.check_responses(len(responses))
        key = _key("scalar", [[turn["role"], turn["content"]] for turn in turns], list(responses))
        return await self._answer(key, lambda s: s.add_scalar(turns, responses), 1, deadline)

    async def labels(self, asked: LabelRequest, *, deadline: float | None = None) -> LabelLogprobs:
        """The log-probabilities of labels. Raises as `judge` does."""
        self.limits.check_items(len(asked.items))
        key = _key("labels", dataclasses.astuple(asked))
        return await self._answer(key, lambda s: s.add_labels(asked), 1, deadline)

    async def judge_events(
        self, request: JudgeRequest, *, deadline: float | None = None, every: float = 1.0
    ) -> AsyncGenerator[Progress | Verdict, None]:
        """Progress at once and at regular intervals, then the verdict. Raises as `judge` does."""
        started = time.monotonic()
        task = asyncio.ensure_future(self.judge(request, deadline=deadline))
        try:
            await asyncio.sleep(0)  # what is refused at once is refused before the first event
            while not task.done():
                job = self._jobs.get(("judge", request.digest))
                yield Progress(
                    state="running" if job is not None and job.running else "waiting",
                    seconds=round(time.monotonic() - started, 3),
                    finished=0 if job is None else job.finished,
                    k=request.options.k,
                    samples=self._pending,
                )
                await asyncio.wait([task], timeout=every)
            yield await task
        finally:
            task.cancel()

    # Jobs; on the event loop

    async def _answer(
        self, key: Hashable, add: Callable[[Session], int], cost: int, deadline: float | None
    ) -> Any:
        if self._error is not None:
            raise EngineFailed("the engine ended with an error; see the server's log")
        if self._draining:
            raise Unavailable("the server is stopping; ask another one, or again", retry_after=5)
        engine, _ = self._engine, self.served
        assert engine is not None
        if key in self._finished:
            self._finished.move_to_end(key)
            self.stats.cached += 1
            return self._finished[key]
        job = self._jobs.get(key)
        if job is None:
            if self._pending and self._pending + cost > self.limits.queue:
                self.stats.refused += 1
                over = self._pending + cost - self.limits.queue
                raise Overloaded(
                    f"{self._pending:,} samples wait or run, and {self.limits.queue:,} may",
                    retry_after=self._rate.seconds(over),
                )
            job = _Job(key, add, cost)
            self._jobs[key] = job
            self._pending += cost
            engine.add(job)
        else:
            self.stats.shared += 1
        waiter = asyncio.get_running_loop().create_future()
        job.waiters.add(waiter)
        limit = self.limits.deadline if deadline is None else min(deadline, self.limits.deadline)
        try:
            return await asyncio.wait_for(waiter, limit)
        except TimeoutError:
            self.stats.expired += 1
            raise DeadlineExceeded(f"no answer within {limit:g} seconds") from None
        except asyncio.CancelledError:
            self.stats.cancelled += 1
            raise
        finally:
            job.waiters.discard(waiter)
            if not job.waiters and self._jobs.get(key) is job:
                self._forget(job)
                engine.cancel(job)

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.key]
        self._pending -= job.cost
        if not self._jobs:
            self._empty.set()

    def _end(self, job: _Job, result: Any, error: Exception | None = None) -> None:
        """A job's result, from the engine."""
        if self._jobs.get(job.key) is not job:
            return  # its clients went away meanwhile
        self._forget(job)
        if error is None:
            self.stats.finished += 1
            self._count(result)
            if self._cache:
                self._finished[job.key] = result
                while len(self._finished) > self._cache:
                    self._finished.popitem(last=False)
        for waiter in job.waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(result)
            else:
                waiter.set_exception(error)

    def _count(self, result: Any) -> None:
        if isinstance(result, Verdict):
            self.stats.samples += result.usage.samples
            self.stats.tokens += result.usage.sampled_tokens
            self.stats.failures.update(result.failures)
        elif isinstance(result, tuple) and isinstance(result[0], Completion):
            self.stats.samples += len(result)
            self.stats.tokens += sum(len(completion.tokens) for completion in result)

    def _fail_all(self, error: ServiceProblem) -> None:
        for job in list(self._jobs.values()):
            self._end(job, None, error)

    # What the engine tells; see `engine.Listener`

    def on_open(self, about: Served) -> None:
        self._served = about
        if self.limits.max_new_tokens is None:
            self.limits = dataclasses.replace(self.limits, max_new_tokens=about.max_new_tokens)
        assert self._opened is not None
        self._opened.set_result(None)

    def on_begin(self, work: _Job) -> None:
        work.running = True

    def on_refused(self, work: _Job, error: UserError) -> None:
        self._end(work, None, error)

    def on_step(
        self,
        seconds: float,
        ended: Sequence[tuple[_Job, Any]],
        running: Sequence[tuple[_Job, int]],
    ) -> None:
        self.stats.busy_seconds += seconds
        self._rate.add(seconds, sum(job.cost for job, _ in ended))
        for job, result in ended:
            self._end(job, result)
        for job, finished in running:
            job.finished = finished

    def on_failure(self, error: Exception) -> None:
        self._error = error
        assert self._opened is not None
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # asked for, so that asyncio does not print it
        self._fail_all(EngineFailed("the engine ended with an error; see the server's log"))


class _Rate:
    """Samples a second of a busy engine, in which older ones count less and less."""

    def __init__(self) -> None:
        self._samples = self._seconds = 0.0

    def add(self, seconds: float, samples: int) -> None:
        kept = 2.0 ** (-seconds / _RATE_SECONDS)
        self._seconds = self._seconds * kept + seconds
        self._samples = self._samples * kept + samples

    def seconds(self, samples: int) -> float:
        """Seconds that this number of samples takes; 1 before anything was measured."""
        if not self._samples:
            return 1.0
        return min(600.0, samples * self._seconds / self._samples)


def _key(*parts: Any) -> Hashable:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
