"""Checkpoints through orbax: the only file that knows it.

Trees of arrays (`save_arrays`), and checkpoints of a running stage (`StageCheckpoints`).
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from grm_jax import files
from grm_jax.errors import UserError, listed
from grm_jax.parallel.multihost import any_of, barrier, first
from grm_jax.room import require_room, state_bytes, system_words

log = logging.getLogger("grm_jax")

OLD = "old-checkpoint-"  # a checkpoint that is being deleted
BLOCK = 1 << 26  # bytes of a file with a checksum of their own
THREADS = 8  # most that compute checksums


def save_arrays(path: str | Path, tree: Any) -> None:
    """Write a tree of arrays; every process calls it. Raises what orbax raises."""
    ocp.save(str(path), tree)


def stored_arrays(path: str | Path) -> Any:
    """Shapes and dtypes of a written tree."""
    return ocp.metadata(str(path)).metadata


def load_arrays(path: str | Path, abstract: Any) -> Any:
    """A written tree, laid out as `abstract` (shapes, dtypes, shardings)."""
    return ocp.load(str(path), abstract)


class StageCheckpoints:
    """Checkpoints of a running stage: train state and data position, atomic, in the background.

    Beside each checkpoint stands a list of its files with sizes and checksums, written when all of
    them are: one without the list was cut off, one that does not fit it is damaged. Neither is
    resumed from. The checksums are needed: orbax reads back a changed number without a word (it
    notices a file that is short or gone, and changes of its index). The first process computes them
    in the background, with several threads, as soon as the files are written: most of them are in
    the page cache then.

    This class deletes old checkpoints itself, once the new one has its list: orbax
    would delete them before, and a run killed in between would have no whole checkpoint.

    Args:
      directory: `checkpoints/` of the stage.
      latest: how many of the newest are kept, at least 1.
      every: those of steps that are multiples of it are kept, too; 0: none.

    Raises UserError for other numbers.
    """

    def __init__(self, directory: str | Path, latest: int = 2, every: int = 0):
        require_kept(latest, every)
        self.directory = Path(directory).absolute()
        self._undeletable: set[int] = set()
        self._failed = False
        self._latest, self._every = latest, every
        self._clean()
        self._checkpointer = self._open()
        self._writing: concurrent.futures.Future[None] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-files")

    def _open(self) -> ocp.training.Checkpointer:
        decisions = ocp.training.save_decision_policies
        return ocp.training.Checkpointer(
            str(self.directory),
            # orbax's own policy does not match its protocol's parameter types
            save_decision_policy=decisions.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def save(self, step: int, state: Any, position: Any) -> None:
        """Write `state` (arrays) and `position` (JSON), in the background.

        Raises UserError when there is no room for it or it can not be written, before anything is;
        and what went wrong with the one before, if something did.
        """
        self.wait()
        require_room(self.directory, state_bytes(state), "a checkpoint")
        items = {"state": state, "position": {"json": json.dumps(position)}}
        try:
            response = self._checkpointer.save_checkpointables_async(step, items)
        except OSError as error:
            raise self._not_written(step, error) from error
        self._writing = self._background.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        """In the background: when the checkpoint is written, list its files, delete old ones."""
        try:
            response.result()
            if first():
                write_file_list(self.directory / str(step), self._list(step))
        except (OSError, ValueError) as error:
            raise self._not_written(step, error) from error
        if first():
            whole = [step for step in self.steps if self._list(step).exists()]
            for old in whole[: -self._latest]:
                if not (self._every and old % self._every == 0):
                    self._delete(old)

    def _not_written(self, step: int, error: Exception) -> UserError:
        self._failed = True
        return UserError(
            f"{self.directory}: checkpoint {step} was not written: {system_words(error)}; the "
            "checkpoints before it are untouched. Mend that and give the same command again"
        )

    def _delete(self, step: int) -> None:
        """Delete a checkpoint; one that can not be deleted is a warning and stays listed."""
        aside = self.directory / f"{OLD}{step}"
        try:
            # Renamed first: a checkpoint that is deleted in part would look like a damaged one.
            (self.directory / str(step)).rename(aside)
            self._list(step).unlink(missing_ok=True)
            shutil.rmtree(aside)
        except OSError as error:
            if step not in self._undeletable:
                self._undeletable.add(step)
                log.warning(
                    "%s: the old checkpoint %d can not be deleted (%s); training goes on, delete "
                    "it by hand",
                    self.directory, step, system_words(error),
                )  # fmt: skip

    def wait(self) -> None:
        """Until what is being written is whole. Raises UserError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """(step, state, position) of the newest whole checkpoint, laid out as `abstract_state`;
        None if there is none. Damaged ones are named in the log and moved aside.

        The first process alone reads the files for their checksums and tells the others. Raises
        UserError when there is no room for a checkpoint of this size: what is computed from here
        on could not be kept.
        """
        self.wait()
        require_room(self.directory, state_bytes(abstract_state), "a checkpoint")
        for step in reversed(self.steps):
            wrong = damage(self.directory / str(step), self._list(step)) if first() else ""
            if any_of(bool(wrong)):
                self._set_aside(step, wrong)
                continue
            items = {"state": abstract_state, "position": {"json": ""}}
            found = self._checkpointer.load_checkpointables(step, items)
            return step, found["state"], json.loads(found["position"]["json"])
        return None

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            try:
                self._checkpointer.close()
            except (OSError, ValueError):
                if not self._failed:  # orbax raises again what was said already
                    raise

    def _list(self, step: int) -> Path:
        return self.directory / f"{step}.files.json"

    def _clean(self) -> None:
        """Move away what a killed process left: checkpoints without a list, lists without one, old
        ones that were being deleted."""
        if first() and self.directory.is_dir():
            for path in sorted(self.directory.iterdir()):
                if path.name.startswith(OLD):
                    shutil.rmtree(path, ignore_errors=True)
                    if path.exists():
                        log.warning("%s can not be deleted; delete it by hand", path)
                elif path.name.isdigit() and not self._list(int(path.name)).exists():
                    # The newest such one is kept: it may be whole but for its list.
                    target = self.directory.with_name("unlisted-checkpoint")
                    log.warning("checkpoint %s has no file list; moved to %s", path, target)
                    shutil.rmtree(target, ignore_errors=True)
                    path.rename(target)
                name = path.name.removesuffix(".files.json")
                if path.name != name and not (self.directory / name).is_dir():
                    path.unlink()
        barrier("checkpoints: cleaned")

    def _set_aside(self, step: int, wrong: str) -> None:
        path = self.directory / str(step)
        target = self.directory.with_name(f"damaged-checkpoint-{step}")
        log.warning("checkpoint %s is damaged (%s); moved to %s", path, wrong, target)
        barrier("checkpoints: seen")
        if first():
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            self._list(step).unlink(missing_ok=True)
        barrier("checkpoints: moved")
        self._checkpointer.reload()


