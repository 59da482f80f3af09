"""The thread in which the judge works; nothing else of the server knows JAX.

Jobs come in through a queue of commands, and what becomes of them goes back by
`loop.call_soon_threadsafe`: the thread and the event loop share nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from grm_jax.critique.prompt import Turn
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, LabelRequest

if TYPE_CHECKING:
    from grm_jax.sampler.options import SamplingConfig

log = logging.getLogger(__name__)


class Session(Protocol):
    """What the engine's thread works with: `judge.session.JudgeSession`, or a test's fake."""

    def add(self, request: JudgeRequest) -> int: ...
    def add_chat(
        self, messages: Sequence[Turn], sampling: SamplingConfig, n: int = 1, seed: int = 0
    ) -> int: ...
    def add_scalar(self, turns: Sequence[Turn], responses: Sequence[str]) -> int: ...
    def add_labels(self, asked: LabelRequest) -> int: ...
    def cancel(self, ticket: int) -> None: ...
    def finished(self, ticket: int) -> int: ...
    def step(self) -> Sequence[tuple[int, Any]]: ...
    @property
    def idle(self) -> bool: ...


class Work(Protocol):
    """What the engine is given: a piece of work for a session."""

    @property
    def add(self) -> Callable[[Session], int]:
        """Begins it; returns the session's ticket."""
        ...


W = TypeVar("W", bound=Work)


class Listener(Protocol):
    """What the engine tells, on the event loop."""

    def on_open(self, about: Any) -> None:
        """The session is there."""

    def on_begin(self, work: Any) -> None:
        """The session has taken a piece of work."""

    def on_refused(self, work: Any, error: UserError) -> None:
        """The session can not do a piece of work."""

    def on_step(
        self,
        seconds: float,
        ended: Sequence[tuple[Any, Any]],
        running: Sequence[tuple[Any, int]],
    ) -> None:
        """A step has ended, and with it these pieces of work, each with its result; how many
        samples of those that still run have ended."""

    def on_failure(self, error: Exception) -> None:
        """The thread has ended with an error."""


class Engine(Generic[W]):
    """A session in a thread of its own.

    Args:
      open_session: makes the session, and says what is known of it.
      listener: is told what happens, on `loop`.
    """

    def __init__(
        self,
        open_session: Callable[[], tuple[Session, Any]],
        listener: Listener,
        loop: asyncio.AbstractEventLoop,
    ):
        self._open_session = open_session
        self._listener = listener
        self._loop = loop
        self._commands: queue.SimpleQueue[tuple[str, W | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def working(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def add(self, work: W) -> None:
        """Begin a piece of work."""
        self._commands.put(("add", work))

    def cancel(self, work: W) -> None:
        """Forget a piece of work, whether it has begun, or ended, or not."""
        self._commands.put(("cancel", work))

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._commands.put(("stop", None))

    # In the thread

    def _run(self) -> None:
        try:
            session, about = self._open_session()
        except (UserError, OSError) as error:  # the model can not be loaded as asked
            self._tell(self._listener.on_failure, error)
            return
        except Exception as error:
            self._fail(error)
            return
        self._tell(self._listener.on_open, about)
        try:
            self._serve(session)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        log.exception("the engine ended with an error")
        self._tell(self._listener.on_failure, error)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
            self._loop.call_soon_threadsafe(function, *args)

    def _serve(self, session: Session) -> None:
        tickets: dict[int, W] = {}
        while True:
            for what, work in self._next(block=session.idle):
                if work is None:
                    return
                if what == "cancel":
                    for ticket in [t for t, other in tickets.items() if other is work]:
                        del tickets[ticket]
                        session.cancel(ticket)
                    continue
                try:
                    tickets[work.add(session)] = work
                    self._tell(self._listener.on_begin, work)
                except UserError as error:
                    self._tell(self._listener.on_refused, work, error)
            if session.idle:
                continue
            started = time.perf_counter()
            results = session.step()
            ended = [(tickets.pop(ticket), r) for ticket, r in results if ticket in tickets]
            running = [(work, session.finished(ticket)) for ticket, work in tickets.items()]
            self._tell(self._listener.on_step, time.perf_counter() - started, ended, running)

    def _next(self, *, block: bool) -> list[tuple[str, W | None]]:
        """Commands that are there; waits for one if the session has nothing to do."""
        found = [self._commands.get()] if block else []
        while True:
            try:
                found.append(self._commands.get_nowait())
            except queue.Empty:
                return found
