"""Eight responses, judged in groups."""

from __future__ import annotations

import json
from pathlib import Path

import evidence
import numpy as np
import pytest
import responses
import voting
from roads import Road, Settings


@pytest.fixture
def roads(tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "RECORDS", 20)
    return [Road(Settings(runs=tmp_path), seed) for seed in (0, 1)]


def test_records_of_eight_are_judged_in_groups_of_four_and_of_two(roads, monkeypatch):
    commands = []
    monkeypatch.setattr(Road, "pipeline", lambda self: None)
    monkeypatch.setattr(Road, "run", lambda self, command, **_: commands.append(command))
    road = roads[1]
    (road.directory).mkdir()
    responses.runs(road)
    for command, size in zip(commands, ("4", "2"), strict=True):
        assert command[command.index("--at-once") + 1] == size
    inputs, outputs = ([c[c.index(o) + 1] for c in commands] for o in ("--input", "--output"))
    assert len(set(outputs)) == 2 and len(set(inputs)) == 1
    lines = Path(inputs[0]).read_text(encoding="utf-8").splitlines()
    found = responses.records(1)
    assert [json.loads(line)["responses"] for line in lines] == [list(r.responses) for r in found]
    assert all("labels" not in line for line in lines)
    assert len({r.responses for r in (*found, *responses.records(0))}) == 40, "other seeds, others"


def test_the_claim_on_eight_responses_is_read(roads, monkeypatch):
    """Of a judge that knows the labels where it reads four, and nothing where it reads two; and of
    a scalar RM that knows the labels of half of the records."""
    for road in roads:
        for size in responses.SIZES:
            file = road.rows_file("rl", "eight", 32, size)
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"id": r.id, "verdict": {
                    "critiques": [
                        {"scores": [x * (size == 4) for x in r.labels], "expected": None}
                    ] * 32,
                    "usage": {"prompt_tokens": 10 * size, "sampled_tokens": 5, "samples": 1},
                }}
                for r in responses.records(road.seed)
            ]  # fmt: skip
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (road.directory / "evaluation").mkdir(parents=True)
        methods = [
            {"name": name, "figures": {"responses": {"n=1": {"value": 0.5 + road.seed / 4}}}}
            for name in ("sample@1", "vote@8", "vote@32", "scalar", "greedy")
        ]
        text = json.dumps({"methods": methods})
        (road.directory / "evaluation" / "results.json").write_text(text, encoding="utf-8")

    def scalar(run, found):
        return {r.id: [x * (i % 2) for x in r.labels] for i, r in enumerate(found)}

    few = responses.records(9)[:4]
    usual = evidence.grouped(few, {r.id: np.asarray([r.labels] * 32) for r in few})
    monkeypatch.setattr(evidence, "scalar_scores", scalar)
    monkeypatch.setattr(voting, "read_stage", lambda road, stage: usual)
    found = responses.read(roads)
    accuracy = found.figures["accuracy"]
    assert {accuracy["8 responses in groups of 4"][k]["mean"] for k in ("1", "8", "32")} == {100.0}
    assert accuracy["8 responses in groups of 2"]["32"]["mean"] == pytest.approx(12.5)
    tests = found.figures["differences"]
    assert tests["groups of 4 against 2, 1"]["mean"] == pytest.approx(87.5)
    half = 100 * (0.5 + 0.5 / 8)
    assert found.figures["scalar"]["8 responses in groups of 2"]["mean"] == pytest.approx(half)
    test = tests["8 responses in groups of 4, 32, against the scalar RM"]
    assert test["mean"] == pytest.approx(100 - half)
    assert found.figures["tokens of a verdict"] == {"4": 45.0, "2": 25.0}
    assert found.figures["single"]["vote@8"]["seeds"] == [50.0, 75.0]
    table = [line for line in found.text.splitlines() if line.startswith("| ")][2:5]
    assert table[0].startswith("| 1 response") and {line.count("|") for line in table} == {6}
