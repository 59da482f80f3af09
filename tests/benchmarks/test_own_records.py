"""The registry, the generic benchmark, the embedded world, and a user's own preference files."""

from __future__ import annotations

import numpy as np
import pytest

from grm_jax.benchmarks import BENCHMARKS, get_benchmark, preferences, synthetic
from grm_jax.data.preferences import write_preferences
from grm_jax.data.rows import DataError
from grm_jax.scoring.figures import Figure, Term
from grm_jax.scoring.items import quotas, stratified
from grm_jax.scoring.rules import PAPER


def test_registry():
    assert get_benchmark("rewardbench").name == "rewardbench"
    with pytest.raises(ValueError, match=r"(?s)'rewardbanch'; there are\n  hhh: .*\n  rewardb"):
        get_benchmark("rewardbanch")
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


def test_figure_by_hand():
    # Strata of 2 and 1 records, weights 1 and 3: (1 * .5 + 3 * 1) / 4.
    figure = Figure("overall", "mean", (Term(1.0, np.array([0, 1])), Term(3.0, np.array([2]))))
    values = {"credit": np.array([[1.0], [0.0], [1.0]])}
    counts = np.array([[1, 1, 1], [0, 2, 1], [1, 2, 0], [0, 0, 0]], float)
    found = figure.bind(values)(counts)
    # Second resample: (0 + 3) / 4; third: its last stratum is empty, so 1/3 alone; fourth: nothing.
    assert found[:3].tolist() == pytest.approx([0.875, 0.75, 1 / 3])
    assert np.isnan(found[3])
    assert figure.members.tolist() == [0, 1, 2]


def test_quotas_by_hand():
    assert quotas({"a": 80, "b": 15, "c": 5}, 20) == {"a": 16, "b": 3, "c": 1}
    assert quotas({"a": 98, "b": 1, "c": 1}, 10) == {"a": 8, "b": 1, "c": 1}
    assert quotas({"a": 5, "b": 9, "c": 7}, 2) == {"a": 0, "b": 1, "c": 1}
    assert quotas({"a": 2, "b": 1}, 9) == {"a": 2, "b": 1}


def test_a_sample_does_not_depend_on_the_order_of_the_file(record):
    records = [record(f"r{i:02}", domain="xy"[i % 2]) for i in range(40)]
    strata = (lambda one: one.domain,)
    forward = stratified(records, 11, strata, seed=0)
    backward = stratified(records[::-1], 11, strata, seed=0)
    assert [one.id for one in forward] == [one.id for one in backward[::-1]]


def test_preferences_by_domain_and_size(tmp_path, record, figures_of):
    records = [
        record("a", 2, domain="maths"),
        record("b", 3, domain="maths"),
        record("c", 1, domain="chat", label=0.0),
        record("d", 2),
    ]
    write_preferences(tmp_path / "mine.jsonl", records)
    loaded = preferences.BENCHMARK.load(tmp_path / "mine.jsonl")
    assert loaded == records
    found = figures_of(preferences.BENCHMARK, loaded, {"a": 1, "b": 0, "c": 0.5, "d": 1})
    assert found == {
        "overall": {"accuracy": 0.625},
        "sections": {"maths": 0.5, "chat": 0.5, "(none)": 1.0},
        "responses": {"n=1": 0.5, "n=2": 1.0, "n=3": 0.0},
    }


def test_preferences_without_domains_have_no_sections(record):
    assert {figure.group for figure in preferences.figures([record("a"), record("b")], PAPER)} == {
        "overall",
        "responses",
    }


def test_preferences_with_a_shared_best(tmp_path, record):
    rows = (
        '{"id": "a", "query": "q", "responses": ["x", "y"], "labels": [1, 1]}\n'
        '{"id": "b", "query": "q", "responses": ["x", "y"], "labels": [1, 0]}\n'
    )
    path = tmp_path / "tied.jsonl"
    path.write_text(rows)
    with pytest.raises(DataError, match="without a unique best"):
        preferences.BENCHMARK.load(path)
    found = preferences.BENCHMARK.load(path, skip_bad_rows=True)
    assert [one.id for one in found] == ["b"]
    assert found.skipped == (f"{path}:1: labels: no unique best in [1.0, 1.0]",)
    path.write_text(rows.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="no unique best"):
        preferences.BENCHMARK.load(path, skip_bad_rows=True)
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        preferences.BENCHMARK.load(tmp_path / "gone.jsonl")


def test_synthetic_headline_is_fresh(tmp_path, record, figures_of):
    records = [
        record("f1", 2, domain="fresh"),
        record("f2", 1, domain="fresh", label=0.0),
        record("o1", 2, domain="operands"),
        record("c1", 4, domain="combinations"),
    ]
    write_preferences(tmp_path / "world" / "heldout.jsonl", records)
    for path in (tmp_path, tmp_path / "world", tmp_path / "world" / "heldout.jsonl"):
        assert synthetic.BENCHMARK.load(path) == records
    found = figures_of(synthetic.BENCHMARK, records, {"f1": 1, "f2": 0.5, "o1": 0, "c1": 0.25})
    assert found == {
        "overall": {"fresh": 0.75},
        "sections": {"fresh": 0.75, "operands": 0.0, "combinations": 0.25},
        "responses": {"n=1": 0.5, "n=2": 1.0},  # of fresh records only
    }
    assert {one.domain for one in synthetic.BENCHMARK.load(tmp_path, limit=3)} == {
        "fresh",
        "operands",
        "combinations",
    }


def test_synthetic_faults(tmp_path, record):
    with pytest.raises(DataError, match=r"no heldout\.jsonl here; fix: "):
        synthetic.BENCHMARK.load(tmp_path)
    write_preferences(tmp_path / "heldout.jsonl", [record("x", domain="stale")])
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: domain: 'stale'; fix: "):
        synthetic.BENCHMARK.load(tmp_path)
    with pytest.raises(DataError, match="no record of 'fresh'"):
        synthetic.figures([record("o", domain="operands")], PAPER)


def test_the_world_that_is_written_can_be_read(tmp_path, figures_of):
    pytest.importorskip("tokenizers")
    from grm_jax.data.synthetic import WorldConfig
    from grm_jax.data.synthetic_files import write_world

    config = WorldConfig(
        cold_start=2, train=2, fresh=30, shifted=5, unseen_task="sum", unseen_defect="topic"
    )
    write_world(tmp_path, config)
    records = synthetic.BENCHMARK.load(tmp_path)
    assert len(records) == 50
    assert set(
        figures_of(synthetic.BENCHMARK, records, {r.id: 1 for r in records})["sections"]
    ) == set(synthetic.DOMAINS)
