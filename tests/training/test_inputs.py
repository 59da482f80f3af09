"""What can be wrong with records is found at the start: in every prompt, in every order."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import tokenizers

from grm_jax import recipes
from grm_jax.critique import Template
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.collate import Example
from grm_jax.data.holdout import in_share
from grm_jax.data.preferences import Preference, write_preferences
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.data.trajectories import to_trajectory
from grm_jax.judge.prompts import Prompts
from grm_jax.model.config import SIZES
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.options import SamplingConfig
from grm_jax.tokenizer import from_tokenizers
from grm_jax.training import lengths as lengths_module
from grm_jax.training import meta_rm, rft, rl, scalar_rm, sft, spct
from grm_jax.training.inputs import fitting_rows
from grm_jax.training.lengths import Lengths
from grm_jax.training.options import RFT, RL, SFT, Fitting, MetaRM, ScalarRM
from grm_jax.training.run import Run
from grm_jax.training.setup import ConfigError, Setup

TEMPLATES = TemplateConfig("compact", "compact_single", "compact_meta")
SAMPLING = SamplingConfig(max_new_tokens=32)
INPUTS = Path(__file__).parents[1] / "reports" / "inputs"


@pytest.fixture
def start(tmp_path, monkeypatch, model):
    """(records or a file, options of the setup) -> a run over them."""
    monkeypatch.setitem(SIZES, "micro", model.replace(max_position=128))
    build_tokenizer().save(tmp_path / "tokenizer")

    def make(records, **options) -> Run:
        source = records
        if not isinstance(records, Path):
            source = tmp_path / "preferences.jsonl"
            write_preferences(source, records)
        setup = Setup(
            run_dir=str(tmp_path / "run"), size="micro", tokenizer=str(tmp_path / "tokenizer"),
            preferences=str(source), templates=TEMPLATES, mesh=MeshConfig(-1, 1, 1),
            length_buckets=(32, 64), prompt_buckets=(16, 32),
        )  # fmt: skip
        return Run(dataclasses.replace(setup, **options))

    return make


def pair(id: str, words: int = 1, **fields) -> Preference:
    """A record whose first response has so many words, each a token."""
    turns = ({"role": "user", "content": " sum 1 2"},)
    return Preference(id, turns, (" anna" * words, " ben"), (1.0, 0.0), **fields)


# The judge's prompt of `pair` has 8 tokens and the words; 32 follow, and 64 fit a training row,
# which has the end token, too.
LONG = {
    "rft": (24, "prompt: 32 tokens; the rft stage takes 31", "--length-buckets"),
    "rl": (25, "prompt: 33 tokens; the rl stage takes 32", "--prompt-buckets"),
    "meta_rm": (24, "meta RM's prompt: 32 tokens; the meta_rm stage takes 31", "--length-buckets"),
    "scalar_rm": (59, "conversation and response: 65 tokens; the scalar_rm stage takes 64",
                  "--length-buckets"),
}  # fmt: skip
STAGES = {
    "rft": lambda run: rft.usable_records(run, RFT(sampling=SAMPLING)),
    "rl": lambda run: rl.usable_records(run, RL(prompts=1, sampling=SAMPLING)),
    "meta_rm": lambda run: meta_rm.usable_records(run, MetaRM(sampling=SAMPLING)),
    "scalar_rm": lambda run: scalar_rm.usable_records(run, ScalarRM()),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_record_that_is_one_token_too_long_is_named(start, stage):
    words, problem, option = LONG[stage]
    run = start([pair("a"), pair("b", words - 1), pair("c", words)])
    with pytest.raises(DataError) as caught:
        STAGES[stage](run)
    assert f"preferences.jsonl:3: {problem}" in str(caught.value)
    assert f"raise {option}" in str(caught.value) and "--long-prompts skip" in str(caught.value)
    assert not Path(run.setup.run_dir).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_long_records_are_left_out_or_cut(start, stage, caplog):
    words = LONG[stage][0]
    # Words that are cut in their middle are still words of the vocabulary.
    records = [pair("a"), pair("b", words + 60), pair("c", words - 1)]
    skipped = STAGES[stage](start(records, long_prompts="skip"))
    assert [r.id for r in skipped] == ["a", "c"]
    assert f"{stage}: 1 records skipped, which are too long" in caplog.text
    run = start(records, long_prompts="truncate-middle", length_buckets=(32, 96),
                prompt_buckets=(64,))  # fmt: skip
    cut = STAGES[stage](run)
    assert [r.id for r in cut] == ["a", "b", "c"] and cut[0] == records[0] and cut[2] == records[2]
    if stage != "scalar_rm":
        assert "characters left out" in cut[1].responses[0] and cut[1].responses[1] == " ben"
        assert f"{stage}: 1 records cut in the middle" in caplog.text


def test_records_that_differ_only_in_what_was_cut_are_no_signal(start, caplog):
    texts = [" anna" * 100, " anna" * 50 + " emil" + " anna" * 49]
    record = dataclasses.replace(pair("b"), responses=tuple(texts))
    run = start([pair("a"), record], long_prompts="truncate-middle", length_buckets=(32, 112),
                prompt_buckets=(80,))  # fmt: skip
    assert [r.id for r in STAGES["rl"](run)] == ["a"]
    assert "their responses differ only in what was cut" in caplog.text


def test_only_as_many_are_looked_at_as_are_used(start):
    """From the front for RFT; from the end for the meta RM, which wants other records."""
    records = [pair("a"), pair("b", 40), pair("c"), pair("d"), pair("e", 40), pair("f")]
    run = start(records, long_prompts="skip")
    config = RFT(sampling=SAMPLING, records=2)
    assert [r.id for r in rft.usable_records(run, config)] == ["a", "c"]
    meta = MetaRM(sampling=SAMPLING, records=3)
    assert [r.id for r in meta_rm.usable_records(run, meta)] == ["c", "d", "f"]
    assert rft.usable_records(start(records), RFT(sampling=SAMPLING, records=1)) == [records[0]]


def test_nothing_left_is_an_error(start):
    with pytest.raises(DataError, match="tokens; the rl stage takes 32"):
        STAGES["rl"](start([pair("a", 30)], long_prompts="skip"))


@pytest.mark.parametrize("stage", ["rft", "rl", "meta_rm"])
@pytest.mark.parametrize("skip", [False, True])
def test_what_a_template_can_not_show_is_named(start, stage, skip, tmp_path, caplog):
    own = Path(tmp_path / "own.jinja")
    own.write_text(Template.load("compact").source.replace("reference", "hint"), encoding="utf-8")
    templates = dataclasses.replace(TEMPLATES, many=str(own))
    records = [pair("a"), pair("b", reference=" anna")]
    run = start(records, templates=templates, skip_bad_rows=skip, max_bad_share=0.5)
    if skip:
        assert [r.id for r in STAGES[stage](run)] == ["a"]
        assert f"{stage}: 1 bad rows skipped" in caplog.text
        many = start(records, templates=templates, skip_bad_rows=True, max_bad_share=0.4)
        with pytest.raises(DataError, match=r"1 rows, more than 40%; the first: .*:2:"):
            STAGES[stage](many)
        return
    with pytest.raises(DataError, match=r"preferences.jsonl:2: the .* reference was given, but th"):
        STAGES[stage](run)


@pytest.mark.parametrize("stage", ["rft", "rl", "meta_rm"])
def test_a_place_is_not_asked_of_a_single_response(start, stage, tmp_path):
    own = Path(tmp_path / "own.jinja")
    header = "{# grm_jax: name=own low=1 high=n reads=index labels=letter #}"
    own.write_text("\n".join([header, *Template.load("compact").source.split("\n")[1:]]))
    templates = dataclasses.replace(TEMPLATES, many=str(own), single=str(own))
    single = dataclasses.replace(pair("b"), responses=(" 2",), labels=(1.0,))
    assert STAGES[stage](start([pair("a")], templates=templates))
    with pytest.raises(DataError, match=r"preferences.jsonl:2: the .* 'own' asks which response"):
        STAGES[stage](start([pair("a"), single], templates=templates))


def test_too_few_records_for_a_step(start):
    run = start([pair("a"), pair("b", 30)], long_prompts="skip")
    with pytest.raises(
        ConfigError, match=r"--rl.prompts 2 are 2 records a step, but there are only 1"
    ):
        rl.usable_records(run, RL(prompts=2, sampling=SAMPLING))


def test_packed_rows_have_their_own_length(start):
    run = start([pair("a"), pair("b", 25)])
    config = RFT(sampling=SAMPLING, fitting=Fitting(pack=72))
    assert len(rft.usable_records(run, config)) == 2
    short = dataclasses.replace(config, fitting=Fitting(pack=63))
    with pytest.raises(DataError, match=r"raise --rft\.fitting\.pack"):
        rft.usable_records(start([pair("a"), pair("b", 25)]), short)


def test_examples_that_are_too_long(start, caplog):
    examples = [Example((1,) * n, (2,)) for n in (10, 63, 64, 90)]
    with pytest.raises(DataError, match=r"^f:3: 65 tokens; the sft stage takes 64 \(2 of 4 examp"):
        fitting_rows(start([pair("a")]), "sft", Fitting(), examples, ["f:1", "f:2", "f:3", "f:4"])
    for policy in ("skip", "truncate-middle"):
        run = start([pair("a")], long_prompts=policy)
        assert fitting_rows(run, "sft", Fitting(), examples) == [0, 1]
        assert "sft: 2 examples skipped, which are too long" in caplog.text
        with pytest.raises(DataError, match="example 1: 65 tokens"):
            fitting_rows(run, "sft", Fitting(), examples[2:])


def test_a_critique_that_reached_its_limit_is_learnt_with_its_end(start, make_critique, caplog):
    """With all of its scores it is kept; its row has one token more than were sampled."""
    record = pair("a", 23)
    run = start([record])
    assert STAGES["rft"](run) == [record]
    text = "Specific Criteria:" + " high" * (32 - 6) + "\nScores: \\boxed{8, 2}"
    assert len(run.tokenizer.encode(text)) == 32 == SAMPLING.max_new_tokens
    rows = [
        to_trajectory(record, dataclasses.replace(make_critique("a", 0, (8, 2)), text=said), True,
                      kept=True)
        for said in (text, " high" + text)
    ]  # fmt: skip
    (example,) = rft.as_examples(run, RFT(), rows[:1], Path("f"))
    assert example.length == 64
    with pytest.raises(DataError, match=r"^f: sample 0 of 'a': 65 tokens; the rft stage takes 64"):
        rft.as_examples(run, RFT(), rows, Path("f"))
    run = start([record], long_prompts="skip")
    assert rft.as_examples(run, RFT(), rows, Path("f")) == [example]
    assert "rft: 1 examples skipped, which are too long" in caplog.text


def test_supervised_targets_are_rendered_at_the_start(start, tmp_path):
    good = {"id": "a", "query": " sum 1 2", "responses": [" anna", " ben"],
            "critique": "Scores: \\boxed{8, 2}"}  # fmt: skip
    own = tmp_path / "own.jinja"
    own.write_text(Template.load("compact").source.replace("reference", "hint"), encoding="utf-8")
    file = tmp_path / "targets.jsonl"
    file.write_text("\n".join(map(json.dumps, (good, good | {"reference": " anna"}))))
    templates = dataclasses.replace(TEMPLATES, many=str(own))
    run = start([pair("a")], templates=templates, instructions=str(file))
    with pytest.raises(DataError, match=r"targets.jsonl:2: it can not be rendered: .*reference"):
        sft.run_sft(run, SFT())
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"query": " sum" + " 1" * 60}))
    run = start([pair("a")], instructions=str(file))
    with pytest.raises(DataError, match=r"targets.jsonl:2: .* tokens; the sft stage takes 64"):
        sft.run_sft(run, SFT())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer whose merges reach over the boundaries of responses."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
    )
    trained.train_from_iterator(["x [A]x [B]ab [A]ab [B]yx [C]y [Ab [B"] * 20, trainer)
    return from_tokenizers(trained, {"eos_token": "<eos>"})


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_longest_order_counts(byte_level, n):
    """Against rendering and counting every order."""
    prompts = Prompts(byte_level, TEMPLATES, order="given")
    lengths = Lengths(prompts, Template.load("compact_meta"))
    differ = 0
    for id, texts in enumerate(itertools.permutations(["x", "yx", "ab", " [A]", "b]x"], n)):
        turns = ({"role": "user", "content": "ab"},)
        record = Preference(str(id), turns, texts, tuple(map(float, range(n))))
        every = [len(prompts.ids(record, order)) for order in itertools.permutations(range(n))]
        differ += max(every) > every[0]
        assert lengths.judge(record, 0) == lengths.judge(record, max(every)) == max(every)
        assert lengths.judge(record, 10_000) == lengths.prompt(record) == every[0]
    assert differ > 0


def test_a_copy_that_was_cut_is_counted_anew(byte_level):
    prompts = Prompts(byte_level, TEMPLATES, order="given")
    lengths = Lengths(prompts, Template.load("compact_meta"))
    long, short = pair("a", 9), pair("a", 3)
    for kind in (lengths.judge, lengths.hinted, lengths.meta):
        first = kind(long, 10_000)
        assert kind(short, 10_000) < first == kind(long, 10_000)


@pytest.mark.parametrize("number", [6, 9])
def test_of_many_responses_orders_are_drawn(number):
    given = list(lengths_module._orders(number))
    assert given[0] == tuple(range(number)) and 60 < len(set(given)) <= 120
    assert all(sorted(order) == list(range(number)) for order in given)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("29_one_long_prompt.jsonl", ":151: prompt: 9,024 tokens; the rft stage takes 448"),
        (
            "29_rft_prompt_fits_critique_does_not.jsonl",
            ":4: prompt: 105 tokens; the rft stage takes 47",
        ),
        ("92_empty_principles_late.jsonl", "92_empty_principles_late.jsonl:31: "),
    ],
)
def test_the_pipeline_looks_at_all_records_first(tmp_path, file, said):
    build_tokenizer().save(tmp_path / "tokenizer")
    recipe = recipes.load("spct.py")
    setup = dataclasses.replace(
        recipe.setup, run_dir=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"),
        preferences=str(INPUTS / file),
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        spct.run_spct(Run(setup), dataclasses.replace(recipe, setup=setup))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["93_system_turn.jsonl", "93_two_user_turns.jsonl"])
def test_system_texts_and_neighbouring_turns_are_read_by_every_stage(start, file):
    run = start(INPUTS / file)
    for stage in STAGES.values():
        assert len(stage(run)) == 8


def test_a_baseline_of_single_responses_alone_is_refused(start, tmp_path):
    turns = ({"role": "user", "content": " sum 1 2"},)
    singles = [Preference(f"s{i}", turns, (" anna",), (float(i % 2),)) for i in range(4)]
    with pytest.raises(ConfigError, match=r"none of the 4 records has two responses.*--pref"):
        scalar_rm.run_scalar_rm(start(singles), ScalarRM())
    assert not (tmp_path / "run" / "scalar_rm").exists()


def test_a_meta_rm_with_everything_held_out_is_refused(start, tmp_path):
    config = MetaRM(rft_trajectories=False, holdout=0.99, sampling=SAMPLING)
    assert all(in_share(id, 0.99) for id in "abc")
    with pytest.raises(ConfigError, match=r"--meta-rm.holdout 0.99 holds out all 3 records"):
        meta_rm.run_meta_rm(start([pair(id) for id in "abc"]), config)
    assert not (tmp_path / "run" / "meta_rm").exists()
