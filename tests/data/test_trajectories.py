"""Trajectory files: round trip, and faults that name line, field and fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grm_jax.data.rows import DataError
from grm_jax.data.trajectories import (
    Instruction,
    Trajectory,
    parse_trajectory,
    read_trajectories,
    write_trajectories,
)

FULL = Trajectory(
    example_id="a",
    failure=None,
    query="What?",
    responses=("x", "y"),
    text="Scores: \\boxed{8, 3}\u2028",
    labels=(1.0, 0.0),
    scores=(8.0, 3.0),
    correct=True,
    finish_reason="stop",
    hinted=True,
    kept=False,
    sample=2,
    order=(1, 0),
)
TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
ROW = {"id": "a", "query": "q", "responses": ["x", "y"], "critique": "c"}


def test_what_is_written_is_read(tmp_path: Path):
    rows = [
        FULL,
        Trajectory(
            example_id="b",
            sample=0,
            order=(0,),
            scores=None,
            failure="no_box",
            finish_reason="length",
            query=(*TURNS, TURNS[0]),
            responses=("only",),
        ),
    ]
    write_trajectories(tmp_path / "t.jsonl", rows)
    assert read_trajectories(tmp_path / "t.jsonl") == rows
    assert "scores" not in json.loads((tmp_path / "t.jsonl").read_text().split("\n")[1])


def test_instructions_and_trajectories_mix_and_unknown_fields_pass(tmp_path: Path):
    write(tmp_path, {"messages": list(TURNS)}, ROW | {"step": 3, "reward": 1.0})
    first, second = read_trajectories(tmp_path / "t.jsonl")
    assert first == Instruction(TURNS)
    assert second == Trajectory(
        example_id="a", sample=0, order=(0, 1), scores=None, failure=None, finish_reason="stop",
        text="c", query="q", responses=("x", "y"),
    )  # fmt: skip


def test_a_critique_by_that_name_is_about_the_responses_as_they_were_shown():
    """What people write, and files of earlier versions; `text` is in the record's order."""
    shown = {"responses": ["c", "a", "b"], "labels": [3, 1, 2], "scores": [9, 7, 8],
             "order": [2, 0, 1]}  # fmt: skip
    found = parse_trajectory({"id": "r", "query": "q", "critique": "t", **shown}, "f:1")
    assert isinstance(found, Trajectory)
    assert found.responses == ("a", "b", "c") and found.shown == ["c", "a", "b"]
    assert found.labels == (1, 2, 3) and found.scores == (7, 8, 9)
    same = parse_trajectory({"example_id": "r", "query": "q", "text": "t", **shown}, "f:1")
    assert isinstance(same, Trajectory)
    assert same.responses == ("c", "a", "b") and same.shown == ["b", "c", "a"]
    with pytest.raises(DataError, match=r"f:1: order: .*\[0, 0, 1\]; fix: give"):
        parse_trajectory({"id": "r", "query": "q", "critique": "t", **shown,
                          "order": [0, 0, 1]}, "f:1")  # fmt: skip


def test_messages_are_read_as_those_of_preferences_are(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w"}}]}
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}], "weight": 1},
        call,
        {"role": "tool", "content": "4 mm"},
        {"role": "assistant", "content": "Yes"},
    ]
    unused: set[str] = set()
    found = parse_trajectory({"messages": messages}, "f:1", unused)
    assert isinstance(found, Instruction) and unused == {"weight"}
    assert [turn["role"] for turn in found.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert found.messages[1]["content"] == "Rain?"
    assert found.messages[2]["content"].startswith("[tool call] w")
    assert "4 mm" in found.messages[3]["content"]
    row = parse_trajectory(ROW | {"query": messages[:2]}, "f:1")
    assert isinstance(row, Trajectory) and row.query[0]["role"] == "system"


def write(directory: Path, *rows: object) -> Path:
    path = directory / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critique": None}, r"critique: null; fix: write a text"),
        ({"id": 5}, r"id: int 5; fix: write a text"),
        ({"query": 5}, r"query: int 5; fix: write a text or messages"),
        ({"query": []}, r"query: is not a list of messages: list \[\]; fix: write \[\{\"role\""),
        ({"query": [{"role": "user"}]}, r"query\[0\]: dict"),
        ({"query": list(TURNS)}, r"query: does not end with the user"),
        ({"responses": "x"}, r"responses: str 'x'; fix: write a list"),
        ({"responses": []}, r"responses: is not a list of texts; fix: write \["),
        ({"responses": [1, 2]}, r"responses: is not a list of texts"),
        ({"labels": [1.0]}, r"labels: has 1 entries for 2 responses; fix: give one a response"),
        ({"labels": ["good", "bad"]}, r"labels\[0\]: str 'good'; fix: write a number"),
        ({"labels": [True, False]}, r"labels\[0\]: bool True; fix: write a number"),
        ({"scores": {"x": 1}}, r"scores: dict \{'x': 1\}; fix: write a list"),
        ({"order": [0, 1, 2]}, r"order: has 3 entries for 2 responses"),
        ({"correct": "false"}, r"correct: str 'false'; fix: write true, false or null"),
        ({"kept": 1}, r"kept: int 1; fix: write true or false"),
        ({"labels": [1, float("nan")]}, r"labels\[1\]: NaN; fix: write a number"),
        ({"scores": [float("inf"), None]}, r"scores\[0\]: Infinity; fix: write a number"),
        ({"scores": [1, None]}, r"scores\[1\]: null; fix: write a number"),
        ({"messages": []}, r"messages: is not a list of messages"),
        ({"messages": list(TURNS[:1])}, r"messages: does not end with the assistant"),
    ],
)
def test_faults_name_file_line_field_and_fix(tmp_path, change, message):
    path = write(tmp_path, ROW, ROW | change)
    with pytest.raises(DataError, match=f"{path}:2: {message}"):
        read_trajectories(path)


@pytest.mark.parametrize("field", ["id", "query", "responses", "critique"])
def test_missing_fields(tmp_path, field):
    path = write(tmp_path, {k: v for k, v in ROW.items() if k != field})
    with pytest.raises(DataError, match=f"{path}:1: {field}: is missing"):
        read_trajectories(path)
