"""Files of rows: every format gives the same rows, every name finds its file, damage is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grm_jax.data.preferences import read_preferences
from grm_jax.data.rows import DataError, expand, iterate_rows
from grm_jax.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"query": 'a, "b"\nc \u2028', "responses": ["x", "y"], "labels": [2.5, 1.0]},
    {"query": "d", "responses": ["[1]", "é"], "labels": [0.0, 1.0]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the name, by other means than the reader's."""
    name = path.name
    if ".json" in name or ".ndjson" in name:
        if ".jsonl" in name or ".ndjson" in name:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            text = json.dumps(rows)
        blob = text.encode()
    elif ".csv" in name:
        plain = path.with_name("plain.csv")
        with plain.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            for row in rows:
                texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                out.writerow(texts)
        blob = plain.read_bytes()
        plain.unlink()
    else:
        table = pa.Table.from_pylist(rows)
        if name.endswith(".parquet"):
            pq.write_table(table, path)
        else:
            new = pa.ipc.new_file if "file" in name else pa.ipc.new_stream
            with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
                out.write_table(table)
        return path
    if name.endswith(".gz"):
        blob = gzip.compress(blob)
    elif name.endswith(".zst"):
        blob = pa.Codec("zstd").compress(blob, asbytes=True)
    path.write_bytes(blob)
    return path


NAMES = [
    *(f"d{base}{packed}" for base in (".jsonl", ".ndjson", ".json", ".csv")
      for packed in ("", ".gz", ".zst")),
    "d.parquet", "d.arrow", "file.arrow", "D.JSONL", "d.v2.jsonl.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    name, path = name, tmp_path / name
    if name == "D.JSONL":
        write(tmp_path / "d.jsonl", ROWS).rename(path)
    else:
        write(path, ROWS)
    got = read_preferences(path)
    assert [(r.query, list(r.responses), list(r.labels)) for r in got] == [
        (row["query"], row["responses"], row["labels"]) for row in ROWS
    ]
    assert got[1].source in (f"{path}:2", f"{path}:row 2")
    assert read_preferences(tmp_path) == got


def test_messages_in_csv_cells_are_read_and_texts_left_alone(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    replies = [[{"role": "assistant", "content": text}] for text in "xy"]
    rows = [
        {"id": "1", "prompt": chat, "chosen": replies[0], "rejected": replies[1], "domain": ""},
        {"id": "2", "prompt": "[1, 2]", "chosen": "[3]", "rejected": "{}", "domain": "maths"},
        {"id": "3", "prompt": "[broken", "chosen": "a", "rejected": '["b"]', "domain": ""},
    ]
    got = read_preferences(write(tmp_path / "d.csv", rows))
    assert [(r.query, *r.responses) for r in got] == [
        ("Hi", "x", "y"), ("[1, 2]", "[3]", "{}"), ("[broken", "a", '["b"]'),
    ]  # fmt: skip
    assert [r.domain for r in got] == ["", "maths", ""]
    # Elsewhere a text stays a text.
    row = {"prompt": json.dumps(chat), "chosen": "a", "rejected": "b"}
    assert read_preferences(write(tmp_path / "d.jsonl", [row]))[0].query == json.dumps(chat)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("query,response,label\nq,a\n", ":row 1: 2 cells for 3 columns"),
        ("query,response,label\nq,,1\n", ":row 1: response: null"),
        ("query,response,response\nq,a,1\n", ": response: appears twice in the header"),
        ('query,response,label\nq,"a,1\n', "not CSV: unexpected end of data"),
        ("query;response;label\nq;a;1\n", "no known shape; the row has ['query;response;label']"),
        ("query,response,label\n", "the file is empty"),
        ("", "the file is empty"),
    ],
)
def test_damage_in_csv_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_csv_of_other_makers(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    long = "word " * 60_000  # beyond the csv module's own limit of a cell
    text = f'query,response,label\r\n"q ""1""",{long},True\r\n\r\nq2,b,0.0\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_preferences(path)
    assert (first.query, first.responses, first.labels) == ('q "1"', (long,), (1.0,))
    assert second.labels == (0.0,) and second.source == f"{path}:row 2"
    path.write_bytes("query,response,label\nq,é,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8: byte 0xe9"):
        read_preferences(path)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.json.zst", "d.csv.gz", "d.arrow"])
def test_files_that_are_cut_off_are_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as error:
        for row in iterate_rows(path):
            row.load()
    assert str(path) in str(error.value)


def test_a_byte_order_mark_may_open_every_line(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    bom = b"\xef\xbb\xbf"
    path.write_bytes(bom + lines[0] + bom + b"\n" + bom + lines[1])
    assert len(read_preferences(path)) == 2
    (tmp_path / "d.json").write_bytes(bom + json.dumps(ROWS).encode())
    assert len(read_preferences(tmp_path / "d.json")) == 2


def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        read_preferences(path)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a link to .*nowhere, which is not there"):
        read_preferences(tmp_path / "gone.jsonl")


# ------------------------------------------------------------------------------ names


def names(source: Any, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in expand(source)]


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    for name in ("d[1]/z.jsonl", "d1/z.jsonl", "d[1]/e[2]/y.jsonl", "d1/e2/y.jsonl", "[x].jsonl",
                 "x.jsonl", "*.jsonl", "a/b[3]/w.jsonl", "a/b3/w.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")

    def found(pattern: str) -> list[str]:
        return names(str(tmp_path / pattern), tmp_path)

    assert found("d[1]/*.jsonl") == found("d[1]/z.jsonl") == ["d[1]/z.jsonl"]
    assert found("d[1]/e[2]/*.jsonl") == ["d[1]/e[2]/y.jsonl"]
    assert found("*/b[3]/w.jsonl") == ["a/b[3]/w.jsonl"]
    assert found("[x].jsonl") == ["[x].jsonl"]
    assert found("*.jsonl") == ["*.jsonl"]
    assert found("?.jsonl") == ["*.jsonl", "x.jsonl"]
    assert found("d[12]/z.jsonl") == ["d1/z.jsonl"]
    assert found("d1/**/*.jsonl") == ["d1/e2/y.jsonl", "d1/z.jsonl"]
    assert found("d1/**") == ["d1/e2/y.jsonl", "d1/z.jsonl"]
    with pytest.raises(DataError, match="no such file, directory or match"):
        found("q[1]/*.jsonl")


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text("{}")
    assert names(["~/d.jsonl", "~/*.jsonl", "~"], tmp_path) == ["d.jsonl"]
    with pytest.raises(DataError, match="no such user"):
        expand("~nobody-of-this-name/d.jsonl")


def test_relative_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jsonl").write_text("{}")
    assert [str(path) for path in expand("*/d.jsonl")] == ["sub/d.jsonl"]
    assert [str(path) for path in expand("**/*.jsonl")] == ["sub/d.jsonl"]


def test_files_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / ".hidden").write_text("")
    for source in (tmp_path, str(tmp_path / "*")):
        caplog.clear()
        assert len(read_preferences(source)) == 2
        assert "not read: LICENSE, README.md, dataset_infos.json" in caplog.text
    caplog.clear()
    expand(tmp_path, quiet=True)
    assert not caplog.records
    with pytest.raises(DataError, match="not a data file"):
        read_preferences(tmp_path / "README.md")
    with pytest.raises(DataError, match="dict at the top"):
        read_preferences(tmp_path / "dataset_infos.json")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match="no data file in this directory"):
        read_preferences(tmp_path)
    with pytest.raises(DataError, match="no data file matches"):
        read_preferences(str(tmp_path / "READ*"))
