"""Token counts that outlive a process."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from grm_jax.training.counts import Counts


@pytest.fixture
def count():
    """A way to count that remembers what it was asked."""

    class Count:
        def __init__(self, tokens=7):
            self.tokens, self.asked = tokens, []

        def __call__(self, order):
            self.asked.append(tuple(order))
            return self.tokens + order[0]

    return Count


def test_a_second_start_counts_one_prompt_only(tmp_path, make_record, count):
    file = tmp_path / "lengths.json"
    records = [make_record(f"r{i}", (0, 1), f"query {i}") for i in range(3)]
    asked = [(kind, r, order) for r in records for kind in "ab" for order in ((0, 1), (1, 0))]
    first, again = count(), count()
    counts = Counts(file, "these")
    expected = [counts.get(kind, r, order, first) for kind, r, order in asked]
    assert expected == [counts.get(kind, r, order, first) for kind, r, order in asked]
    assert len(first.asked) == len(asked) == 12
    counts.save()
    later = Counts(file, "these")
    # Equal records, read again.
    found = [later.get(kind, dataclasses.replace(r), order, again) for kind, r, order in asked]
    assert found == expected and again.asked == [(0, 1)]
    written = file.stat().st_mtime_ns
    later.save()
    assert file.stat().st_mtime_ns == written, "there is nothing new"


@pytest.mark.parametrize(
    "how", ["other files", "damaged", "cut off", "no object", "another version"]
)
def test_a_file_that_does_not_fit_is_not_used(tmp_path, make_record, count, caplog, how):
    file, record = tmp_path / "lengths.json", make_record("r", (0, 1))
    counts = Counts(file, "these")
    for order in ((0, 1), (1, 0)):
        counts.get("a", record, order, count())
    counts.save()
    text, tokens = file.read_text(encoding="utf-8"), 7
    if how == "damaged":
        file.write_bytes(b"\xff" + text.encode())
    elif how == "cut off":
        file.write_text(text[:-9], encoding="utf-8")
    elif how == "no object":
        file.write_text("[1]", encoding="utf-8")
    elif how == "another version":
        tokens = 9
    with caplog.at_level(logging.WARNING, logger="grm_jax"):
        later = Counts(file, "others" if how == "other files" else "these")
        again = count(tokens)
        assert [later.get("a", record, order, again) for order in ((0, 1), (1, 0))] == [
            tokens, tokens + 1,
        ]  # fmt: skip
    assert set(again.asked) == {(0, 1), (1, 0)}
    assert ("counted again" in caplog.text) == (how != "other files")
    later.save()
    assert json.loads(file.read_text(encoding="utf-8"))["counts"] == later._counts


def test_records_are_told_apart_by_their_text(make_record, count):
    counts = Counts()
    long = make_record("r", (0, 1))
    short = dataclasses.replace(long, responses=("a", "b"))
    assert counts.get("a", long, (0, 1), count(9)) == 9
    assert counts.get("a", short, (0, 1), count(3)) == 3
    assert counts.get("a", long, (0, 1), count(5)) == 9
    counts.save()


def test_nothing_is_written_before_there_is_a_run(tmp_path, make_record, count):
    counts = Counts(tmp_path / "run" / "lengths.json")
    counts.get("a", make_record("r", (0, 1)), (0, 1), count())
    counts.save()
    assert not (tmp_path / "run").exists()
