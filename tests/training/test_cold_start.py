"""The base model as its own first teacher: what it is asked, what is kept, what SFT then learns."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from grm_jax.critique import Template, TemplateError
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.preferences import write_preferences
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.data.trajectories import Trajectory, read_trajectories
from grm_jax.errors import UserError
from grm_jax.judge.critiques import Critic
from grm_jax.model.config import SIZES
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.options import SamplingConfig
from grm_jax.training import cold_start, sft
from grm_jax.training.options import SFT, ColdStart, Fitting
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import ConfigError, Setup

SAID = r" truth.{more} Scores: \boxed{{{scores}}}"


@pytest.fixture
def setup(tmp_path, monkeypatch, model, make_record) -> Setup:
    """A run on a file of two records of two responses, of which the second is the better one."""
    monkeypatch.setitem(SIZES, "micro", model.replace(max_position=4096))
    write_world(tmp_path / "world", WorldConfig(cold_start=5, train=5, fresh=2, shifted=1))
    records = [make_record(name, (0, 1), f"query {name}") for name in "ab"]
    write_preferences(tmp_path / "preferences.jsonl", records)
    return Setup(
        run_dir=str(tmp_path / "run"), size="micro", mesh=MeshConfig(2, 2, 1),
        tokenizer=str(tmp_path / "world" / "tokenizer"),
        preferences=str(tmp_path / "preferences.jsonl"),
        templates=TemplateConfig("short", "short_single"), length_buckets=(2048,),
    )  # fmt: skip


OPTIONS = SFT(
    Fitting(steps=1, batch_size=4),
    ColdStart("short_examples", samples=2, chunk=1, sampling=SamplingConfig(max_new_tokens=32)),
)


@pytest.fixture
def asked(monkeypatch, make_critique):
    """What the base model is asked; it says `texts` to each record, in turn."""
    calls = []

    def make(run: Run, *texts: str):
        def critiques(self, params, records, samples, sampling, key, *, hinted, salt, progress):
            found = {}
            for record in records:
                orders = self.prompts.orders(record, len(samples), salt)
                said = self.prompts.messages(record, orders[0], hinted=hinted)
                prompt = said[-1]["content"].rstrip()
                ids, tokenizer = self.prompts.ids(record, orders[0], hinted=hinted), run.tokenizer
                # Not in the chat format.
                assert ids == (*tokenizer.begin_ids, *tokenizer.encode(prompt))
                calls.append((record.id, prompt, len(samples)))
                found[record.id] = [
                    dataclasses.replace(
                        make_critique(record.id, i, order=orders[i], finish_reason="length"),
                        text=texts[i % len(texts)],
                    )
                    for i in samples
                ]
            return found

        monkeypatch.setattr(Critic, "critiques", critiques)
        return calls

    return make


def test_a_critique_ends_with_its_first_box(make_critique):
    template = Template.load("short_examples")
    good = SAID.format(more="", scores="2, 9")
    goes_on = good + "\n\n#### Example 4 ####\n" + SAID.format(more="", scores="9, 2")
    rollout = make_critique("a", 0, order=(1, 0), finish_reason="length")
    read = cold_start.until_verdict(dataclasses.replace(rollout, text=goes_on), template)
    assert read.text == r"Criteria: truth. Scores: \boxed{2, 9}"
    assert (read.scores, read.failure) == ((9.0, 2.0), None)
    assert read.finish_reason == "stop"
    three = SAID.format(more="", scores="1, 2, 3")
    read = cold_start.until_verdict(dataclasses.replace(rollout, text=three), template)
    assert (read.scores, read.failure) == (None, "wrong_count")
    read = cold_start.until_verdict(dataclasses.replace(rollout, text="I can not say"), template)
    assert read.text == "Criteria: I can not say"
    assert (read.failure, read.finish_reason) == ("no_box", "length")


def test_the_base_model_sees_examples_and_a_hint_and_sft_neither(setup, asked, caplog):
    """With two samples both orders are shown, so that of two equal boxes one is right."""
    caplog.set_level(logging.INFO, "grm_jax")
    run = Run(setup)
    calls = asked(run, SAID.format(more="", scores="2, 9") + " and so on")
    records = {record.id: record for record in run.records}
    stage = Stage(run, "sft", OPTIONS, needs=["base"])
    targets = sft._written(stage, OPTIONS)
    assert [name for name, _, _ in calls] == ["a", "b"]
    for _, prompt, samples in calls:
        assert prompt.count("Verdict") == 3 and samples == 2 and prompt.endswith("Criteria:")
        assert "The best response is: Response" in prompt
    rows = read_trajectories(stage.directory / "trajectories.jsonl")
    assert [row.kept for row in rows].count(True) == 2 and len(rows) == 4
    assert all(row.hinted for row in rows)
    assert [row.example_id for row in targets.rows] == ["a", "b"]
    assert "4 critiques of the base model, 0 unparsable, 2 kept, of 2 records" in caplog.text
    for row in targets.rows:
        assert isinstance(row, Trajectory) and row.scores is not None
        assert row.scores[1] > row.scores[0]
        prompt = run.prompts("one").messages(records[row.example_id], row.order)
        learnt = sft._example(run, row, "row")
        assert list(learnt.prompt) == run.tokenizer.chat(prompt)
        assert prompt[-1]["content"].count("Verdict") == 1
    sft._written(stage, OPTIONS)
    assert len(calls) == 2  # what was sampled is not sampled again


def test_nothing_that_agrees_is_an_error(setup, asked):
    run = Run(setup)
    asked(run, SAID.format(more="", scores="5, 5"))
    stage = Stage(run, "sft", OPTIONS, needs=["base"])
    with pytest.raises(UserError, match=r"kept none of 4 critiques; look at .*--instructions FILE"):
        sft._written(stage, OPTIONS)


def test_what_can_not_begin_says_so_before_anything_is_sampled(setup, asked):
    calls = asked(Run(setup), "")
    with pytest.raises(ConfigError, match=r"let the base model write them \(--sft.cold-start.many"):
        sft.run_sft(Run(setup), SFT())
    long = dataclasses.replace(
        OPTIONS.cold_start, sampling=SamplingConfig(max_new_tokens=4096 - 200)
    )
    with pytest.raises(DataError, match=r"smaller --sft.cold-start.sampling.max-new-tokens"):
        sft.run_sft(Run(setup), dataclasses.replace(OPTIONS, cold_start=long))
    assert not calls


@pytest.mark.parametrize("field", ["many", "single"])
def test_a_template_must_end_with_what_begins_a_critique(field, setup, asked):
    """Otherwise jinja's tags would be the first words of all critiques that SFT learns from."""
    calls = asked(Run(setup), "")
    start = dataclasses.replace(OPTIONS.cold_start, **{field: "grm"})
    with pytest.raises(TemplateError, match=r"grm.jinja: its last line is '.*endif.*'Criteria:'"):
        sft.check_records(Run(setup), dataclasses.replace(OPTIONS, cold_start=start))
    assert not calls


