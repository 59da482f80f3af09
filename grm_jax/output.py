"""Standard output whose reader may leave, as in `evaluate ... | head`: the work goes on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """What is printed after the reader of standard output has left is dropped, without an error."""
    stream = sys.stdout
    sys.stdout = cast(TextIO, _Surviving(stream))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stream


class _Surviving:
    """A text stream that drops what can not be written for want of a reader."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Lead what is still to come, and what waits in the buffer, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
