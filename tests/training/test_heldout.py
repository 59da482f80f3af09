"""Which records are held out, what is measured on them, and when."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.holdout import in_share, overlap, split
from grm_jax.data.preferences import write_preferences
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.trajectories import Trajectory
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.config import SIZES
from grm_jax.parallel.options import MeshConfig
from grm_jax.training import heldout, scalar_rm
from grm_jax.training.run import Run
from grm_jax.training.setup import ConfigError, HeldOutConfig, Setup

WORLD = WorldConfig(cold_start=5, train=60, fresh=4, shifted=1)


@pytest.fixture
def start(tmp_path, monkeypatch, model):
    """(options) -> a run with these held-out records."""
    monkeypatch.setitem(SIZES, "micro", model.replace(max_position=512))

    def make(**options) -> Run:
        return Run(
            Setup(
                run_dir=str(tmp_path / "run"), size="micro", world=WORLD,
                mesh=MeshConfig(2, 2, 1), heldout=HeldOutConfig(**options),
                judge=JudgeDefaults(temperature=0.5, max_new_tokens=32),
                templates=TemplateConfig("compact", "compact_single", "compact_meta"),
            )
        )  # fmt: skip

    return make


def test_a_share_of_names_never_changes():
    names = [f"train-{i}" for i in range(4000)]
    chosen = {name for name in names if in_share(name, 0.05)}
    assert 150 < len(chosen) < 250
    assert chosen <= {name for name in names if in_share(name, 0.2)}
    assert not any(in_share(name, 0.0) for name in names)


def test_a_conversation_is_held_out_as_a_whole(make_record):
    records = [make_record(f"{q}-{i}", (1, 0), f"query {q}") for q in range(200) for i in range(3)]
    learned, held = split(records, 0.2)
    assert sorted(r.id for r in learned + held) == sorted(r.id for r in records)
    assert not {r.query for r in learned} & {r.query for r in held}
    assert 60 < len(held) < 180
    # Independent of the meta RM's own choice, which is by id: neither contains the other.
    by_id = {r.id for r in records if in_share(r.id, 0.2)}
    assert by_id - {r.id for r in held} and {r.id for r in held} & by_id


def test_no_stage_learns_from_the_share(start):
    run, whole = start(every=1, share=0.3), start()
    assert run.heldout and len(run.records) + len(run.heldout) == len(whole.records)
    assert not {r.query for r in run.records} & {r.query for r in run.heldout}


def test_overlap_is_by_id_or_by_prompt(make_record):
    record = make_record("a", (1, 0), "what?")
    swapped = dataclasses.replace(record, id="b", responses=record.responses[::-1])
    other = dataclasses.replace(record, id="c", responses=("x", "y"))
    same_id = make_record("a", (1, 0), "something else")
    critique = Trajectory(
        example_id="d", sample=0, order=(0, 1), scores=None, failure=None, finish_reason="stop",
        text="", query="what?", responses=record.responses,
    )  # fmt: skip
    same = "the same conversation and responses"
    assert overlap([record], [other]) == []
    assert overlap([record], [other, swapped]) == [(record, same)]
    assert overlap([record], [critique]) == [(record, same)]
    assert overlap([record], [same_id]) == [(record, "the id 'a'")]


def test_records_that_are_learnt_from_are_refused(start, tmp_path):
    run = start()
    file = tmp_path / "mine.jsonl"
    fresh = dataclasses.replace(run.records[0], id="new", responses=("good", "bad"), labels=(1, 0))
    write_preferences(file, [fresh, run.records[3]])
    run = start(every=5, records=str(file))
    with pytest.raises(ConfigError, match=r"1 of 2 held-out .*mine.jsonl:2, shares the id 'tr"):
        heldout.critique_records(run, "rl", run.records)
    write_preferences(file, [fresh])
    run = start(every=5, records=str(file))
    (found,) = heldout.critique_records(run, "rl", run.records)
    assert found.id == "new"


@pytest.mark.parametrize("options", [{}, {"records": "x.jsonl", "share": 0.1}], ids=str)
def test_either_a_file_or_a_share(start, options):
    with pytest.raises(ConfigError, match=r"either --heldout.records FILE, or --heldout.share"):
        heldout.critique_records(start(every=5, **options), "rl", [])
    assert heldout.critique_records(start(every=0, **options), "rl", []) == []


def test_a_stage_with_another_share_is_refused(start):
    run = start(every=5, share=0.3)
    assert heldout.critique_records(run, "rl", run.records)
    config = run.directory / "rft" / "config.json"
    config.parent.mkdir()
    for before in ({}, {"heldout": {"share": 0.1}}):
        config.write_text(json.dumps({"setup": before}))
        with pytest.raises(ConfigError, match=r"share 0.3, but the rft stage .* with 0"):
            heldout.critique_records(run, "rl", run.records)
    config.write_text(json.dumps({"setup": {"heldout": {"share": 0.3}}}))
    assert heldout.critique_records(run, "rl", run.records)


def test_as_many_as_the_limit_says(start):
    run = start(every=5, share=0.5, limit=3)
    assert heldout.critique_records(run, "rl", run.records) == run.heldout[:3]


class FakeCritic:
    """Draws the critiques that it is given, and remembers how it was asked."""

    def __init__(self, run: Run, critiques):
        self.prompts, self.found, self.asked = run.prompts("one"), critiques, []

    def critiques(self, params, records, samples, sampling, key, salt):
        self.asked.append((params, list(samples), sampling, np.asarray(jax.random.key_data(key))))
        return {record.id: [self.found[record.id]] for record in records}


@pytest.mark.parametrize(("sampled", "temperature"), [(False, 0.0), (True, 0.5)])
def test_accuracy_is_of_critiques_that_are_right_by_the_labels(
    start, make_record, make_critique, sampled, temperature
):
    run = start(every=1, share=0.1, sampled=sampled)
    records = [make_record(name, (1, 0)) for name in "abcd"]
    records.append(make_record("e", (0,)))
    scores = {"a": (9, 2), "b": (2, 9), "c": (5, 5), "d": None, "e": (0,)}
    critiques = {name: make_critique(name, 0, value) for name, value in scores.items()}
    critic = FakeCritic(run, critiques)
    measure = heldout.critique_accuracy(run, records, critic)  # pyright: ignore[reportArgumentType]
    assert measure is not None
    for params in ({"step": 1}, {"step": 2}):
        # Right: a and e. A tie and an unparsable critique are wrong.
        assert measure(params) == {"accuracy": 2 / 5, "unparsable": 1 / 5, "n": 5}
    first, second = critic.asked
    assert [first[0], second[0]] == [{"step": 1}, {"step": 2}]
    assert first[1] == [0] and first[2].temperature == temperature
    assert first[2] == second[2] and np.array_equal(first[3], second[3]), "the same at every step"


def test_without_records_nothing_is_measured(start):
    assert heldout.critique_accuracy(start(), []) is None
    assert scalar_rm.pair_accuracy(start(), [], 4) is None


def test_pairs_are_right_where_the_better_response_has_the_higher_score(
    start, make_record, monkeypatch, caplog
):
    records = [make_record("a", (3, 1, 2)), make_record("b", (1, 1)), make_record("c", (0,))]
    scores = [(2.0, 1.0, 3.0), (5.0, 4.0), (1.0,)]
    monkeypatch.setattr(scalar_rm, "reply_scores", lambda *_: scores)
    measure = scalar_rm.pair_accuracy(start(), records, 4)
    assert measure is not None
    margins = np.asarray([1.0, -1.0, 2.0])  # 3 over 1, 3 over 2, 2 over 1
    expected = np.mean(np.log1p(np.exp(-margins)))
    assert measure({}) == {"accuracy": 2 / 3, "loss": pytest.approx(expected), "n": 3}
    assert scalar_rm.pair_accuracy(start(), records[2:], 4) is None
    assert "the held-out records have no pairs" in caplog.text
