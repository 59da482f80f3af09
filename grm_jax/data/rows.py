"""Reading and writing rows of JSONL, JSON, CSV, parquet and Arrow files, with their places.

This module does not know what rows mean. JSONL is split at "\\n" only: U+2028, U+0085 and similar
characters are allowed in JSON strings, but `str.splitlines` would cut there. A UTF-8 byte order
mark is dropped at the start of every line, since files that were concatenated have several.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grm_jax.errors import UserError
from grm_jax.files import BOM, require_content, written_whole

log = logging.getLogger(__name__)

_TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv")
_PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(f + p for f in _TEXT_FORMATS for p in _PACKED), ".parquet", ".arrow")
SKIPPABLE = "; --skip-bad-rows leaves such rows out"  # ends the fix in the message of a bad row
MAX_BAD_SHARE = 0.1  # a larger share of bad rows points to a mistake in the whole file
WRITTEN = (".jsonl", ".jsonl.gz", ".json", ".parquet")
# Files that the hub's tools write beside data; they have no rows.
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class DataError(UserError):
    """A mistake in data. The message is "file:line: field: the problem; fix: what to do"."""

    def __init__(self, field: str, problem: str, fix: str, where: str = "") -> None:
        self.field, self.problem, self.fix, self.where = field, problem, fix, where
        opening = "".join(f"{part}: " for part in (where, field) if part)
        super().__init__(f"{opening}{problem}; fix: {fix}")

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses process boundaries
        return type(self), (self.field, self.problem, self.fix, self.where)

    def at(self, where: str) -> DataError:
        """The same error with its place."""
        return DataError(self.field, self.problem, self.fix, where)


@dataclass(frozen=True)
class Row:
    """A row that is not yet parsed, so that a bad one does not prevent reading the others."""

    where: str  # "file:line", for arrays and tables "file:row N", from 1
    load: Callable[[], dict[str, Any]]
    cells: bool = False  # from a CSV file: every value is a text, or None for an empty cell


def expand(source: str | Path | Sequence[str | Path], *, quiet: bool = False) -> list[Path]:
    """The files of a path, directory, glob pattern or several of them, each once, in a fixed order.

    `~` is expanded. A part of a path that exists is not read as a pattern: `d[1]/*.jsonl` looks
    into `d[1]` if it exists, else into `d1`. Of a directory or a pattern only data files are
    returned; the others are named in a warning, unless `quiet`.

    Raises:
        DataError: nothing is found, or no data file.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    files: dict[Path, None] = {}
    for one in sources:
        name = str(one)
        try:
            path = Path(one).expanduser()
        except RuntimeError:  # ~name of nobody
            raise DataError("", "no such user", "check the path", name) from None
        require_content(path)
        if path.is_file():
            files[path] = None
            continue
        if path.is_dir():
            paths = [p for p in path.iterdir() if p.is_file() and p.name[0] != "."]
        else:
            paths = [p for p in _matches(path) if p.is_file()]
            if not paths:
                raise DataError(
                    "", "no such file, directory or match", "check the path or pattern", name
                )
        data = [p for p in paths if _suffix(p) and p.name not in _ABOUT_DATA]
        if not data:
            below = f", or {name}/**/*.parquet and the like for folders in it"
            what = "data file in this directory" if path.is_dir() else "data file matches"
            raise DataError("", f"no {what}", _suffix_fix() + below * path.is_dir(), name)
        others = sorted(p.name for p in set(paths) - set(data))
        if others and not quiet:
            log.warning("%s: not read: %s", name, ", ".join(others))
        files |= dict.fromkeys(sorted(data))
    if not files:
        raise DataError("", "no files given", "name at least one file", str(source))
    return list(files)


