"""What a disk does: no room, a limit, a quota, nothing can be written, something not deleted.

Most of it mounts file systems, so it needs root; the quota is Btrfs's (mkfs.btrfs, btrfs), which
binds root, too.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import Faults, complaint, run, whole_checkpoints


def call(*words: object) -> None:
    output(*words)


def output(*words: object) -> str:
    return subprocess.run(
        [str(word) for word in words], check=True, capture_output=True, text=True
    ).stdout


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """Memory as a disk of this size at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        call("umount", folder)


@contextlib.contextmanager
def bound(source: Path, target: Path, *, readonly: bool = False) -> Iterator[None]:
    """`target` is `source` for a while."""
    call("mount", "--bind", source, target)
    try:
        if readonly:
            call("mount", "-o", "remount,bind,ro", target)
        yield
    finally:
        # It may have been renamed with its directory.
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        call("umount", next(m for m in reversed(mounts) if Path(m).name == target.name))


@contextlib.contextmanager
def immutable(file: Path) -> Iterator[None]:
    """A file that even root can not delete (ext4, XFS, Btrfs)."""
    call("chattr", "+i", file)
    try:
        yield
    finally:
        # It may have been renamed with its directory.
        above = next(folder for folder in file.parents if folder.exists())
        found = file if file.exists() else next(above.rglob(file.name))
        call("chattr", "-i", found)


class Quota:
    """A directory with a quota on a disk that has room; in a with statement.

    It is a subvolume: a quota that the whole of a Btrfs has reached can not be lifted again.

    Attributes:
      folder: the directory.
    """

    def __init__(self, mount: Path, image: Path):
        self.folder, self._mount, self._image = mount / "run", mount, image

    def __enter__(self) -> Quota:
        with self._image.open("wb") as file:
            file.truncate(1 << 30)
        call("mkfs.btrfs", "-q", "-f", self._image)
        self._mount.mkdir(parents=True, exist_ok=True)
        call("mount", "-o", "loop", self._image, self._mount)
        call("btrfs", "quota", "enable", self._mount)
        call("btrfs", "subvolume", "create", self.folder)
        return self

    def __exit__(self, *error: object) -> None:
        call("umount", self._mount)
        self._image.unlink()

    def limit(self, more: int | None) -> None:
        """So many bytes more than are used; None: no limit."""
        call("sync")
        group = "0/" + output("btrfs", "inspect-internal", "rootid", self.folder).strip()
        shown = output("btrfs", "qgroup", "show", "--raw", self._mount).split()
        used = int(shown[shown.index(group) + 1])
        size = "none" if more is None else used + more
        call("btrfs", "qgroup", "limit", size, group, self._mount)


def refused(
    faults: Faults,
    fault: str,
    stage: str,
    run_dir: Path,
    *,
    under: Sequence[str] = (),
    with_room: Callable[[], None] = lambda: None,
) -> None:
    """A stopped stage is resumed on a full disk, and then with room."""
    had = whole_checkpoints(run_dir / stage)
    done = run(stage, run_dir, under=under)
    said = complaint(done)
    still = had <= whole_checkpoints(run_dir / stage)
    with_room()
    after = run(stage, run_dir)
    same = after.returncode == 0 and faults.same(stage, run_dir)
    good = done.returncode == 1 and not said.startswith("!!") and still and same
    outcome = (
        f"exit {done.returncode}: {said[:330]}; checkpoints {', '.join(sorted(had)) or '-'} whole "
        f"{still}; with room: same bits {same}"
    )
    faults.add(fault, stage, outcome, good)


def no_room(faults: Faults) -> None:
    """A disk of one megabyte for the checkpoints."""
    run_dir = faults.fresh("sft")
    with tmpfs(run_dir / "sft" / "checkpoints", "1m"):
        done = run("sft", run_dir)
    after = run("sft", run_dir)
    same = after.returncode == 0 and faults.same("sft", run_dir)
    good = done.returncode == 1 and not complaint(done).startswith("!!") and same
    outcome = f"exit {done.returncode}: {complaint(done)[:330]}; with room: same bits {same}"
    faults.add("no room on the disk", "sft", outcome, good)


def limit(faults: Faults) -> None:
    """`ulimit -f`: less than a checkpoint; less than what sampling writes."""
    refused(
        faults, "`ulimit -f` below a checkpoint", "rl", faults.begun("rl"),
        under=("prlimit", f"--fsize={1 << 17}"),
    )  # fmt: skip
    refused(
        faults, "`ulimit -f` below what is sampled", "rft", faults.fresh("rft"),
        under=("prlimit", f"--fsize={1 << 15}"),
    )  # fmt: skip


def quota(faults: Faults) -> None:
    """A quota smaller than a checkpoint, when a stage is resumed."""
    if shutil.which("mkfs.btrfs") is None:
        print("no mkfs.btrfs: a quota was not tried")
        return
    with Quota(faults.runs / "quota", faults.runs / "quota.img") as disk:
        run_dir = faults.begun("rl", disk.folder)
        disk.limit(1 << 17)
        refused(
            faults, "a quota below a checkpoint (Btrfs)", "rl", run_dir,
            with_room=lambda: disk.limit(None),
        )  # fmt: skip


def readonly(faults: Faults) -> None:
    """A run directory in which nothing can be written."""
    with contextlib.ExitStack() as stack:
        run_dir = faults.begun("rl")
        stack.enter_context(bound(run_dir, run_dir, readonly=True))
        refused(
            faults, "a run directory that is read-only", "rl", run_dir,
            with_room=stack.pop_all().close,
        )  # fmt: skip


def undeletable(faults: Faults) -> None:
    """An old checkpoint that can not be deleted: the run goes on."""

    def attempt(fault: str, keep: Callable[[Path], contextlib.AbstractContextManager[None]]):
        run_dir = faults.begun("rl")
        oldest = min(whole_checkpoints(run_dir / "rl"), key=int)
        folder = run_dir / "rl" / "checkpoints" / oldest
        victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        with keep(victim):
            done = run("rl", run_dir)
        said = [line for line in done.stdout.splitlines() if "can not be deleted" in line]
        same = faults.same("rl", run_dir)
        good = done.returncode == 0 and bool(said) and same and not done.stderr.strip()
        outcome = f"exit {done.returncode}: {' / '.join(said)[:500]}; same bits {same}"
        faults.add(fault, "rl", outcome, good)

    attempt("an old checkpoint that can not be deleted (chattr +i)", immutable)
    attempt("an old checkpoint that is in use (mounted)", lambda file: bound(file, file))
