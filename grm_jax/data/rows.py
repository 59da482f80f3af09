"""Rows of JSONL, JSON and parquet files, each with its place in the file; and back.

Nothing here knows what a row means. JSONL is split at "\\n" only: U+2028, U+0085 and the like are
legal inside JSON strings, and `str.splitlines` would cut there.
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grm_jax.errors import UserError
from grm_jax.files import written_whole

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class DataError(UserError):
    """A fault in data. The message: "file:line: field: what was found; fix: what to do"."""

    def __init__(self, field: str, problem: str, fix: str, where: str = "") -> None:
        self.field, self.problem, self.fix, self.where = field, problem, fix, where
        opening = "".join(f"{part}: " for part in (where, field) if part)
        super().__init__(f"{opening}{problem}; fix: {fix}")

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses process boundaries
        return type(self), (self.field, self.problem, self.fix, self.where)

    def at(self, where: str) -> DataError:
        """The same fault, with its place."""
        return DataError(self.field, self.problem, self.fix, where)


@dataclass(frozen=True)
class Row:
    """One row, not yet parsed, so that a bad one can be reported and the rest still read."""

    where: str  # "file:line", for arrays and tables "file:row N", from 1
    load: Callable[[], dict[str, Any]]


def expand(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files of a path, directory, glob pattern or several of them; each once, in a fixed order."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    files: dict[Path, None] = {}
    for one in sources:
        path, name = Path(one).expanduser(), str(one)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [p for p in path.iterdir() if p.is_file() and _suffix(p) and p.name[0] != "."]
            if not found:
                raise DataError("", "no data file in this directory", _suffix_fix(), name)
        else:
            found = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
            if not found:
                raise DataError(
                    "", "no such file, directory or match", "check the path or pattern", name
                )
        files |= dict.fromkeys(sorted(found))
    if not files:
        raise DataError("", "no files given", "name at least one file", str(source))
    return list(files)


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order. `DataError` if it cannot be read or holds none."""
    suffix = _suffix(path)
    readers = {".json": _json_rows, ".parquet": _parquet_rows}
    if suffix is None:
        raise DataError("", "not a data file", _suffix_fix(), str(path))
    empty = True
    for row in readers.get(suffix, _jsonl_rows)(path):
        empty = False
        yield row
    if empty:
        raise DataError("", "the file is empty", "write it again, or leave it out", str(path))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the suffix, whole or not at all. JSON leaves null fields out."""
    suffix = _suffix(path)
    if suffix is None:
        raise DataError("", "not a data file", _suffix_fix(), str(path))
    with written_whole(path) as partial:
        if suffix == ".parquet":
            _write_parquet(partial, rows)
        else:
            kept = [{k: v for k, v in row.items() if v is not None} for row in rows]
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in kept]
            text = (
                "[\n" + ",\n".join(lines) + "\n]\n"
                if suffix == ".json"
                else "\n".join(lines) + "\n"
            )
            blob = text.encode()
            partial.write_bytes(gzip.compress(blob, mtime=0) if suffix == ".jsonl.gz" else blob)


def check_text(name: str, text: Any, *, filled: bool = False) -> None:
    if not isinstance(text, str):
        raise DataError(name, show(text), "give a string")
    if filled and not text.strip():
        raise DataError(name, "empty", "give some text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            name,
            f"a lone surrogate \\u{ord(text[e.start]):04x} at character {e.start}",
            "half of a cut emoji is not text: remove it, or restore the pair",
        ) from None


def kind(value: Any) -> str:
    return type(value).__name__


def show(value: Any) -> str:
    """A value in an error: its type and a short look at it."""
    text = repr(value)
    return f"{kind(value)} {text if len(text) <= 60 else text[:57] + '...'}"


def _suffix(path: Path) -> str | None:
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def _suffix_fix() -> str:
    return f"give a file that ends in {', '.join(SUFFIXES)}"


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # binary: ends at b"\n" and nowhere else
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield Row(f"{path}:{number}", _loader(line, f"{path}:{number}"))
    except (OSError, EOFError, zlib.error) as e:
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        blob = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as e:
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e
    if not blob.strip():
        return
    rows = _parse(blob, str(path), "a .json file is one array; with a row a line call it .jsonl")
    if not isinstance(rows, list):
        raise DataError(
            "", f"{type(rows).__name__} at the top", "a .json file is an array of rows", str(path)
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}:row {number}"
        yield Row(where, lambda row=row, where=where: _mapping(row, where))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    where = f"{path}:row {number}"
                    yield Row(where, lambda b=batch, i=i, where=where: _parquet_row(b, i, where))
    except (pa.ArrowException, OSError) as e:
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e


def _parquet_row(batch: Any, i: int, where: str) -> dict[str, Any]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[i].as_py()
        except UnicodeDecodeError as e:
            raise DataError(
                name, f"not UTF-8 at byte {e.start}", "save it as UTF-8", where
            ) from None
    return row


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # All columns in full: a column of nulls alone would otherwise have no type of its own.
    texts = pa.list_(pa.string())
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = {"turns": pa.list_(turn), "responses": texts, "labels": pa.list_(pa.float64())}
    kinds["principles"] = texts
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _loader(line: bytes, where: str) -> Callable[[], dict[str, Any]]:
    return lambda: parse_line(line, where)


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL, as `iterate_rows` reads it."""
    return _mapping(_parse(line, where), where)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            "",
            f"{type(value).__name__} where an object was expected",
            "one JSON object a row",
            where,
        )
    return dict(value)


def _parse(blob: bytes, where: str, fix: str = "one JSON object a line") -> Any:
    try:
        text = blob.decode()
    except UnicodeDecodeError as e:
        raise DataError(
            "",
            f"not UTF-8: byte 0x{blob[e.start]:02x} at {e.start}",
            "save the file as UTF-8",
            where,
        ) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except json.JSONDecodeError as e:
        at = f"at character {e.pos + 1}" if e.lineno == 1 else f"at {e.lineno}:{e.colno}"
        cut = " (the file may be cut off here)" if not text.endswith("\n") else ""
        raise DataError("", f"not valid JSON: {e.msg} {at}{cut}", fix, where) from None
    except ValueError as e:  # a DataError of `_unique`, or an integer of thousands of digits
        if isinstance(e, DataError):
            raise e.at(where) from None
        raise DataError("", f"not valid JSON: {e}", "write it again", where) from None
    except RecursionError:
        raise DataError("", "JSON nested too deeply", "flatten the row", where) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(twice, "stands twice in one object", "keep one of them")
    return row


def _constant(name: str) -> float:
    # Python's json reads NaN and Infinity, which JSON lacks. The check of labels names the field.
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[name]
