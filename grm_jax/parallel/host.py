"""What a program asks of the machine that it runs on, before anything else."""

from __future__ import annotations

import os
import platform
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Start this program again with large memory pages for what it allocates (Linux with glibc).

    Called by every command that computes, before it imports much. A program that uses the library
    can be started with the variable itself: GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

    XLA allocates what a program needs on a CPU afresh each time it runs; the kernel then clears it,
    page by page, which pages of 2 MB instead of 4 KB make cheaper. The process stays the same one,
    with its number, files and signals.
    Does nothing where GLIBC_TUNABLES is set already.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
