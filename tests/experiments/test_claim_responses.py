"""Eight responses, judged in groups."""

from __future__ import annotations

import json

import baselines
import evidence
import numpy as np
import pytest
import responses
import voting
from roads import Road, Settings

PER_GROUP = 2


@pytest.fixture
def record():
    return responses.records(3)[0]


@pytest.mark.parametrize("size", responses.SIZES)
def test_every_round_deals_each_response_once_and_no_group_twice(record, size):
    dealt = responses.deal(record, size)
    assert len(dealt) == responses.ROUNDS
    groups = [group for groups in dealt for group in groups]
    assert all(sorted(sum(groups, ())) == list(range(responses.MANY)) for groups in dealt)
    assert all(len(group) == size for group in groups) and len(set(groups)) == len(groups)
    assert dealt == responses.deal(record, size)  # what is read is what was asked


def test_scores_of_a_round_come_back_to_their_responses(record):
    """A judge that knows the labels has all of them right, whoever stands beside whom."""
    drawn = {}
    for turn, groups in enumerate(responses.deal(record, 4)):
        for place, chosen in enumerate(groups):
            scores = [record.labels[i] for i in chosen]
            drawn[f"{record.id}#{turn}#{place}"] = [{"scores": scores}] * PER_GROUP
    drawn[f"{record.id}#5#1"] = [{"scores": None}, drawn[f"{record.id}#5#1"][1]]
    scores = responses.together(record, 4, drawn, PER_GROUP)
    assert scores.shape == (PER_GROUP * responses.ROUNDS, responses.MANY)
    readable = ~np.isnan(scores).any(axis=1)
    # The first critique of round 5: half a round does not vote.
    assert np.flatnonzero(~readable).tolist() == [5] and np.isnan(scores[5]).all()
    assert (scores[readable] == record.labels).all()


def test_the_rows_that_are_judged_are_the_groups(tmp_path):
    road = Road(Settings(runs=tmp_path), 3)
    first = next(iter(responses._rows(road, 2)))
    (record, *_) = responses.records(3)
    (a, b), *_ = responses.deal(record, 2)[0]
    assert first["id"] == "eight-0#0#0" and "labels" not in first
    assert first["responses"] == [record.responses[a], record.responses[b]]


def test_the_claim_on_eight_responses_is_read(tmp_path, monkeypatch):
    roads = [Road(Settings(runs=tmp_path), seed) for seed in (0, 1)]
    for road in roads:
        (road.directory / "evaluation").mkdir(parents=True)
        methods = [
            {"name": name, "figures": {"responses": {"n=1": {"value": 0.5 + road.seed / 4}}}}
            for name in ("sample@1", "vote@8", "vote@32", "scalar", "greedy")
        ]
        text = json.dumps({"methods": methods})
        (road.directory / "evaluation" / "results.json").write_text(text, encoding="utf-8")

    def critiques(road, name, each):
        """Of a judge that knows the labels where it reads four, and nothing where it reads two."""
        size = int(name[-1])
        return {
            f"{r.id}#{turn}#{place}": [{"scores": [r.labels[i] * (size == 4) for i in chosen]}]
            * each
            for r in responses.records(road.seed)
            for turn, groups in enumerate(responses.deal(r, size))
            for place, chosen in enumerate(groups)
        }

    def scalar(run, found):
        return {record.id: record.labels for record in found}

    few = responses.records(9)[:4]
    usual = evidence.grouped(few, {r.id: np.asarray([r.labels] * 32) for r in few}, scalar=None)
    monkeypatch.setattr(baselines, "critiques_of", critiques)
    monkeypatch.setattr(evidence, "scalar_scores", scalar)
    monkeypatch.setattr(voting, "read_stage", lambda road, stage: usual)
    found = responses.read(roads)
    accuracy = found.figures["accuracy"]
    assert {accuracy["8 responses in groups of 4"][k]["mean"] for k in ("1", "8", "32")} == {100.0}
    assert accuracy["8 responses in groups of 2"]["32"]["mean"] == pytest.approx(12.5)
    assert found.figures["differences"]["groups of 4 against 2, 1"]["mean"] == pytest.approx(87.5)
    assert found.figures["single"]["vote@8"]["seeds"] == [50.0, 75.0]
    single, usual_row, *_ = [line for line in found.text.splitlines() if "response" in line][1:]
    assert single.startswith("| 1 response") and usual_row.count("|") == 6
