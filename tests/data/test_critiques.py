"""Critique and its file."""

from __future__ import annotations

import json

import pytest

from grm_jax.data.critiques import Critique, read_critiques, write_critiques
from grm_jax.data.rows import DataError

GOOD = {
    "example_id": "a",
    "sample": 0,
    "order": [1, 0],
    "scores": [3, 4.5],
    "finish_reason": "stop",
}


def test_written_rows_read_back(tmp_path, row):
    rows = [
        row("a", -1, [7, 2], text="two\nlines \u2028 and \ud83d", tokens=5),
        row("a", 0, None, finish_reason="length", meta=None),
        Critique("b", 3, (2, 0, 1), (1.0, 2.5, 10.0), None, "stop", "x", meta=-0.25, tokens=9),
    ]
    write_critiques(tmp_path / "new" / "samples.jsonl", rows)
    assert read_critiques(tmp_path / "new" / "samples.jsonl") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.jsonl"]


def test_null_and_absent_fields_are_the_same(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(
        json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "sample": 1, "meta": None}) + "\n"
    )
    first, second = read_critiques(path)
    assert (first.scores, first.failure, first.meta, first.text) == ((3, 4.5), None, None, "")
    assert second.sample == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"example_id": None}, ":2: example_id: missing"),
        ({"example_id": 3}, ":2: example_id: int 3"),
        ({"sample": -2}, ":2: sample: int -2"),
        ({"sample": True}, ":2: sample: bool True"),
        ({"order": [0, 0]}, ":2: order: .*each of 0..n-1 once"),
        ({"order": "01"}, ":2: order: .*a list"),
        ({"order": [0, "1"]}, ":2: order: "),
        ({"scores": [1]}, ":2: scores: 1 for 2 responses"),
        ({"scores": [1, "8"]}, r":2: scores\[1\]: str"),
        ({"scores": [1, float("nan")]}, r":2: scores\[1\]: NaN"),
        ({"scores": None}, ":2: failure: .*the name of its failure"),
        ({"failure": "no_box"}, ":2: failure: "),
        ({"meta": "high"}, ":2: meta: str"),
        ({"tokens": 1.5}, ":2: tokens: float"),
        ({"sample": 7}, ":2: sample: 7 of 'a' is already in .*:1"),
    ],
)
def test_faults_name_file_line_and_field(tmp_path, change, words):
    path = tmp_path / "samples.jsonl"
    path.write_text(
        json.dumps({**GOOD, "sample": 7}) + "\n" + json.dumps({**GOOD, **change}) + "\n"
    )
    with pytest.raises(DataError, match=words):
        read_critiques(path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read_critiques(tmp_path / "gone.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"example_id": "a"')
    with pytest.raises(DataError, match=r"cut\.jsonl:1: not valid JSON"):
        read_critiques(tmp_path / "cut.jsonl")
