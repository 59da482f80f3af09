"""Samples on disk, digests of model folders, prompts that are too long."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from grm_jax.data.rows import DataError
from grm_jax.judge.cache import SampleCache, fingerprint, record_digest
from grm_jax.scoring.items import BenchmarkRecords, as_item
from grm_jax.scoring.long_prompts import fit


def test_samples_come_back(tmp_path, record, row):
    about = {"weights": "x", "seed": 0}
    one = record("a")
    cache = SampleCache(tmp_path, about)
    cache.add(record_digest(one), row("a", 0, [1, 2]))
    cache.add(record_digest(one), row("a", -1, None, text="lone \udc80"))
    cache.spent(2, 3.0)
    cache.close()
    again = SampleCache(tmp_path, about)
    assert len(again) == 2 and again.folder == cache.folder
    assert again.get(record_digest(one), 0) == row("a", 0, [1, 2])
    failed = again.get(record_digest(one), -1)
    assert failed is not None and failed.failure == "no_box"
    assert again.get(record_digest(one), 1) is None
    assert again.seconds_per_sample() == 1.5
    # Another record, another seed, other words: other samples.
    assert again.get(record_digest(record("b")), 0) is None
    assert again.get(record_digest(record("a", query="other")), 0) is None
    assert len(SampleCache(tmp_path, {**about, "seed": 1})) == 0
    # Labels are not shown to a judge.
    assert record_digest(dataclasses.replace(one, labels=(0.0, 1.0))) == record_digest(one)


def test_a_cut_line_is_dropped_and_a_bad_one_named(tmp_path, record, row):
    cache = SampleCache(tmp_path, {})
    for sample in range(3):
        cache.add(record_digest(record("a")), row("a", sample, [1, 2]))
    cache.close()
    file = cache.folder / "samples.jsonl"
    blob = file.read_bytes()
    file.write_bytes(blob[:-5])  # the machine died here
    again = SampleCache(tmp_path, {})
    assert len(again) == 2
    again.add(record_digest(record("a")), row("a", 2, [1, 2]))
    again.close()
    assert file.read_bytes() == blob
    file.write_bytes(blob.replace(b'"order": [0, 1]', b'"order": [0, 2]', 1))
    with pytest.raises(DataError, match=r"samples\.jsonl:1: order: .*; fix: "):
        SampleCache(tmp_path, {})


def test_fingerprint_is_of_the_contents(tmp_path):
    folder, memory = tmp_path / "model", tmp_path / "cache" / "digests.json"
    (folder / "params").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "params" / "0").write_bytes(b"weights")
    first = fingerprint(folder, memory)
    assert fingerprint(folder, memory) == first
    os.utime(folder / "config.json", ns=(1, 1))  # touched, not changed
    assert fingerprint(folder, memory) == first
    (folder / "params" / "0").write_bytes(b"heights")
    assert fingerprint(folder, memory) != first


def words(record) -> int:
    return sum(len(text) for text in (*record.responses, record.query))


@pytest.fixture
def records(record):
    long = dataclasses.replace(record("long"), responses=("x" * 900 + "END", "short"))
    pair = as_item(dataclasses.replace(long, id="pair/0"), "pair")
    return BenchmarkRecords([record("a"), long, pair, as_item(record("pair/1"), "pair")])


def test_long_prompts_are_an_error(records):
    assert fit(records, words, 2000, "error") is records
    with pytest.raises(DataError, match=r"2 of 4 prompts have more than 400 tokens, the first 'lo"):
        fit(records, words, 400, "error")


def test_long_prompts_are_left_out_with_their_item(records):
    found = fit(records, words, 400, "skip")
    assert [record.id for record in found] == ["a"]
    assert found.notes == ("2 items with prompts longer than 400 tokens were left out",)
    with pytest.raises(DataError, match="nothing is left"):
        fit(BenchmarkRecords(records[1:2]), words, 400, "skip")


def test_long_prompts_are_cut_in_the_middle(records):
    found = fit(records, words, 400, "truncate-middle")
    assert [record.id for record in found] == [record.id for record in records]
    assert found[0] is records[0] and found[3] is records[3]
    cut = found[1].responses[0]
    assert 350 < words(found[1]) <= 400
    assert cut.startswith("xxx") and cut.endswith("END") and "characters left out" in cut
    left_out = int(cut.split("[... ")[1].split()[0])
    assert len(cut.replace(f"\n[... {left_out} characters left out ...]\n", "")) + left_out == 903
    assert found[1].responses[1] == "short" and found[1].labels == records[1].labels
    assert found.notes == ("2 prompts longer than 400 tokens were cut in the middle",)
    with pytest.raises(DataError, match="tokens too many even with 64 characters of each text"):
        fit(records, words, 50, "truncate-middle")


def test_records_that_differ_only_in_what_was_cut_are_left_out(record):
    def pair(id: str, place: int, labels=(1.0, 0.0)):
        texts = ["x" * 900, "x" * place + "y" + "x" * (899 - place)]
        return dataclasses.replace(record(id), responses=tuple(texts), labels=labels)

    given = [record("a"), pair("middle", 450), pair("end", 899), pair("tie", 450, (1.0, 1.0))]
    items = [as_item(pair("item/0", 450), "item"), as_item(record("item/1"), "item")]
    found = fit(BenchmarkRecords([*given, *items]), words, 400, "truncate-middle")
    assert [one.id for one in found] == ["a", "end", "tie"]
    assert found.notes == (
        "4 prompts longer than 400 tokens were cut in the middle",
        "2 items were left out: their responses differ only in what was cut",
    )
    with pytest.raises(DataError, match="nothing is left"):
        fit(BenchmarkRecords(given[1:2]), words, 400, "truncate-middle")


@pytest.mark.parametrize("content", ["", "[]", '{"a', '{"%s": 3}'])
def test_a_broken_memory_of_digests_only_costs_time(tmp_path, content, caplog):
    folder, memory = tmp_path / "model", tmp_path / "digests.json"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    first = fingerprint(folder, memory)
    (name,) = json.loads(memory.read_text())
    memory.write_text(content % name if "%s" in content else content)
    assert fingerprint(folder, memory) == first
    assert ("digests.json" in caplog.text) == ("%s" not in content)
    assert list(json.loads(memory.read_text())) == [name]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "not valid JSON"), ("[]", "list"), ("{}", "samples"), ('{"samples": "1"}', "samples")],
)
def test_notes_of_seconds_that_are_none(tmp_path, line, words):
    cache = SampleCache(tmp_path, {"weights": "a"})
    (cache.folder / "seconds.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words) as error:
        cache.seconds_per_sample()
    assert "seconds.jsonl:1" in str(error.value)
    cache.close()
