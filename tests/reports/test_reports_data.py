"""Preference files that users have, through the commands: read rightly, counted, or refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from grm_jax import evaluate, train
from grm_jax.data.preferences import read_preferences
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.parallel.options import MeshConfig
from grm_jax.scoring.results import read_results
from grm_jax.training.run import Run
from grm_jax.training.setup import Setup

INPUTS = Path(__file__).parent / "inputs"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(cold_start=2, train=2, fresh=2, shifted=2))
    return folder / "tokenizer"


@pytest.fixture
def training(monkeypatch, tmp_path, capsys, tokenizer):
    """(file, arguments) -> (exit code, what was printed) of training a scalar RM on it."""
    monkeypatch.setattr(train, "setup_devices", lambda count: None)  # the suite has its devices

    def run(name: str, *more: str) -> tuple[int, str]:
        args = ["--config", "scalar_rm.py", "--run-dir", tmp_path / "run", "--distributed", "off",
                "--tokenizer", tokenizer, "--scalar-rm.start", "base",
                "--preferences", INPUTS / name, *more]  # fmt: skip
        code = train.main([str(arg) for arg in args])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


@pytest.fixture
def evaluation(tmp_path, capsys):
    """(file, arguments) -> results of the judge `longer` on it."""

    def run(name: str, *more: str):
        out = tmp_path / "out"
        args = ["--bench", "preferences", "--data", INPUTS / name, "--judge", "longer", "-k", "0",
                "--resamples", "20", "--output", out, *more]  # fmt: skip
        evaluate.main([str(arg) for arg in args])
        capsys.readouterr()
        return read_results(out / "preferences" / "results.json")

    return run


def records(name: str, tmp_path: Path, **options):
    """What training sees of a file."""
    setup = Setup(
        run_dir=str(tmp_path / "run"), preferences=str(INPUTS / name), mesh=MeshConfig(1, -1, 1),
        **options,
    )  # fmt: skip
    return Run(setup).records


KEPT = "--skip-bad-rows leaves such rows out"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("01_null_rejected.jsonl", (":11: rejected: null; fix: give 'chosen' and",)),
        ("01_null_chosen.jsonl", (": chosen: null; fix: ",)),
        ("01_null_in_responses.jsonl", (": responses[", "]: null; fix: ")),
        ("03_chosen_equals_rejected.jsonl", (":1: responses: responses 0 and 1 (from 0) are",)),
        ("05_latin1.jsonl", ("not UTF-8",)),
        ("05_utf16.jsonl", ("not UTF-8",)),
        ("06_ratings_as_text.jsonl", (":2: labels[0]: str 'N/A'; fix: give a number",)),
        ("94_one_tie.jsonl", ("1 record(s) without a unique best response", "[3.0, 3.0]")),
    ],
)  # fmt: skip
def test_training_refuses_by_name(training, tmp_path, name, words):
    code, said = training(name)
    error = said.splitlines()[-1]
    assert code == 1 and error.startswith("error: ") and "Traceback" not in said
    for word in (*words, KEPT):
        assert word in error
    assert not (tmp_path / "run" / "scalar_rm").exists()


def test_a_large_share_of_bad_rows_stops(training):
    code, said = training("01_null_rejected_97of100.jsonl", "--skip-bad-rows")
    assert code == 1
    assert "97 of 100 rows are bad, more than 10%; the first: " in said
    assert "give a larger --max-bad-share" in said.splitlines()[-1]
    code, said = training("03_chosen_equals_rejected.jsonl", "--skip-bad-rows")
    assert code == 1 and "all 60 rows are bad" in said
    code, said = training("94_one_tie.jsonl", "--max-bad-share", "1.5")
    assert code == 1 and "--max-bad-share 1.5: give 0 to 1" in said


def test_a_larger_share_is_taken_when_asked_for(tmp_path, caplog):
    """What the message says. Ten are listed, all are in a file."""
    with caplog.at_level(logging.WARNING):
        kept = records("01_null_rejected_97of100.jsonl", tmp_path, skip_bad_rows=True,
                       max_bad_share=0.97)  # fmt: skip
    assert len(kept) == 3
    assert (
        caplog.text.count("skipped: ") == 10
        and "skipped 97 rows, kept 3; all of them: " in caplog.text
    )
    listed = (tmp_path / "run" / "skipped_rows.txt").read_text().splitlines()
    assert len(listed) == 97 and all(": rejected: null; fix: " in line for line in listed)
    assert str(tmp_path / "run" / "skipped_rows.txt") in caplog.text


def test_what_is_skipped_is_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(records("01_null_rejected.jsonl", tmp_path, skip_bad_rows=True)) == 97
        assert len(records("94_one_tie.jsonl", tmp_path, skip_bad_rows=True)) == 39
    assert "3 bad rows left out" in caplog.text
    assert "1 records left out that have no unique best response" in caplog.text
    (line,) = (tmp_path / "run" / "skipped_rows.txt").read_text().splitlines()
    assert re.search(r"94_one_tie\.jsonl:\d+: labels: no unique best in \[3\.0, 3\.0\]", line)


def test_evaluation_counts_the_same(evaluation, tmp_path):
    for name in ("01_null_rejected.jsonl", "94_one_tie.jsonl", "06_ratings_as_text.jsonl"):
        with pytest.raises(SystemExit, match=KEPT):
            evaluation(name)
    results = evaluation("01_null_rejected.jsonl", "--skip-bad-rows")
    assert (results.records, len(results.skipped)) == (97, 3)
    results = evaluation("94_one_tie.jsonl", "--skip-bad-rows")
    assert (results.records, len(results.skipped)) == (39, 1)
    with pytest.raises(SystemExit, match="97 of 100 rows are bad, more than 10%"):
        evaluation("01_null_rejected_97of100.jsonl", "--skip-bad-rows")
    more = ("--skip-bad-rows", "--max-bad-share", "0.97")
    results = evaluation("01_null_rejected_97of100.jsonl", *more)
    assert (results.records, len(results.skipped)) == (3, 97)
    with pytest.raises(SystemExit, match=r"--max-bad-share 2\.0 is a share"):
        evaluation("94_one_tie.jsonl", "--max-bad-share", "2")


def test_other_benchmarks_stop_at_a_large_share(tmp_path):
    args = ["--bench", "rewardbench", "--data", INPUTS / "01_benchmark_null.jsonl", "--judge",
            "random", "--output", tmp_path]  # fmt: skip
    with pytest.raises(SystemExit, match=r"01_benchmark_null\.jsonl:1: chosen: null; fix: "):
        evaluate.main([str(arg) for arg in args])


def test_tools_do_not_vanish():
    pair, chat = read_preferences(INPUTS / "02_tool_calls_dropped.jsonl")
    assert pair.responses == ("[tool call] w", "I do not know")
    assert chat.turns[1]["content"] == "let me look\n[tool call] w"
    (record,) = read_preferences(INPUTS / "02_tool_turns.jsonl")
    assert [turn["content"] for turn in record.turns] == [
        "Weather?", "[tool call] w", "[tool result] 4 degrees", "And?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"),
    [("05_two_bom_files_joined.jsonl", 4), ("05_bom_only_line.jsonl", 2), ("05_bom.json", 1)],
)
def test_byte_order_marks(name, count):
    assert len(read_preferences(INPUTS / name)) == count


def test_ratings_in_texts():
    got = read_preferences(INPUTS / "06_ratings_as_text.jsonl", skip_bad_rows=True)
    assert [record.labels for record in got] == [(8.5, 7), (1, 0), (1,), (1, 0)]
    assert len(got.skipped) == 1 and ":2: labels[0]: str 'N/A'" in got.skipped[0]


SHAPES = {
    "07_alpaca_dpo": ([("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_arena": ([("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_orca_dpo": ([("system", "Be brief"), ("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_sharegpt": ([("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_skywork_pref": ([("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_system_beside_prompt": ([("system", "Be brief"), ("user", "Hi")], ("Hello", "no"), (1, 0)),
    "07_ultrafeedback_binarized": ([("user", "Hi")], ("Hello", "no"), (8.5, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(evaluation, name):
    (record,) = read_preferences(INPUTS / f"{name}.jsonl")
    turns, responses, labels = SHAPES[name]
    assert [(turn["role"], turn["content"]) for turn in record.turns] == turns
    assert (record.responses, record.labels) == (responses, labels)
    results = evaluation(f"{name}.jsonl")
    assert results.records == 1 and not results.skipped


def test_fields_that_are_not_read_are_told_in_an_evaluation(evaluation):
    notes = evaluation("07_arena.jsonl").notes
    assert any("fields not used: model_a, model_b, question_id" in note for note in notes)


def test_published_shapes_of_several_rows(evaluation):
    better, equal = read_preferences(INPUTS / "07_helpsteer3_rows.jsonl")
    assert better.labels == (1, 0) and better.domain == "general" and not equal.has_unique_best
    rows = read_preferences(INPUTS / "07_rewardbench2_rows.jsonl")
    assert len(rows) == 14 and rows[0].responses[:2] == ("right answer 0", "wrong 0")
    lines = (INPUTS / "07_rewardbench2_rows.jsonl").read_text().splitlines()
    for record, row in zip(rows, map(json.loads, lines), strict=True):
        assert list(record.responses) == row["chosen"] + row["rejected"]
        assert list(record.labels) == [1] * len(row["chosen"]) + [0] * len(row["rejected"])
    with pytest.raises(DataError, match="no other to compare it with"):
        read_preferences(INPUTS / "07_helpsteer2_rows.jsonl")
    folder = read_preferences(INPUTS / "07_reward-bench-2")
    assert [r.responses for r in folder] == [r.responses for r in rows]
