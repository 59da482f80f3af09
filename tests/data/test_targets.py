"""What supervised training may learn from: readable critiques that say what their rows say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from grm_jax.critique import Template
from grm_jax.data.rows import DataError
from grm_jax.data.targets import Targets, read_targets
from grm_jax.data.trajectories import Instruction, Trajectory

GOOD = "Analysis: a\nScores: \\boxed{8, 3}"
ROW = {"id": "a", "query": "q", "responses": ["x", "y"], "critique": GOOD}
REPLY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(tmp_path: Path, *rows: dict, **options) -> Targets:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    many, single = Template.load("grm"), Template.load("single")
    return read_targets(path, many=many, single=single, **options)


def test_good_rows_are_read_with_their_places(tmp_path):
    single = {**ROW, "responses": ["x"], "critique": "\\boxed{1}", "labels": [0], "correct": False}
    found = read(tmp_path, ROW, {"messages": REPLY}, single)
    assert [type(row) for row in found.rows] == [Trajectory, Instruction, Trajectory]
    assert found.sources == [f"{tmp_path / 't.jsonl'}:{line}" for line in (1, 2, 3)]
    assert (found.skipped, found.rejected) == ((), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critique": "The first."}, r"critique: holds no \\boxed\{...\} with scores, and ends"),
        ({"critique": "\\boxed{}"}, r"critique: has nothing in its"),
        ({"critique": "\\boxed{8 9}"}, r"critique: has other separators than commas .*\{8 9\}"),
        ({"critique": "\\boxed{8}"}, r"critique: has another number of scores .*: \\boxed\{8\}"),
        ({"critique": "\\boxed{8, 11}"}, r"critique: has a score outside the template's range"),
        ({"critique": "\\boxed{x, y}"}, r"critique: has something else than numbers"),
        ({"critique": GOOD + " so", "finish_reason": "length"}, r"critique: stopped at the length"),
        ({"responses": ["x"]}, r"critique: has another number of .*template 'single' asks: "),
        ({"scores": [3, 8]}, r"scores: \[3, 8\], but the critique says \\boxed\{8, 3\}"),
        ({"scores": [8, float("nan")]}, r"scores\[1\]: NaN; fix: write a number"),
        ({"messages": [REPLY[0], {"role": "assistant", "content": " "}]}, r"messages.*: empty;"),
        ({"labels": [0, 1], "correct": True}, r"correct: true, but by .*\\boxed\{8, 3\} is wrong"),
        ({"labels": [1, 0], "correct": False}, r"correct: false, but by .* is right"),
    ],
)
def test_a_row_that_teaches_something_else_is_an_error(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"t\.jsonl:2: {message}") as error:
        read(tmp_path, ROW, {**ROW, **change})
    assert "1 of 2 rows are bad" in str(error.value) and "--skip-bad-rows" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [8.0, 3.0000000001]},
        {"labels": [1, 0], "correct": True},
        {"labels": [1, 1], "correct": True},  # shared labels decide nothing
        {"critique": "\\boxed{8, 8}", "labels": [1, 0], "correct": True},  # nor does a tie
        {"critique": GOOD, "finish_reason": "length"},  # cut off behind its verdict
        {"critique": "a\tb\fpage\r\nnext\n" + GOOD},
    ],
)
def test_a_row_that_says_the_same_twice_is_good(tmp_path, change):
    assert len(read(tmp_path, {**ROW, **change}).rows) == 1


@pytest.mark.parametrize(
    ("text", "code", "rest", "letter"),
    [
        ("Scores: \boxed{8, 3}", "U+0008", "'oxed'", "b"),
        ("\frac{1}{2} " + GOOD, "U+000C", "'rac'", "f"),
        ("Scores: \\boxed{\text{8}, 3}", "U+0009", "'ext'", "t"),
        ("2 \times 3 " + GOOD, "U+0009", "'imes'", "t"),
        ("\right) " + GOOD, "U+000D", "'ight'", "r"),
        ("\nabla " + GOOD, "U+000A", "'abla'", "n"),
    ],
)
@pytest.mark.parametrize("field", ["critique", "reply"])
def test_one_backslash_in_the_json_is_said(tmp_path, text, code, rest, letter, field):
    row = {**ROW, "critique": text}
    if field == "reply":
        row = {"messages": [REPLY[0], {"role": "assistant", "content": text}]}
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    said = str(error.value)
    assert f"{code} stands before {rest}: `\\{letter}` in the JSON is" in said
    assert f"fix: write `\\\\{letter}{rest.strip(chr(39))}`" in said


def test_fields_of_messages_that_are_not_read_are_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "grm_jax"):
        read(tmp_path, {"messages": [REPLY[0], {**REPLY[1], "reasoning_content": "hm"}]})
    assert "fields of messages not used: reasoning_content" in caplog.text


def test_bad_rows_are_left_out_and_counted_by_cause(tmp_path, caplog):
    rows = [ROW] * 28
    bad = [{**ROW, "critique": "no"}, {**ROW, "critique": "\boxed{8, 3}"}, {"id": "b"}]
    with caplog.at_level(logging.INFO, "grm_jax"):
        found = read(tmp_path, *rows, *bad, skip_bad_rows=True)
    assert len(found.rows) == 28 and len(found.skipped) == 3
    assert found.causes == {"no_box": 1, "single backslash": 1, "format": 1}
    assert "3 of 31 rows are bad (1 no_box, 1 single backslash, 1 format)" in caplog.text
    assert "t.jsonl:30: critique: U+0008" in caplog.text


def test_many_bad_rows_stop_even_so(tmp_path):
    rows = [ROW] * 8 + [{**ROW, "critique": "no"}] * 2
    with pytest.raises(DataError, match=r"2 of 10 rows are bad \(2 no_box\), more than 10%; the f"):
        read(tmp_path, *rows, skip_bad_rows=True)
    assert len(read(tmp_path, *rows, skip_bad_rows=True, max_bad_share=0.2).rows) == 8
    with pytest.raises(DataError, match=r"1 of 1 rows are bad"):
        read(tmp_path, rows[-1], skip_bad_rows=True, max_bad_share=1.0)


def test_the_log_lists_few_of_many(tmp_path, caplog):
    read(tmp_path, *[ROW] * 300, *[{**ROW, "critique": "no"}] * 20, skip_bad_rows=True)
    assert caplog.text.count("left out: ") == 10


def test_what_a_stage_rejected_is_no_target(tmp_path, caplog):
    rejected = {**ROW, "critique": "no box", "failure": "no_box", "kept": False}
    with caplog.at_level(logging.INFO, "grm_jax"):
        found = read(tmp_path, ROW, rejected)
    assert len(found.rows) == 1 and found.rejected == 1
    assert "1 rows say kept: false" in caplog.text
    with pytest.raises(DataError, match="kept: all 1 rows say false"):
        read(tmp_path, rejected)


def test_the_template_says_what_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**ROW, "critique": "\\boxed{2}"}) + "\n")
    judge, single = Template.load("judge"), Template.load("single")
    assert len(read_targets(path, many=judge, single=single).rows) == 1
    path.write_text(json.dumps({**ROW, "critique": "\\boxed{3}"}) + "\n")
    with pytest.raises(DataError, match=r"outside .*boxed\{1\} for the first response"):
        read_targets(path, many=judge, single=single)


def test_the_embedded_world_is_good(tmp_path):
    from grm_jax.data.synthetic import WorldConfig
    from grm_jax.data.synthetic_files import write_world

    write_world(tmp_path, WorldConfig(cold_start=300, train=5, fresh=5, shifted=5))
    many, single = Template.load("compact"), Template.load("compact_single")
    found = read_targets(tmp_path / "cold_start.jsonl", many=many, single=single)
    assert len(found.rows) == 300 and not found.skipped
