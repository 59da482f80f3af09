"""Ctrl-C and SIGTERM, from a command's first line to its last.

    with stopping.handled():                    # a command
        ...                                     # a signal raises Interrupted here
        with stopping.requested() as stop:      # a loop that saves its state
            ...                                 # a signal only sets stop.asked here

A loop of steps looks at `stop.asked` between two steps and saves. Everywhere else nothing is lost
that can be kept (sampling keeps its chunks, a model is written whole or not at all), so a signal
ends the work at once. A second signal ends the process there and then; checkpoints are atomic, so
the ones on disk are whole.

No JAX here: the handler is set before the heavy imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The work was asked to stop and has kept what it had; the message says what.

    Attributes:
      terminated: by SIGTERM (a preemption), not by Ctrl-C.
    """

    def __init__(self, message: str, *, terminated: bool = False):
        super().__init__(message)
        self.terminated = terminated


class Interrupted(KeyboardInterrupt):
    """A signal where nothing waits for the end of a step. A KeyboardInterrupt, so that no library
    takes it for an error of its own.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclasses.dataclass
class StopRequest:
    """The signal that asked the work to stop; 0: none did."""

    number: int = 0

    @property
    def asked(self) -> bool:
        return self.number != 0

    @property
    def terminated(self) -> bool:
        """Whether it was SIGTERM."""
        return self.number == signal.SIGTERM


@dataclasses.dataclass
class _State:
    signals: int = 0
    requests: list[StopRequest] = dataclasses.field(default_factory=list)


_state = _State()


def terminated(error: BaseException) -> bool:
    """Whether what ended the work was SIGTERM."""
    return isinstance(error, Interrupted) and error.number == signal.SIGTERM


def exit_code(by_sigterm: bool) -> int:
    """0 after SIGTERM: a preempted job that has kept its work did not fail. 130 after Ctrl-C."""
    return 0 if by_sigterm else 128 + signal.SIGINT


def _handle(number: int, frame: Any) -> None:
    del frame
    _state.signals += 1
    if _state.signals > 1:
        os.write(2, b"\nstopped at once; checkpoints that are on disk are whole\n")
        os._exit(128 + number)
    if not _state.requests:
        # A library's coroutines that are cut off here say so when they are collected.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise Interrupted(number)
    for request in _state.requests:
        request.number = number
    # Not through logging, which the signal may have interrupted.
    os.write(1, f"{signal.Signals(number).name}: stopping after this step\n".encode())


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle SIGINT and SIGTERM as above until the end of the block; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, _ignored(sys.unraisablehook)
    _state.signals = 0
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """A hook for exceptions that Python can not raise, for others than Interrupted: `hook`.

    A signal may come while Python collects garbage. What is raised there is only printed, and the
    work would go on as if none had come; so it is sent again a moment later.
    """

    def again(ignored: Any) -> None:
        if not isinstance(ignored.exc_value, Interrupted):
            return hook(ignored)
        _state.signals -= 1
        number = ignored.exc_value.number
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    return again


@contextlib.contextmanager
def requested() -> Iterator[StopRequest]:
    """Turn a first signal into a request that a loop looks at between steps. Also outside of
    `handled`, in programs that call a stage themselves.

    A request that came when the loop no longer looked is not lost: the block ends with Interrupted.
    """
    request = StopRequest()
    outer = signal.getsignal(signal.SIGTERM) is _handle
    with contextlib.nullcontext() if outer else handled():
        _state.requests.append(request)
        try:
            yield request
        finally:
            _state.requests.remove(request)
        if request.asked:
            raise Interrupted(request.number)
