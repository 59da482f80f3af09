"""Claims on other temperatures, on judges without critiques, and on what training has not seen."""

from __future__ import annotations

import dataclasses

import direct
import evidence
import flops
import numpy as np
import pytest
import temperature
import unseen
import voting
from roads import Road, Settings

from grm_jax.critique import parse
from grm_jax.data.critiques import write_critiques
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.data.trajectories import read_trajectories
from grm_jax.tokenizer import load_tokenizer

K = 8  # critiques of a record that `drawn` has


def test_a_judge_without_critiques_learns_from_scores_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Road, "_train", lambda *_: None)
    road = Road(Settings(runs=tmp_path), 0)
    write_world(road.directory / "world", WorldConfig(cold_start=40, train=4, fresh=4, shifted=2))
    for stage in ("sft", "rft"):
        (tmp_path / "0-direct" / stage).mkdir(parents=True)
    direct._run(road)
    tokenizer = load_tokenizer(road.directory / "world" / "tokenizer")
    rows = read_trajectories(tmp_path / "0-direct" / "instructions.jsonl")
    wholes = read_trajectories(road.directory / "world" / "cold_start.jsonl")
    assert len(rows) == 40
    for row, whole in zip(rows, wholes, strict=True):
        n = len(row.labels)
        assert whole.text.endswith(row.text)
        read, expected = (parse(text, n, low=0).scores for text in (row.text, whole.text))
        assert read == expected is not None
        # The box, n scores, what is between them, and the end of the box.
        assert len(tokenizer.encode(row.text)) == 2 * n + 1


def test_other_temperatures_and_worlds_have_files_of_their_own(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(Road, "run", lambda self, command: commands.append(command))
    road = Road(Settings(runs=tmp_path), 0)
    temperature.runs(road)
    unseen.runs(road)
    judged = [c for c in commands if "grm_jax.evaluate" in c]
    outputs = [c[c.index("--output") + 1] for c in judged]
    assert len(set(outputs)) == len(judged) == 16
    by_output = dict(zip(outputs, judged, strict=True))
    usual = by_output[str(tmp_path / "0" / "judged" / "rl-64-t1")]
    assert usual[usual.index("-k") + 1] == "64" and usual[-2:] == ["--temperature", "1"]
    other = by_output[str(tmp_path / "0-unseen" / "judged" / "rl-32")]
    assert other[other.index("--data") + 1] == str(tmp_path / "0-unseen")
    trained = [c for c in commands if "grm_jax.train" in c and str(tmp_path / "0-unseen") in c]
    assert [c[3] for c in trained] == [f"{s}.py:tiny" for s in ("sft", "rft", "rl", "scalar_rm")]
    assert all("--world.unseen-task" in c for c in trained)


def test_claims_on_temperatures_and_on_what_is_unseen_are_read(drawn, tmp_path, monkeypatch):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)

    def judged(kept, k):
        chosen = [r for i, r in enumerate(records) if kept(i)]
        chosen = [dataclasses.replace(r, domain=("task", "defect")[r.id[-1] < "5"]) for r in chosen]
        return evidence.read_samples(chosen, tmp_path / "samples.jsonl", scalar, k)

    monkeypatch.setattr(
        temperature, "judged",
        lambda road, stage, t: judged(lambda i: True, 8 if t == temperature.USUAL else 4),
    )  # fmt: skip
    monkeypatch.setattr(voting, "read_stage", lambda road, stage: judged(lambda i: True, 8))
    found = temperature.read([Road(Settings(k=4), seed) for seed in (0, 1)])
    assert list(found.figures["accuracy"]["RL, 1"]) == ["1", "2", "4", "8"]
    assert list(found.figures["accuracy"]["RL, 0.5"]) == ["1", "2", "4"]
    tests = found.figures["differences"]
    assert tests["SFT, k = 4: temperature 0.5 against 1"]["mean"] == pytest.approx(
        found.figures["accuracy"]["SFT, 0.5"]["4"]["mean"]
        - found.figures["accuracy"]["SFT, 1"]["4"]["mean"], abs=1e-3,
    )  # fmt: skip
    votes = found.figures["accuracy"]["RFT, 0.5"]["4"]["mean"]
    right = [np.argmax(scalar[r.id]) == np.argmax(r.labels) for r in records]
    assert tests["RFT, 4 at 0.5 against the scalar RM"]["mean"] == pytest.approx(
        votes - 100 * np.mean(right), abs=1e-3
    )
    monkeypatch.setattr(
        unseen, "_judged", lambda road, *, shifted: judged(lambda i: i % 2 == shifted, K)
    )
    found = unseen.read([Road(Settings(k=K), 0)])
    accuracy = found.figures["accuracy"]
    assert list(accuracy) == ["fresh", *unseen.KINDS.values()]
    expected = [
        np.argmax(scalar[r.id]) == np.argmax(r.labels)
        for i, r in enumerate(records) if i % 2 and r.id[-1] >= "5"
    ]  # fmt: skip
    assert accuracy[unseen.KINDS["task"]]["scalar RM"]["mean"] == pytest.approx(
        100 * np.mean(expected), abs=0.01
    )


def test_the_claim_on_critiques_against_scores_alone_is_read(drawn, tmp_path, monkeypatch):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)
    judged = evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, K)
    monkeypatch.setattr(voting, "read_stage", lambda road, stage: judged)
    monkeypatch.setattr(direct, "_run", lambda road: road.directory)
    monkeypatch.setattr(direct.expected, "both", lambda road, stage: (judged, judged))
    monkeypatch.setattr(evidence, "scalar_scores", lambda run, found: scalar)
    monkeypatch.setattr(Road, "records", lambda self: records)
    monkeypatch.setattr(Road, "branch", lambda self, name, *_: tmp_path / name)
    monkeypatch.setattr(
        flops, "training", lambda stage: {"sft": 5e12, "scalar_rm": 7e12}[stage.name]
    )
    figures = direct.read([Road(Settings(k=K), 0)]).figures
    assert figures["accuracy"]["RL, scores alone, probabilities"] == figures["accuracy"][
        "RL, critiques"
    ]  # fmt: skip
    # Both scalar RMs have the same scores here; the recipe's one was paid for by SFT, too.
    assert figures[direct.SCRATCH] == figures["scalar"]
    assert figures["training FLOPs"] == {"scalar RM": 12e12, direct.SCRATCH: 7e12}
    for k in (1, K):
        name = f"SFT, scores alone, drawn, against SFT, critiques, k = {k}"
        assert figures["differences"][name]["mean"] == 0
