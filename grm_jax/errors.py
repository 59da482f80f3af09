"""Mistakes that the user can mend: one line on the screen. All other errors keep their traceback.

A command wraps its work in `reported`, which prints a `UserError` as one line and lets everything
else through, JAX's own ValueErrors (shapes, dtypes) included: they are faults of the program, and
whoever changes the program needs the traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in options, files or the environment. The message says what to do about it."""


def describe(error: UserError | OSError) -> str:
    """The error as text for the user; for an OSError with a file, the file and the system's words.

    >>> describe(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'a.txt: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def is_users(error: BaseException) -> bool:
    """Whether `error` is for the user: a UserError, or the operating system refusing a file."""
    return isinstance(error, UserError) or (
        isinstance(error, OSError) and (error.filename is not None or bool(error.strerror))
    )