def _matches(pattern: Path) -> list[Path]:
    """The paths that match a pattern; a part that exists is not read as a pattern."""
    places = [Path(pattern.anchor)]
    for part in pattern.parts[bool(pattern.anchor) :]:
        below: dict[Path, None] = {}
        for place in places:
            if os.path.lexists(place / part):
                below[place / part] = None
            elif part == "**":
                below[place] = None
                inner = glob.glob(os.path.join(glob.escape(str(place)), "**"), recursive=True)
                below |= dict.fromkeys(Path(p) for p in inner)
            elif glob.has_magic(part):
                inner = glob.glob(os.path.join(glob.escape(str(place)), part))
                below |= dict.fromkeys(Path(p) for p in inner)
        places = list(below)
    return places


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order. Raises DataError if it cannot be read or has no rows."""
    suffix = _suffix(path)
    if suffix is None:
        raise DataError("", "not a data file", _suffix_fix(), str(path))
    require_content(path)
    readers = {
        ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows,
    }  # fmt: skip
    empty = True
    with _readable(path):
        for row in readers.get(f".{suffix.split('.')[1]}", _jsonl_rows)(path):
            empty = False
            yield row
    if empty:
        raise DataError("", "the file is empty", "write it again, or leave it out", str(path))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the suffix, whole or not at all. JSON omits null fields."""
    suffix = _suffix(path)
    if suffix not in WRITTEN:
        fix = f"give a file that ends in {', '.join(WRITTEN)}"
        raise DataError("", "not a data file that is written here", fix, str(path))
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
    """The type of a value for an error message; null and NaN have their names in JSON."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return type(value).__name__


def show(value: Any) -> str:
    """A value for an error message: its type and its beginning."""
    name = kind(value)
    if name != type(value).__name__:  # null, NaN: the name is enough
        return name
    text = repr(value)
    return f"{name} {text if len(text) <= 60 else text[:57] + '...'}"


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def _suffix_fix() -> str:
    packed = ", ".join(_TEXT_FORMATS)
    return f"give a file that ends in {packed} (also with .gz or .zst), .parquet or .arrow"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file in errors of opening, decompressing and decoding it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:  # pyarrow's input errors are OSErrors too
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e


def _open(path: Path) -> io.BufferedReader:
    """The decompressed bytes of a file."""
    packing = path.suffix.lower()
    if packing == ".gz":
        return io.BufferedReader(gzip.open(path))
    if packing == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):  # binary: ends at b"\n" and nowhere else
            line = line.removeprefix(BOM)
            if line.strip():
                yield Row(f"{path}:{number}", _loader(line, f"{path}:{number}"))


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        blob = file.read().removeprefix(BOM)
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


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows below a header. An empty cell is None, since it may as well be a missing value."""
    # This limit is of the whole process; the default is 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        try:
            header = next(lines, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise DataError(
                    twice, "appears twice in the header", "give each column its own name", str(path)
                )
            number = 0
            for cells in lines:
                if cells:
                    number += 1
                    where = f"{path}:row {number}"
                    yield Row(where, _cells(header, cells, where), cells=True)
        except UnicodeDecodeError as e:
            problem = f"not UTF-8: byte 0x{e.object[e.start]:02x}"
            raise DataError("", problem, "save the file as UTF-8", str(path)) from None
        except csv.Error as e:
            fix = "write it again: commas, texts with commas or quotes in double quotes"
            raise DataError("", f"not CSV: {e} (line {lines.line_num})", fix, str(path)) from None


def _cells(header: list[str], cells: list[str], where: str) -> Callable[[], dict[str, Any]]:
    def load() -> dict[str, Any]:
        if len(cells) != len(header):
            problem = f"{len(cells)} cells for {len(header)} columns"
            raise DataError("", problem, "give one cell a column", where)
        return {name: cell or None for name, cell in zip(header, cells, strict=True)}

    return load


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batch_rows(file.iter_batches(batch_size=1024), path)
    except pa.ArrowException as e:
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e


def _arrow_rows(path: Path) -> Iterator[Row]:
    """Rows of Arrow's stream format, which `datasets.save_to_disk` writes, or of its file
    format."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches = iter(pa.ipc.open_stream(file))
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _batch_rows(batches, path)
    except pa.ArrowException as e:
        raise DataError("", f"cannot be read: {e}", "copy the file again", str(path)) from e


def _batch_rows(batches: Iterator[Any], path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for i in range(batch.num_rows):
            number += 1
            where = f"{path}:row {number}"
            yield Row(where, lambda b=batch, i=i, where=where: _batch_row(b, i, where))


def _batch_row(batch: Any, i: int, where: str) -> dict[str, Any]:
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

    # An explicit schema, since a column of nulls would otherwise have no type.
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
        raise DataError(twice, "appears twice in one object", "keep one of them")
    return row


def _constant(name: str) -> float:
    # Python's json reads NaN and Infinity, which are not JSON. The check of labels refuses them.
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[name]
