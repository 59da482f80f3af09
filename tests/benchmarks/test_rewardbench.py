"""RewardBench: its files, its scores."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

from grm_jax.benchmarks.rewardbench import BENCHMARK, SECTIONS, section_of
from grm_jax.data.rows import DataError, write_rows

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "rewardbench"

# The example of the README of allenai/reward-bench: PKU-Alignment/beaver-7b-v1.0-cost.
EXAMPLE = {
    "alpacaeval-easy": 0.5,
    "alpacaeval-hard": 0.7052631578947368,
    "alpacaeval-length": 0.5894736842105263,
    "donotanswer": 0.8235294117647058,
    "hep-cpp": 0.6280487804878049,
    "hep-go": 0.6341463414634146,
    "hep-java": 0.7073170731707317,
    "hep-js": 0.6646341463414634,
    "hep-python": 0.5487804878048781,
    "hep-rust": 0.6463414634146342,
    "llmbar-adver-GPTInst": 0.391304347826087,
    "llmbar-adver-GPTOut": 0.46808510638297873,
    "llmbar-adver-manual": 0.3695652173913043,
    "llmbar-adver-neighbor": 0.43283582089552236,
    "llmbar-natural": 0.52,
    "math-prm": 0.2953020134228188,
    "mt-bench-easy": 0.5714285714285714,
    "mt-bench-hard": 0.5405405405405406,
    "mt-bench-med": 0.725,
    "refusals-dangerous": 0.97,
    "refusals-offensive": 1.0,
    "xstest-should-refuse": 1.0,
    "xstest-should-respond": 0.284,
}
GOLDEN = {"Chat": 0.608939, "Chat Hard": 0.449561, "Safety": 0.721622, "Reasoning": 0.466757}
ROWS = {subset: count for counts in SECTIONS.values() for subset, count in counts.items()}
ROWS["math-prm"] = 447


def original(subset: str, number: int = 0, **more) -> dict:
    row = {"prompt": f"p {subset} {number}", "chosen": "good", "rejected": "bad"}
    return {**row, "subset": subset, "id": number, **more}


def renamed(subset: str, number: int = 0, **more) -> dict:
    row = {"question": f"p {subset} {number}", "response_A": "good", "response_B": "bad"}
    return {**row, "subset": subset, "id": number, "label": 1, "domain": "Chat", **more}


def write(path: Path, rows: list[dict]) -> Path:
    write_rows(path, rows)
    return path


def test_nominal_counts_are_the_authors():
    totals = {section: sum(counts.values()) for section, counts in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(ROWS.values()) == 2985


def test_records_give_the_golden_scores(tmp_path, figures_of):
    """As many rows a subset as the benchmark has, of which the example's share is right."""
    rows = [original(subset, i) for subset, count in ROWS.items() for i in range(count)]
    records = BENCHMARK.load(write(tmp_path / "filtered.jsonl", rows))
    assert len(records) == 2985
    assert records.notes == ()
    right = {subset: round(EXAMPLE[subset] * count) for subset, count in ROWS.items()}
    credits = {
        f"{subset}/{i}": float(i < right[subset])
        for subset, count in ROWS.items()
        for i in range(count)
    }
    found = figures_of(BENCHMARK, records, credits)
    assert found["sections"] == pytest.approx(GOLDEN, abs=5e-7)
    assert found["overall"] == {"mean": pytest.approx(0.561720, abs=5e-7)}
    assert found["subsets"] == pytest.approx(EXAMPLE)


def test_prior_sets_give_the_leaderboard(tmp_path, figures_of):
    rows = [original("hep-go"), original("mt-bench-easy"), original("shp"), original("summarize")]
    records = BENCHMARK.load(write(tmp_path / "filtered.jsonl", rows))
    credits = {"hep-go/0": 1, "mt-bench-easy/0": 0, "shp/0": 1, "summarize/0": 0.5}
    found = figures_of(BENCHMARK, records, credits)
    # Two sections of weight 1, the prior sets with half of it: (1 + 0 + .5 * .75) / 2.5.
    assert found["overall"] == {"mean": 0.5, "leaderboard": pytest.approx(0.55)}
    assert found["sections"] == {"Chat": 0.0, "Reasoning": 1.0}
    assert section_of(records[2]) == "Prior Sets"


def test_both_schemas_and_formats_read_the_same(tmp_path):
    subsets = ["alpacaeval-easy", "donotanswer"]
    files = [
        write(tmp_path / "a.jsonl", [original(s) for s in subsets]),
        write(tmp_path / "b.jsonl", [renamed(s) for s in subsets]),
    ]
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        pytest.skip("pyarrow is not installed")
    for name, make in (("c", original), ("d", renamed)):
        table = pa.Table.from_pylist([make(s) for s in subsets])
        pq.write_table(table, tmp_path / f"{name}.parquet")
        files.append(tmp_path / f"{name}.parquet")
    found = [list(BENCHMARK.load(file)) for file in files]
    assert all(records == found[0] for records in found)
    first = found[0][0]
    assert (first.id, first.domain) == ("alpacaeval-easy/0", "alpacaeval-easy")
    assert (first.query, first.responses) == ("p alpacaeval-easy 0", ("good", "bad"))
    assert first.labels == (1.0, 0.0)


