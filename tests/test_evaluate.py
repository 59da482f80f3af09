"""The evaluate command, end to end, without a model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import jax
import pytest

from grm_jax import evaluate
from grm_jax.critique.template_set import Scales
from grm_jax.data.critiques import read_critiques, write_critiques
from grm_jax.data.preferences import Preference, write_preferences
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.scoring import assess, card
from grm_jax.scoring.bias import identical
from grm_jax.scoring.judges import judge_rows
from grm_jax.scoring.results import read_results


@pytest.fixture
def data(tmp_path) -> Path:
    records = [
        Preference(
            f"r{i}",
            ({"role": "user", "content": f"q{i}"},),
            ("a much longer response", "short") if i % 4 else ("good", "a long bad one"),
            (1.0, 0.0),
            domain="easy" if i % 2 else "hard",
        )
        for i in range(20)
    ]
    write_preferences(tmp_path / "mine.jsonl", records)
    return tmp_path / "mine.jsonl"


def run(*args: object) -> None:
    evaluate.main([str(arg) for arg in args])


def fails(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code not in (0, None)
    return f"{error.value.code}{capsys.readouterr().err}"


def test_longer(data, tmp_path, capsys):
    out = tmp_path / "out"
    run("--bench", "preferences", "--data", data, "--judge", "longer", "--output", out)
    shown = capsys.readouterr().out
    assert "preferences: 20 records from" in shown
    assert "75.0 [" in shown
    results = json.loads((out / "preferences" / "results.json").read_text())
    figures = results["methods"][0]["figures"]
    assert figures["overall"]["accuracy"]["value"] == 0.75
    assert figures["sections"]["easy"]["value"] == 1.0
    assert results["settings"]["arguments"]["judge"] == "longer"
    assert not (out / "preferences" / "accuracy.png").exists()


def test_samples_are_scored_again(data, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--bench", "preferences", "--data", data]
    run(*common, "--judge", "random", "-k", 4, "--output", out)
    top, out = out, out / "preferences"
    first = json.loads((out / "results.json").read_text())
    assert [method["name"] for method in first["methods"]] == [
        *("greedy", "sample@1", "vote@2", "vote@4")
    ]
    assert (out / "accuracy.svg").exists()
    samples = (out / "samples.jsonl").read_bytes()
    assert len(read_critiques(out / "samples.jsonl")) == 100
    assert (top / "report.html").exists()
    run(*common, "--samples", top, "--unparsed", "half")
    again = json.loads((out / "results.json").read_text())
    assert (out / "samples.jsonl").read_bytes() == samples
    assert again["settings"]["rules"]["unparsed"] == "half"
    # What is known of the samples stays known.
    assert again["judge"] == first["judge"] == "random"
    assert again["settings"]["arguments"]["k"] == 4
    assert "these samples were drawn with 'random'" in fails(
        capsys, *common, "--samples", top, "--order", "fixed"
    )
    assert again["methods"] == first["methods"]
    capsys.readouterr()
    assert "is none of the 10 records" in fails(
        capsys, *common, "--samples", out / "samples.jsonl", "--limit", 10
    )


def test_attacks_make_a_card(data, tmp_path, capsys):
    """Of the judge that prefers more characters: filler always wins, a full stop never."""
    out = tmp_path / "out"
    common = ["--bench", "preferences", "--data", data, "--judge", "longer", "--output", out]
    run(*common, "--attacks", "--attack-records", 6, "--resamples", 50)
    assert "attacks, greedy" in capsys.readouterr().out
    found = json.loads((out / "preferences" / "card.json").read_text())
    assert found["accuracy"]["greedy"]["value"] == 0.75
    rows = {row["id"]: row["figures"] for row in found["attacks"]["methods"]["greedy"]}
    assert rows["LEN1"]["flips"]["two"]["value"] == rows["LEN1"]["wins"]["two"]["value"] == 1
    assert rows["MK2"]["wins"]["two"]["value"] == rows["POS"]["flips"]["all"]["value"] == 0
    assert found["attacks"]["records"] == 6  # pairs, and made of others of them single responses
    assert not any(id.startswith("EW") for id in rows)  # only of the embedded world
    for name, words in (
        ("card.md", "# Judge card: longer\n"), ("card.html", "<td>master keys"),
        ("attacks.md", "| RJ-H4 | a finished judgement, then a new task |"),
    ):  # fmt: skip
        text = (out / "preferences" / name).read_text()
        assert words in text
    assert "master keys" in (out / "preferences" / "card.md").read_text()


def test_a_card_says_which_judge_it_is(tmp_path):
    """On a line a topic, whatever is nested; what is not known is left out."""
    provenance = {
        "weights": "abc", "templates": {"many": "1", "single": "2"}, "int8": [False, True],
        "made from": {"data": [], "models": ["m"], "templates": {"many": "1"}}, "stage": None,
    }  # fmt: skip
    results = types.SimpleNamespace(versions={"jax": "1.0", "python": "3"})
    shown = card.provenance_grid(card.Card(provenance, results, None, None))  # type: ignore
    assert dict(shown.rows) == {
        "weights": "abc",
        "templates": "many 1, single 2",
        "int8": "False True",
        "made from": "models m, templates many 1",
        "versions": "jax 1.0, python 3",
    }


def test_a_card_is_of_sampled_votes_too(tmp_path):
    """Without --bench the embedded world is judged; a vote has a calibration."""
    write_world(tmp_path / "world", WorldConfig(cold_start=1, train=1, fresh=60, shifted=2))
    run(
        *("--attacks", "--judge", "random", "-k", 6, "--data", tmp_path / "world", "--resamples"),
        *(20, "--attack-records", 6, "--attack-k", 2, "--output", tmp_path / "out"),
    )
    found = json.loads((tmp_path / "out" / "synthetic" / "card.json").read_text())
    assert found["calibration"]["k"] == 6
    assert list(found["attacks"]["methods"]) == ["greedy", "vote@2"]
    assert "EW1" in {row["id"] for row in found["attacks"]["methods"]["vote@2"]}
    assert "calibration of 6 votes" in (tmp_path / "out" / "synthetic" / "card.md").read_text()


def test_home_directories_in_paths(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(data.parent, tmp_path / "home" / "d")
    common = ["--bench", "preferences", "--data", f"~/d/{data.name}", "--resamples", 20]
    run(*common, "--judge", "random", "-k", 2, "--output", "~/one")
    run(*common, "--samples", "~/one", "--compare", "~/one", "--output", "~/two")
    found = read_results(tmp_path / "home" / "two" / "preferences" / "results.json")
    assert found.against and not Path("~").exists()
    named = ["--judge", "longer", "--output", "~nobody-of-this-name/o"]
    assert "~nobody-of-this-name/o: no such user" in fails(capsys, *common, *named)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_are_written_though_nobody_reads_on(data, tmp_path, unbuffered):
    command = [sys.executable, "-m", "grm_jax.evaluate", "--bench", "preferences", "--resamples"]
    command += ["20", "--data", str(data), "--judge", "longer", "--output", str(tmp_path / "out")]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    files = {file.name for file in (tmp_path / "out").rglob("*")}
    assert {"results.json", "table.md", "samples.jsonl", "report.html"} <= files


def test_default_output(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--bench", "preferences", "--data", data, "--judge", "longer", "--limit", 8)
    results = json.loads((tmp_path / "runs/evaluate/longer/preferences/results.json").read_text())
    assert results["records"] == 8
    assert "8 of 20 items: a random sample (seed 0)" in results["notes"][0]


class FakeJudge:
    """Stands for `sampling.BenchmarkSampler`: the random judge, and what it was asked."""

    about: ClassVar = {"trained": False}
    calls: ClassVar[list] = []

    def __init__(self, model, options, **more):
        self.options = options
        self.calls.append((model, options.k, options.temperature, options.seed, more["meta"]))

    def fit(self, benchmark, records, rules):
        return records

    def judge(self, benchmark, records, rules):
        rows = judge_rows("random", records, k=self.options.k, seed=self.options.seed)
        probes = judge_rows("random", identical(records, 4), k=2)
        return rows, probes

    def scalar(self, benchmark, records):
        return None

    def scales(self, benchmark, rules):
        return Scales()

    def seconds_per_sample(self, benchmark, rules):
        return 0.25

    def kept(self):
        return 7


@pytest.fixture
def fake(monkeypatch):
    for name, made in (("judge.judge", "JudgeOptions"), ("scoring.sampling", "BenchmarkSampler")):
        module = types.ModuleType(f"grm_jax.{name}")
        vars(module)[made] = types.SimpleNamespace if name == "judge.judge" else FakeJudge
        monkeypatch.setitem(sys.modules, f"grm_jax.{name}", module)
    FakeJudge.calls.clear()
    return FakeJudge


def test_a_model_is_one_call(data, tmp_path, fake, capsys):
    out = tmp_path / "out"
    run(
        *("--bench", "preferences", "--data", data, "--model", "m", "--meta", "r", "-k", 2),
        *("--temperature", 0.7, "--seed", 5, "--output", out, "--cache", tmp_path / "cache"),
    )
    assert fake.calls == [(Path("m"), 2, 0.7, 5, Path("r"))]
    shown = capsys.readouterr().out
    assert "untrained" in shown
    assert "identical responses tie" in shown
    results = json.loads((out / "preferences" / "results.json").read_text())
    assert results["model"] == {"trained": False}
    assert results["cost"]["seconds"] == 0.5


@pytest.mark.parametrize("given", [None, 80.0])
def test_the_threshold_is_the_middle_of_the_range_before_anything_is_sampled(
    tmp_path, fake, monkeypatch, given
):
    """Also of live adaptive sampling; and samples that are read again know their range."""
    data, out, seen = tmp_path / "singles.jsonl", tmp_path / "out", []
    rows = [{"query": f"q{i}", "response": "a", "label": i % 2} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(self, benchmark, records, rules):
        seen.append(rules.threshold)
        drawn = judge_rows("random", records, k=8)
        return [
            dataclasses.replace(r, scores=(100 * s,)) for r in drawn for s in r.scores or ()
        ], []

    monkeypatch.setattr(fake, "judge", judge)
    scales = Scales((1.0, 10.0), (0.0, 100.0))
    monkeypatch.setattr(fake, "scales", lambda self, benchmark, rules: scales)
    common = ["--bench", "preferences", "--data", data, "--resamples", "20"]
    more = [] if given is None else ["--threshold", given]
    run(*common, "--model", "m", "--output", out, "--cache", tmp_path / "cache", *more)
    assert seen == [50.0 if given is None else given]
    first = read_results(out / "preferences" / "results.json")
    assert first.settings["rules"]["threshold"] == seen[0]
    run(*common, "--samples", out, "--output", tmp_path / "again")
    again = read_results(tmp_path / "again" / "preferences" / "results.json")
    assert again.methods == first.methods
    assert again.settings["scales"] == first.settings["scales"]
    adaptive = next(m for m in first.methods if m.kind == "adaptive")
    assert 4 <= adaptive.samples < 8


def test_a_model_is_split_as_asked(data, tmp_path, fake, monkeypatch):
    seen = []
    init = fake.__init__

    def watched(self, *args, **more):
        seen.append(more)
        init(self, *args, **more)

    monkeypatch.setattr(fake, "__init__", watched)
    monkeypatch.setattr("grm_jax.train.setup_devices", lambda count: seen.append(count))
    common = ["--bench", "preferences", "--data", data, "--model", "m", "--meta", "r", "-k", 2]
    common += ["--output", tmp_path / "out", "--cache", tmp_path / "cache"]
    run(*common)
    assert seen[0]["mesh"] is None and seen[0]["score_tokens"] is None
    devices = len(jax.devices())
    split = ["--mesh.tensor", 2, "--mesh.cpu-devices", devices, "--score-tokens", 64]
    run(*common, *split)
    assert seen[1] == devices
    assert dict(seen[2]["mesh"].shape) == {
        "replica": 1, "fsdp": devices // 2, "sequence": 1, "tensor": 2
    }  # fmt: skip
    assert seen[2]["score_tokens"] == 64


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_says_what_is_kept(number, code, data, tmp_path, fake, monkeypatch, capsys):
    def stop(*args):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal comes first")

    monkeypatch.setattr(fake, "judge", stop)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as error:
        run("--bench", "preferences", "--data", data, "--model", "m", "--output", tmp_path / "o")
    assert error.value.code == code
    assert "stopped; 7 samples are kept in runs/cache; the same command" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_samples_are_aggregated_once(data, tmp_path, monkeypatch):
    asked = []
    aggregate = assess.aggregate

    def counted(records, rows, **options):
        asked.append(rows)
        return aggregate(records, rows, **options)

    for module in (assess, evaluate):
        monkeypatch.setattr(module, "aggregate", counted, raising=False)
    common = ["--bench", "preferences", "--data", data]
    run(*common, "--judge", "random", "-k", 4, "--output", tmp_path / "first")
    assert len(asked) == 1
    run(*common, "--judge", "longer", "--output", tmp_path / "b", "--compare", tmp_path / "first")
    assert len(asked) == 3, "ours and theirs"


def test_several_benchmarks_and_a_comparison(data, tmp_path, capsys):
    folder = tmp_path / "many"
    (folder / "pandalm").mkdir(parents=True)
    votes = {f"annotator{i}": 1 for i in (1, 2, 3)}
    pairs = [
        {"idx": i, "instruction": "q", "input": "", "response1": "long one", "response2": "b"}
        | votes
        for i in range(8)
    ]
    (folder / "pandalm" / "testset-v1.json").write_text(json.dumps(pairs))
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--bench", "all", "--data", folder]
    run(*common, "--judge", "random", "-k", 4, "--output", first)
    run(*common, "--judge", "longer", "--output", second, "--compare", first)
    shown = capsys.readouterr().out
    assert "difference" in shown
    results = json.loads((second / "pandalm" / "results.json").read_text())
    greedy = next(one for one in results["against"] if one["figure"] == "accuracy")
    before = json.loads((first / "pandalm" / "results.json").read_text())["methods"][0]
    accuracy = before["figures"]["overall"]["accuracy"]["value"]
    assert greedy["method"] == "greedy"
    assert greedy["difference"]["value"] == pytest.approx(1.0 - accuracy)
    assert "no samples of preferences here" in fails(
        capsys, "--bench", "preferences", "--data", data, "--judge", "longer", "--compare", first
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bench", "nope", "--judge", "longer"], "unknown benchmark 'nope'; there are"),
        (["--judge", "longer"], "give --bench"),
        (["--bench", "preferences", "--judge", "longer", "--attack-k", "1"], "is of --attacks"),
        (["--bench", "preferences", "--samples", "x", "--attacks"], "not --samples"),
        (["--bench", "preferences"], "exactly one of --model, --judge and --samples, not none"),
        (
            ["--bench", "preferences", "--judge", "longer", "--model", "m"],
            "not --model and --judge",
        ),
        (["--bench", "preferences", "--judge", "longer", "--meta", "m"], "give --model too"),
        (["--bench", "preferences", "--judge", "longer", "--scalar", "m"], "give --model too"),
        (["--bench", "preferences", "--samples", "x", "--scalar", "m"], "give --model too"),
        (["--bench", "preferences", "--model", "m", "--scalar-weight", "1"], "give --scalar too"),
        (
            [
                *("--bench", "preferences", "--model", "m", "--scalar", "m"),
                *("--scalar-weight", "-1"),
            ],
            "--scalar-weight -1.0: give 0 or more",
        ),
        (
            ["--bench", "preferences", "--model", "m", "--scalar", "m", "--adaptive", "0.01"],
            "leave --scalar out",
        ),
        (["--bench", "preferences", "--model", "m", "--score-tokens", "9"], "--meta or --scalar"),
        (["--bench", "preferences", "--judge", "longer", "-k", "-1"], "--k -1: give 0 or more"),
        (["--bench", "preferences", "--model", "m", "--temperature", "0"], "-k 0 judges greedily"),
        (["--bench", "preferences", "--judge", "longer", "--limit", "1"], "cannot hold all 2"),
        (["--bench", "preferences", "--judge", "longer", "--temperature", "1"], "is for --model"),
        (["--bench", "preferences", "--model", "m", "--k-meta", "4"], "give --meta too"),
        (
            ["--bench", "preferences", "--model", "m", "--meta", "m", "--k-meta", "9", "-k", "8"],
            "--k-meta 9 of --k 8",
        ),
        (["--bench", "preferences", "--model", "m", "--max-new-tokens", "0"], "give 1 or more"),
        (["--bench", "preferences", "--judge", "longer", "--form", "pairs"], "has no form"),
        (["--bench", "preferences", "--judge", "longer", "--compare", "x"], "no samples of"),
        (["--bench", "synthetic", "--judge", "longer"], "no heldout.jsonl here"),
        (["--bench", "rewardbench", "--judge", "longer"], "subset: "),
    ],
)
def test_mistakes_are_one_clear_line(data, tmp_path, capsys, args, words):
    place = data.parent if "synthetic" in args else data
    message = fails(capsys, *args, "--data", place, "--output", tmp_path / "out")
    assert message.startswith("evaluate: ")
    assert words in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--limit 0", "--limit 0: give 1 or more"),
        ("--resamples 0", "--resamples 0: give 1 or more"),
        ("--seed -1", "--seed -1: give 0 or more"),
        ("--threshold nan", "--threshold nan: give a number"),
        ("--adaptive-bound nan", "--adaptive-bound nan: give a number"),
        ("--adaptive-bound 2", "--adaptive-bound 2.0 is a probability"),
        ("--probes 4", "--probes is for --model"),
        ("--long-prompts error", "--long-prompts is for --model"),
        ("--max-prompt-tokens 4", "--max-prompt-tokens is for --model"),
        ("--cache c", "--cache is for --model"),
        ("--score-tokens 4", "--score-tokens is for --model"),
        ("--mesh.tensor 2", "--mesh is for --model"),
        ("--output FILE/o", "is no directory; give another"),
    ],
)
def test_options_are_obeyed_or_refused(data, tmp_path, capsys, given, words):
    args = given.replace("FILE", str(data)).split()
    common = ["--bench", "preferences", "--data", data, "--judge", "longer"]
    out = [] if "--output" in given else ["--output", tmp_path / "o"]
    assert words in fails(capsys, *common, *out, *args)
    assert not (tmp_path / "o").exists()


def test_options_that_samples_can_not_obey_are_refused(data, tmp_path, capsys):
    common = ["--bench", "preferences", "--data", data]
    out = tmp_path / "out"
    run(*common, "--judge", "random", "-k", 4, "--output", out)
    again = [*common, "--samples", out]
    for given, words in (
        ("-k 2", "--k 2: samples that were drawn are all used; give --model"),
        ("--k-meta 2", "has no scores of a meta RM"),
        ("--probes 2", "--probes is for --model"),
        ("--long-prompts skip", "--long-prompts is for --model"),
        ("--cache c", "--cache is for --model"),
    ):
        assert words in fails(capsys, *again, *given.split())
    file = out / "preferences" / "samples.jsonl"
    rows = [dataclasses.replace(row, meta=0.5) for row in read_critiques(file)]
    write_critiques(file, rows)
    assert "--k-meta 99: " in (message := fails(capsys, *again, "--k-meta", 99))
    assert "has 4 samples a record" in message
    run(*again, "--k-meta", 2)


def test_exit_status_and_no_jax(data, tmp_path):
    """Judging without a model neither imports jax nor shows a traceback."""
    code = (
        "import sys; from grm_jax import evaluate; evaluate.main(); assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "--bench", "preferences", "--judge", "longer"]
    good = subprocess.run(
        [*command, "--data", data, "--output", tmp_path / "o"], capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([*command, "--data", tmp_path / "gone"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("evaluate: ")
    assert "Traceback" not in bad.stderr
    wrong = subprocess.run([*command, "--judge", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2
