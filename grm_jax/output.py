"""Standard output that may be closed early, as in `evaluate ... | head`: the command continues."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Drop what is printed after standard output was closed by its reader, without an error."""
    stream = sys.stdout
    sys.stdout = cast(TextIO, _Surviving(stream))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stream


class _Surviving:
    """A text stream that drops its output once its reader has closed the pipe."""

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
        """Redirect the stream, with what is still in its buffer, to the null device."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