def require_kept(latest: int, every: int) -> None:
    """Raise UserError unless at least the newest checkpoint is kept."""
    if latest < 1:
        raise UserError(
            f"--keep.latest {latest}: give 1 or more; without a checkpoint no run can resume"
        )
    if every < 0:
        raise UserError(f"--keep.every {every}: give a number of steps, or 0 for none")


def drop_leftovers(stage: str | Path) -> None:
    """Delete a stage's checkpoints, and what was moved aside, which it says."""
    checkpoints = Path(stage) / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    if checkpoints.exists():
        log.warning("%s can not be deleted; delete it by hand", checkpoints)
    for pattern in ("unlisted-checkpoint", "damaged-checkpoint-*"):
        for path in sorted(Path(stage).glob(pattern)):
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                log.warning("%s can not be deleted; delete it by hand", path)
            else:
                log.info("%s is deleted: the stage's model is there", path)


def write_file_list(directory: Path, path: Path) -> None:
    """Sizes and checksums of all files under `directory`, written whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    sizes = _sizes(directory)
    checks = _checksums(directory, {name: _blocks(size, BLOCK) for name, size in sizes.items()})
    listing = {name: [size, *checks[name]] for name, size in sorted(sizes.items())}
    partial.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def damage(directory: Path, path: Path) -> str:
    """What of `directory` is not as in the file list at `path`; empty if nothing.

    Files are read only if all of them are there and have their sizes.
    """
    if not path.exists():
        return f"no {path.name}"
    expected, sizes = files.read_json(path), _sizes(directory)
    wrong = [
        f"{name} is {'missing' if name not in sizes else 'changed'}"
        for name, (size, *_) in expected.items()
        if sizes.get(name) != size
    ]
    if not wrong:
        # One checksum is that of the whole file, however large.
        blocks = {
            name: _blocks(size, BLOCK if len(checks) > 1 else size)
            for name, (size, *checks) in expected.items()
        }
        found = _checksums(directory, blocks)
        wrong = [
            f"{name} is changed" for name, (_, *checks) in expected.items() if found[name] != checks
        ]
    return listed(wrong)


def _sizes(directory: Path) -> dict[str, int]:
    """The size of each file, by its path; the last written comes first.

    What was written last is in the page cache when a checkpoint is larger than that.
    """
    found = {p: p.stat() for p in directory.rglob("*") if p.is_file()}
    newest = sorted(found, key=lambda p: (-found[p].st_mtime_ns, p))
    return {str(p.relative_to(directory)): found[p].st_size for p in newest}


def _blocks(size: int, block: int) -> list[tuple[int, int]]:
    """(start, end) of each block of a file; an empty file has one, too."""
    return [(at, min(at + block, size)) for at in range(0, max(size, 1), max(block, 1))]


def _checksums(directory: Path, blocks: dict[str, list[tuple[int, int]]]) -> dict[str, list[int]]:
    """The CRC-32 of each block of each file."""
    threads = min(THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads, "checksums") as pool:
        found = {
            name: [pool.submit(_checksum, directory / name, *block) for block in of_file]
            for name, of_file in blocks.items()
        }
        return {name: [future.result() for future in of_file] for name, of_file in found.items()}


def _checksum(path: Path, start: int, end: int) -> int:
    check, buffer = 0, memoryview(bytearray(1 << 20))  # fits a core's own cache
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (size := file.readinto(buffer[: end - start])):
            check = zlib.crc32(buffer[:size], check)
            start += size
    return check