def test_other_worked_examples_are_not_mixed_with_what_was_sampled(
    setup, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(sft, "train_on", lambda *_: None)
    calls = asked(Run(setup), SAID.format(more="", scores="2, 9"))
    source = Template.load("short_examples").source
    mine = tmp_path / "mine.jinja"
    mine.write_text(source)
    start = dataclasses.replace(OPTIONS.cold_start, many=str(mine))
    options = dataclasses.replace(OPTIONS, cold_start=start)
    sft.run_sft(Run(setup), options)
    sft.run_sft(Run(setup), options)
    assert len(calls) == 2
    mine.write_text(source.replace("Canberra", "Perth"))
    with pytest.raises(ConfigError, match=r"content.examples.many: '\w+' -> '\w+'"):
        sft.run_sft(Run(setup), options)
    # A run of an earlier version, which did not note the examples, goes on.
    file = Path(setup.run_dir) / "sft" / "config.json"
    noted = json.loads(file.read_text())
    noted["content"].pop("examples")
    file.write_text(json.dumps(noted))
    sft.run_sft(Run(setup), options)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" truth.", 1),
        (" truth. The best response is: Response {best}", 0),
        (" truth.\n\n#### Conversation ####\nuser: more", 0),
        (" truth. [The End of Response 2]", 0),
        (" truth.\n\nResponse 1: correct.\n", 1),
        (" correctness, context.\nResponse 1: correct.\n", 0),
        (" truth.\nResponse 2: correct, explains the choice.\n", 0),
    ],
)
def test_what_repeats_the_prompt_is_not_learnt(setup, asked, said, kept):
    """Both orders are shown twice, and each box of two is written to each."""
    run = Run(setup)
    both = [said.format(best=best) + rf" Scores: \boxed{{{3 - best}, {best}}}" for best in (1, 2)]
    asked(run, *both, *both[::-1])
    four = dataclasses.replace(
        OPTIONS, cold_start=dataclasses.replace(OPTIONS.cold_start, samples=4)
    )
    stage = Stage(run, "sft", four, needs=["base"])
    if kept:
        assert len(cold_start.cold_start(stage, four)) == 4
    else:
        with pytest.raises(UserError, match="kept none of 8 critiques"):
            cold_start.cold_start(stage, four)
