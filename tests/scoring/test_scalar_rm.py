"""A scalar RM beside a judge: the evaluate command with tiny (random) models, and its file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grm_jax import evaluate
from grm_jax.benchmarks import synthetic
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.critique.voting import hybrid_scores
from grm_jax.data.critiques import read_critiques
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeOptions
from grm_jax.judge.scalar import load_scalar_rm
from grm_jax.model import storage
from grm_jax.model.config import ModelConfig
from grm_jax.parallel.mesh import make_mesh
from grm_jax.scoring import scalar_rm
from grm_jax.scoring.results import MethodResult, Results, read_results
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.sampling import BenchmarkSampler
from grm_jax.scoring.scalar_scores import (
    ScalarScores,
    read_scalar_scores,
    write_scalar_scores,
)
from grm_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_params) -> Path:
    """A run directory with a judge and a scalar RM, and held-out records."""
    folder = tmp_path_factory.mktemp("scalar") / "run"
    write_world(folder / "world", WorldConfig(cold_start=4, train=4, fresh=16, shifted=2))
    tokenizer = load_tokenizer(folder / "world" / "tokenizer")
    config = ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
        query_pre_attn_scalar=8, vocab_size=tokenizer.vocab_size, sliding_window=16,
        max_position=160,
    )  # fmt: skip
    for stage, labels in (("rl", 0), ("scalar_rm", 1)):
        params = make_params(config, 3, num_labels=labels)
        model = folder / stage / "model"
        storage.save_model(model, config, params, folder / "world" / "tokenizer")
        names = TemplateConfig("compact", "compact_single", "compact_meta")
        about = {"templates": dataclasses.asdict(names), "length_buckets": [160]}
        about["judge"] = {"temperature": 0.5, "max_new_tokens": 8}
        (model / storage.ABOUT_FILE).write_text(json.dumps(about))
    (folder / "scalar_rm" / "calibration.json").write_text('{"threshold": 0.25}\n')
    return folder


def command(*args: object) -> None:
    evaluate.main(["--bench", "synthetic", "--resamples", "50", *map(str, args)])


def method(results: Results, name: str) -> MethodResult:
    return next(method for method in results.methods if method.name == name)


@pytest.fixture(scope="module")
def asked(run, tmp_path_factory) -> tuple[list[object], Path]:
    """The arguments of a command that has been run, and its output."""
    place = tmp_path_factory.mktemp("evaluated")
    args = ["--model", run, "--scalar", run, "-k", 4, "--probes", 0, "--cache", place / "cache"]
    command(*args, "--output", place / "out")
    return args, place / "out" / "synthetic"


def test_rows_tables_and_plots_have_the_scalar_rm(run, asked):
    _, out = asked
    results = read_results(out / "results.json")
    names = [m.name for m in results.methods]
    wanted = ["greedy", "sample@1", "vote@2", "vote@4", "hybrid@2", "hybrid@4", "scalar"]
    assert names == wanted
    records = synthetic.BENCHMARK.load(run)
    model = load_scalar_rm(run, make_mesh())
    scores = model.scores([(r.turns, r.responses) for r in records], make_mesh(), 8192)
    kept = read_scalar_scores(out / "scalar.json")
    assert kept.threshold == 0.25 and len(kept.weights) == 16
    for record, row in zip(records, scores, strict=True):
        np.testing.assert_allclose(kept.scores[record.id], row, atol=1e-5)
    right = []
    for record in (r for r in records if r.domain == synthetic.FRESH):
        row = kept.scores[record.id]
        best = max(range(len(row)), key=row.__getitem__)
        single = (row[0] > 0.25) == (record.labels[0] == 1)
        right.append(single if len(row) == 1 else record.labels[best] == max(record.labels))
    figure = results.figure("scalar")
    assert figure is not None and figure.value == pytest.approx(np.mean(right))
    assert results.settings["scalar_weight"] == 0.5
    assert results.settings["scalar_threshold"] == 0.25
    compared = {(pair.first, pair.second) for pair in results.comparisons}
    assert {("hybrid@2", "vote@2"), ("hybrid@4", "vote@4"), ("hybrid@4", "scalar")} <= compared
    table = (out / "table.md").read_text()
    assert "| hybrid@4 |" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| scalar |")]
    assert row.endswith("| 0 | 0.0% | 0.0% | - | - |"), "it has no samples to be unparsable"
    page = (out.parent / "report.html").read_text()
    assert "hybrid@4" in page and ">scalar<" in page
    for text in ((out / "accuracy.svg").read_text(), page):
        assert "voting plus the scalar RM" in text and "scalar RM" in text


def test_nothing_is_scored_twice_and_files_give_the_same_figures(
    run, asked, tmp_path, monkeypatch, capsys
):
    args, out = asked

    def loaded(*args, **more):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(scalar_rm, "load_scalar_rm", loaded)
    first = read_results(out / "results.json")
    command(*args, "--output", tmp_path / "again", "--compare", out.parent)
    again = read_results(tmp_path / "again" / "synthetic" / "results.json")
    assert again.methods == first.methods
    differences = {(one.method, one.figure): one.difference.value for one in again.against}
    assert differences["hybrid@4", "fresh"] == differences["scalar", "fresh"] == 0
    # From its samples and scalar.json, without a model.
    command("--data", run, "--samples", out, "--output", tmp_path / "samples")
    there = tmp_path / "samples" / "synthetic"
    assert read_results(there / "results.json").methods == first.methods
    assert (there / "scalar.json").read_bytes() == (out / "scalar.json").read_bytes()
    weighed = ["--scalar-weight", 1000, "--output", tmp_path / "weighed"]
    command("--data", run, "--samples", out, *weighed)
    other = read_results(tmp_path / "weighed" / "synthetic" / "results.json")
    assert other.settings["scalar_weight"] == 1000
    assert method(other, "vote@4") == method(first, "vote@4")
    # Samples that were drawn without a scalar RM do not keep the scores of an earlier run.
    command(*args[:2], *args[4:], "--output", tmp_path / "again")
    assert not (tmp_path / "again" / "synthetic" / "scalar.json").exists()
    plain = read_results(tmp_path / "again" / "synthetic" / "results.json")
    assert [m.name for m in plain.methods] == ["greedy", "sample@1", "vote@2", "vote@4"]
    with pytest.raises(SystemExit) as error:
        command("--data", run, "--samples", tmp_path / "again", "--scalar-weight", 1)
    assert "are no scores of a scalar RM; give --model and --scalar" in str(error.value)


def test_votes_that_could_be_read_are_added_to(run, asked, tmp_path):
    """The random model's critiques fail; with scores in their place the rows are the formula's."""
    _, out = asked
    rng = np.random.default_rng(0)
    place = tmp_path / "synthetic"
    place.mkdir()
    lines = []
    for row in read_critiques(out / "samples.jsonl"):
        scores = rng.integers(1, 11, len(row.order)).tolist()
        lines.append({**vars(row), "scores": scores, "failure": None})
    (place / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("scalar.json", "results.json"):
        shutil.copy(out / name, place / name)
    command("--data", run, "--samples", tmp_path, "--scalar-weight", 3)
    results = read_results(place / "results.json")
    kept = read_scalar_scores(place / "scalar.json")
    right = []
    for record in synthetic.BENCHMARK.load(run):
        if record.domain != synthetic.FRESH:
            continue
        mine = [x["scores"] for x in lines if x["example_id"] == record.id and x["sample"] >= 0]
        mean = np.mean(mine, axis=0)
        if len(mean) == 1:
            threshold = results.settings["rules"]["threshold"]
            right.append((mean[0] > threshold) == (record.labels[0] == 1))
        else:
            values = hybrid_scores(mean.tolist(), kept.scores[record.id], 3)
            right.append(int(np.argmax(values)) == int(np.argmax(record.labels)))
    figure = results.figure("hybrid@4")
    assert figure is not None and figure.value == pytest.approx(np.mean(right))


def test_without_a_calibration_single_responses_do_not_count(run, asked, tmp_path, capsys):
    args, _ = asked
    folder = tmp_path / "model"  # a model without its stage's directory
    shutil.copytree(run / "scalar_rm" / "model", folder)
    command(*args[:2], "--scalar", folder, *args[4:], "--output", tmp_path / "out")
    results = read_results(tmp_path / "out" / "synthetic" / "results.json")
    singles = sum(len(r.responses) == 1 for r in synthetic.BENCHMARK.load(run))
    note = f"scalar: {singles} single responses do not count in this row"
    assert singles and any(one.startswith(note) for one in results.notes)
    assert note in capsys.readouterr().out
    assert ("hybrid@4", "scalar") not in {(p.first, p.second) for p in results.comparisons}
    assert "n=1" not in method(results, "scalar").figures["responses"]
    assert "n=1" in method(results, "hybrid@4").figures["responses"]


def test_what_the_scalar_rm_can_not_read_is_found_before_sampling(run, tmp_path):
    options = JudgeOptions(k=1, max_new_tokens=8)
    judge = BenchmarkSampler(run, options, scalar=run, cache=tmp_path, long_prompts="error")
    assert judge._scalar is not None and judge._scalar.limit == 160
    records = synthetic.BENCHMARK.load(run)
    assert judge.fit(synthetic.BENCHMARK, records, Rules()) == records
    judge._scalar.limit = max(map(judge._scalar.tokens, records)) - 1
    with pytest.raises(DataError, match=r"prompts have more than 152 tokens.*give --long-prompts"):
        judge.fit(synthetic.BENCHMARK, records, Rules())
    with pytest.raises(UserError, match="scalar"):
        BenchmarkSampler(run, options, scalar=run / "rl", cache=tmp_path)


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", '"0.5"', "true"])
def test_a_threshold_is_a_finite_number(tmp_path, threshold):
    file = tmp_path / "calibration.json"
    assert scalar_rm.read_threshold(file) is None
    file.write_text('{"threshold": -1}')
    assert scalar_rm.read_threshold(file) == -1
    file.write_text(f'{{"threshold": {threshold}}}')
    with pytest.raises(DataError, match=r"threshold: .*train the scalar RM again") as error:
        scalar_rm.read_threshold(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": "0.5"}, "threshold: str '0.5'"),
        ({"weights": None}, "weights: null"),
        ({"scores": [1.0]}, "scores: list"),
        ({"scores": {"a": [1.0, "2"]}}, r"scores\['a'\]: list"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, words):
    file = tmp_path / "scalar.json"
    found = ScalarScores({"a": (1.0, -2.5), "b": (0.0,)}, None, "digest")
    write_scalar_scores(file, found)
    assert read_scalar_scores(file) == found
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=words) as error:
        read_scalar_scores(file)
    assert str(file) in str(error.value)
