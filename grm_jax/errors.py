"""Mistakes that the user can mend: one line on the screen. All other errors keep their traceback.

A command catches `UserError` and `OSError` and prints what `describe` says. JAX's own ValueErrors
(shapes, dtypes) are faults of the program: whoever changes the program needs their traceback.
"""

from __future__ import annotations

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


_SHOWN = 20  # names listed in an error before "and n more"


class UserError(ValueError):
    """A mistake in options, files or the environment. The message says what to do about it."""


def describe(error: UserError | OSError) -> str:
    """The error as one line for the user; for an OSError the file and the system's words.

    Raises the error itself where it is not the user's: an OSError of some library, without the
    operating system's words.

    >>> describe(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'a.txt: No such file or directory'
    """
    if isinstance(error, UserError):
        return str(error)
    if not error.strerror:
        raise error
    what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if error.errno in NO_ROOM:
        what += (
            ". What was finished before is kept. Make room (the disk, a quota, `ulimit -f`) and "
            "give the same command again"
        )
    return what


def listed(names: list[str]) -> str:
    """The names, the first twenty of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
