"""One command at a time on a run directory.

The lock is the kernel's (`flock` on `run.lock`), not the file: it goes with the process that holds
it, however that ends, and a file that is left over is no obstacle. On NFS the server keeps it for
all machines; on a file system without locks a warning says that nothing watches. Reading a run
(`evaluate`) takes none.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from grm_jax.errors import UserError
from grm_jax.parallel.multihost import any_of, first

log = logging.getLogger("grm_jax")

LOCK_FILE = "run.lock"
_held: dict[Path, int] = {}  # descriptors by file, open until the process ends


def hold(directory: str | Path) -> None:
    """Hold the run directory until this process ends; again in the same process is no error.

    Call it in every process of a run: the first one takes it for all. The directory is made.

    Raises UserError, with who holds it, when another run does.
    """
    refused: UserError | None = None
    if first():
        try:
            _take(Path(directory).absolute() / LOCK_FILE)
        except UserError as error:
            refused = error
    somewhere = any_of(refused is not None)
    if refused is not None:
        raise refused
    if somewhere:
        raise UserError(f"{directory}: in use by another run; see the first process's message")


def _take(path: Path) -> None:
    mine = _held.get(path)
    if mine is not None:
        if path.exists() and os.path.samestat(os.fstat(mine), path.stat()):
            return
        os.close(_held.pop(path))  # that directory was deleted
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 4096, 0)
        os.close(descriptor)
        raise UserError(
            f"{path.parent}: in use by {_named(holder)}. Wait for it, stop it, or give another "
            "--run-dir; nothing was changed"
        ) from error
    except OSError as error:
        log.warning(
            "%s: this file system has no locks (%s); let no other run use the directory",
            path.parent, error.strerror,
        )  # fmt: skip
    _held[path] = descriptor
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)


def _named(holder: bytes) -> str:
    try:
        about = json.loads(holder)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "another process"
