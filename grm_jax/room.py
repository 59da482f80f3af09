"""Whether there is room on the disk: tried, not only asked.

What is free on a disk says nothing of a quota, of `ulimit -f`, or of a directory that can not be
written. So a file of the size is made and deleted. `posix_fallocate` takes the room without
writing it; where a file system can not do that, the C library touches every block instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from grm_jax.errors import UserError
from grm_jax.parallel.multihost import any_of


def state_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays (or of their shapes) that this process writes of it.

    Each of several processes writes about the same part.
    """
    leaves = jax.tree.leaves(tree)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return -(-total // jax.process_count())


def require_room(directory: Path, need: int, what: str) -> None:
    """Raise UserError unless `need` bytes can be written to `directory` by every process.

    Call it in every process. The directory is made when it is not there.

    Args:
      need: bytes that this process will write.
      what: what needs the room, as the subject of a sentence.
    """
    trial = directory / f".room-{jax.process_index()}"
    failed: OSError | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(trial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            # Beyond `ulimit -f` the kernel also sends SIGXFSZ, which Python ignores.
            os.posix_fallocate(descriptor, 0, max(need, 1))
        finally:
            os.close(descriptor)
    except OSError as error:
        failed = error
    # All have tried before any deletes: they share the disk.
    somewhere = any_of(failed is not None)
    with contextlib.suppress(OSError):
        trial.unlink()
    if failed is not None:
        raise UserError(
            f"{directory}: {what} needs {amount(need)}, which can not be written there: "
            f"{failed.strerror}{_free(directory)}. What was saved before is untouched. Make room "
            "(the disk, a quota, `ulimit -f`, the right to write) and give the same command again"
        ) from failed
    if somewhere:
        raise UserError(f"{directory}: another process has no room for {what}; see its message")


def _free(directory: Path) -> str:
    try:
        return f" (the disk has {amount(shutil.disk_usage(directory).free)} free)"
    except OSError:
        return ""


def amount(size: int) -> str:
    """Bytes in the unit that fits.

    >>> amount(100), amount(2100), amount(3 << 30)
    ('100 bytes', '2.1 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size} bytes"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def system_words(error: BaseException) -> str:
    """The operating system's words for what went wrong, or the first line of the error's text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            where = f"{cause.filename}: " if cause.filename else ""
            return where + cause.strerror
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