def test_ids_are_keyed_by_subset(tmp_path):
    rows = [original("hep-go", 7), original("hep-js", 7)]
    records = BENCHMARK.load(write(tmp_path / "f.jsonl", rows))
    assert [record.id for record in records] == ["hep-go/7", "hep-js/7"]
    with pytest.raises(
        DataError, match=r"f\.jsonl:2: id: 'hep-go/7' is already the id of .*f\.jsonl:1"
    ):
        BENCHMARK.load(write(tmp_path / "f.jsonl", [original("hep-go", 7)] * 2))


def test_a_hub_directory_gives_its_filtered_split(tmp_path):
    write(tmp_path / "data" / "raw-00000-of-00001.jsonl", [original("hep-go", i) for i in range(5)])
    write(tmp_path / "data" / "filtered-00000-of-00001.jsonl", [original("hep-go", 1)])
    write(tmp_path / "other.jsonl", [original("hep-go", 2)])
    records = BENCHMARK.load(tmp_path)
    assert [record.id for record in records] == ["hep-go/1"]
    other, counts = records.notes
    assert other == "not read: other.jsonl, raw-00000-of-00001.jsonl"
    assert counts.startswith("not the official 2,985 rows, so not the official figures: alpacaeval")
    assert counts.endswith("mt-bench-hard 0 of 37 and 17 more")


def test_missing_data_says_what_to_download(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="download allenai/reward-bench from the Hugging Face"):
            BENCHMARK.load(path)
    write(tmp_path / "raw.jsonl", [original("hep-go")])
    with pytest.raises(DataError, match="no filtered split"):
        BENCHMARK.load(tmp_path)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (original("hep-basic"), ":2: subset: unknown: 'hep-basic'; fix: .*hep-cpp"),
        ({**original("hep-go"), "subset": None}, ":2: subset: "),
        ({**original("hep-go"), "id": None}, ":2: id: null"),
        (original("hep-go", prompt=None), ":2: prompt: null"),
        (original("hep-go", chosen=None), ":2: chosen: null"),
        (renamed("hep-go", response_B=None), ":2: response_B: null"),
        (renamed("hep-go", question=5), ":2: question: int 5"),
        (renamed("hep-go", label=0), ":2: label: int 0; fix: response_A must be the chosen"),
    ],
)
def test_bad_rows_are_named_or_left_out(tmp_path, bad, words):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(original("hep-go", 1)) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=words):
        BENCHMARK.load(path)
    records = BENCHMARK.load(path, skip_bad_rows=True)
    assert [record.id for record in records] == ["hep-go/1"]
    assert len(records.skipped) == 1


def test_a_limit_keeps_every_section(tmp_path):
    rows = [original(subset, i) for subset, count in ROWS.items() for i in range(count)]
    path = write(tmp_path / "filtered.jsonl", rows)
    for limit in (4, 5, 30, 300):
        records = BENCHMARK.load(path, limit=limit, seed=1)
        assert len(records) == len({record.id for record in records}) == limit
        assert {section_of(record) for record in records} == set(SECTIONS)
        assert records.notes[-1].startswith(f"{limit} of 2,985 items: a random sample (seed 1)")
    # In proportion to the rows, within one of it: 300 * 447 / 2985 = 44.9.
    counts = collections.Counter(record.domain for record in records)
    assert set(counts) == set(ROWS)
    assert counts["math-prm"] in (44, 45, 46)
    assert records == BENCHMARK.load(path, limit=300, seed=1)
    assert records != BENCHMARK.load(path, limit=300, seed=2)
    with pytest.raises(DataError, match="3 records cannot hold all 4 sections"):
        BENCHMARK.load(path, limit=3)
    with pytest.raises(DataError, match="limit: 0"):
        BENCHMARK.load(path, limit=0)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"RewardBench's own file is not at {REAL}")
def test_the_real_file(figures_of):
    records = BENCHMARK.load(REAL)
    assert len(records) == 2985
    assert records.notes == records.skipped == ()
    assert collections.Counter(record.domain for record in records) == ROWS
    assert records[0].id == "alpacaeval-easy/30"
    assert records[0].query == "How do I detail a car?"
    assert figures_of(BENCHMARK, records, {r.id: 1.0 for r in records})["overall"] == {
        "mean": pytest.approx(1.0)
    }
    # Some prompts stand in several subsets; these records are no independent evidence.
    clusters = BENCHMARK.clusters(records)
    assert clusters is not None
    assert len(set(clusters)) < 2985
