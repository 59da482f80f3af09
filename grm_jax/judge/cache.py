"""Samples on disk: what a judge has said of a record is never sampled twice.

    CACHE/<16 hex digits>/about.json     weights, prompts, sampling settings, seed: one judge, asked
                                         in one way
                         samples.jsonl   its samples, each with a digest of the record, appended as
                                         they end: what was sampled before Ctrl-C is kept
                         seconds.jsonl   what they cost

A record's digest covers its id too, since samples are keyed by it. Other aggregation settings (k,
tie rules, k_meta, bootstrap) are not part of the key, so they sample nothing; k samples are the
first k of any larger number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grm_jax import files
from grm_jax.data.critiques import Critique, critique_from_json
from grm_jax.data.preferences import Preference, content_id
from grm_jax.data.rows import DataError, parse_line, show
from grm_jax.errors import UserError
from grm_jax.files import written_whole

log = logging.getLogger("grm_jax")


def record_digest(record: Preference) -> str:
    """Of everything that a judge sees of a record, and its id, by which samples are keyed."""
    return content_id(
        record.turns, record.responses, (), record.id, record.reference, record.principles
    )


class SampleCache:
    """The samples of one judge, asked in one way.

    Args:
        directory: of all caches.
        about: everything that a sample depends on besides the record; JSON values.
        write: False only reads what is there: of several processes, one writes.

    Raises:
        DataError: a line that is not a sample. A last line that was cut off (the machine died) is
            dropped.
    """

    def __init__(self, directory: str | Path, about: Mapping[str, Any], *, write: bool = True):
        text = json.dumps(about, sort_keys=True, indent=1)
        self.folder = Path(directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / "about.json") as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        self._rows: dict[tuple[str, int], Critique] = {}
        path = self.folder / "samples.jsonl"
        kept = _read_whole_lines(path, mend=write)
        for number, line in enumerate(kept, 1):
            source = f"{path}:{number}"
            values = parse_line(line, source)
            digest = values.pop("record", None)
            if not isinstance(digest, str):
                raise DataError("record", "missing", f"delete {self.folder}", source)
            row = critique_from_json(values, source)
            self._rows[digest, row.sample] = row
        self._path = path if write else Path(os.devnull)
        self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._write = write
        self._seconds = self.folder / "seconds.jsonl"

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: str, sample: int) -> Critique | None:
        """The sample of the record with that `record_digest`, if it was kept."""
        return self._rows.get((digest, sample))

    def add(self, digest: str, row: Critique) -> None:
        """Keep a sample; it is on disk after the next `flush`."""
        self._rows[digest, row.sample] = row
        line = json.dumps({"record": digest, **vars(row)}, ensure_ascii=False, allow_nan=False)
        with files.named(self._path):
            self._file.write(line + "\n")

    def flush(self) -> None:
        with files.named(self._path):
            self._file.flush()

    def spent(self, samples: int, seconds: float) -> None:
        """Note how long samples took."""
        self.flush()
        if not self._write:
            return
        with files.named(self._seconds), self._seconds.open("a", encoding="utf-8") as file:
            line = json.dumps({"samples": samples, "seconds": round(seconds, 3)})
            file.write(line + "\n")

    def seconds_per_sample(self) -> float | None:
        """Mean over all that was sampled here; None: not known."""
        rows = []
        for number, line in enumerate(_read_whole_lines(self._seconds), 1):
            source = f"{self._seconds}:{number}"
            row = parse_line(line, source)
            for name in ("samples", "seconds"):
                if type(row.get(name)) not in (int, float):
                    raise DataError(name, show(row.get(name)), f"delete {self._seconds}", source)
            rows.append(row)
        samples = sum(row["samples"] for row in rows)
        return sum(row["seconds"] for row in rows) / samples if samples else None

    def close(self) -> None:
        with files.named(self._path):
            self._file.close()


def _read_whole_lines(path: Path, *, mend: bool = True) -> list[bytes]:
    """Lines that end; with `mend`, what follows the last end is cut off the file."""
    if not path.exists():
        return []
    blob = path.read_bytes()
    whole = blob[: blob.rfind(b"\n") + 1]
    if mend and len(whole) < len(blob):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return [line for line in whole.split(b"\n") if line]


def fingerprint(folder: str | Path, memory: Path, *, write: bool = True) -> str:
    """A digest of all files of a model folder: other weights, other samples.

    Args:
        memory: a JSON file that remembers digests by name, size and time of change.
        write: False leaves the memory as it is: of several processes, one writes.
    """
    folder = Path(folder)
    known: dict[str, Any] = {}
    if memory.exists():
        try:
            known = files.read_json(memory)
        except UserError as error:  # it only saves time: the files are read again
            log.warning("%s; reading the model's files again", error)
    before = dict(known)
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = file.stat()
        name = f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        if not isinstance(known.get(name), str):
            with file.open("rb") as blob:
                known[name] = hashlib.file_digest(blob, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder)} {known[name]}\n".encode())
    if not write or known == before:
        return whole.hexdigest()[:16]
    with written_whole(memory) as partial:
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return whole.hexdigest()[:16]
