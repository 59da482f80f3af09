"""Reading whole text and JSON files, and writing files so that they appear whole or not at all.

A UTF-8 byte order mark is allowed and dropped. Anything else that is wrong with a file (it is
missing, a broken symbolic link, a Git LFS pointer, not UTF-8, broken JSON) is an error that names
the file, the problem and the fix.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grm_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs"


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` expanded. Raises UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such user; check the path") from None


def there(path: str | Path) -> bool:
    """Whether something has this name, even a broken symbolic link.

    Use it for optional files. `is_file` is False for a broken link, so the link would be ignored
    silently; with this function the file is read, and reading it raises an error about the link.
    """
    path = Path(path)
    return path.exists() or path.is_symlink()


def require_content(path: str | Path, kind: type[UserError] = UserError) -> None:
    """Raise `kind` for a broken symbolic link or a Git LFS pointer; reads a few bytes."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise kind(_dangling(path))
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise kind(_lfs(path))


def _dangling(path: Path) -> str:
    return (
        f"{path}: a link to {os.readlink(path)}, which is not there; download the file again, or "
        "copy it here"
    )


def _lfs(path: Path) -> str:
    return (
        f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or "
        "download the file again"
    )


def read_bytes(path: str | Path, kind: type[UserError] = UserError) -> bytes:
    """The bytes of a file, without a UTF-8 byte order mark. Raises `kind`."""
    path = Path(path)
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise kind(_dangling(path)) from None
        raise kind(f"{path}: no such file") from None
    except OSError as error:
        raise kind(f"{path}: can not be read: {error.strerror or error}") from error
    if blob.startswith(LFS_POINTER):
        raise kind(_lfs(path))
    return blob.removeprefix(BOM)


def read_text(path: str | Path, kind: type[UserError] = UserError) -> str:
    """The text of a UTF-8 file, without a byte order mark, line ends as they are. Raises `kind`."""
    blob = read_bytes(path, kind)
    try:
        return blob.decode()
    except UnicodeDecodeError as error:
        raise kind(
            f"{path}: not UTF-8: byte 0x{blob[error.start]:02x} at {error.start}; save the file as "
            "UTF-8"
        ) from None


def read_json(path: str | Path, kind: type[UserError] = UserError) -> dict[str, Any]:
    """The JSON object in a file. Raises `kind` naming the file and what is wrong."""
    text = read_text(path, kind)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise kind(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise kind(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Give this file's name to an error of the operating system that names none: one in writing to
    a file that is open says only what is wrong (no room), not where.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:  # else its words would be lost
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` at the end: it appears whole or not at all.

    An OSError names `path`, which the user knows, and not the file that was yielded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with named(path):
            try:
                yield partial
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (partial, str(partial)):
            error.filename = str(path)
        raise
