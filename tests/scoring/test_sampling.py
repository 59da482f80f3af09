"""A real (tiny, random) model as a judge: what is kept, what is asked again, what fits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from grm_jax.benchmarks import get_benchmark, synthetic
from grm_jax.critique import Template
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.attacks import ATTACKS
from grm_jax.data.collate import Example
from grm_jax.data.critiques import Critique
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.errors import UserError
from grm_jax.judge import meta as judging_meta
from grm_jax.judge import records as judging_records
from grm_jax.judge.judge import Judge
from grm_jax.judge.meta import MetaRM, load_meta_rm
from grm_jax.judge.request import JudgeOptions
from grm_jax.judge.scalar import score_examples
from grm_jax.model import storage
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import init_params, param_table
from grm_jax.sampler import plan
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.programs import SamplerStats
from grm_jax.scoring.attacks import Asking, attack
from grm_jax.scoring.items import BenchmarkRecords
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.sampling import BenchmarkSampler
from grm_jax.tokenizer import load_tokenizer

ONES = np.ones(1, np.float32)
OPTIONS = JudgeOptions(k=4, temperature=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "world"
    write_world(folder, WorldConfig(cold_start=4, train=4, fresh=12, shifted=2))
    return folder


@pytest.fixture(scope="module")
def model(world) -> Path:
    tokenizer = load_tokenizer(world / "tokenizer")
    config = ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
        query_pre_attn_scalar=8, vocab_size=tokenizer.vocab_size, sliding_window=16,
        max_position=160,
    )  # fmt: skip
    folder = world.parent / "model"
    for name, labels in (("judge", 0), ("meta", 1)):
        params = init_params(param_table(config, num_labels=labels), jax.random.key(3))
        storage.save_model(folder / name, config, params, world / "tokenizer")
        templates = TemplateConfig("compact", "compact_single", "compact_meta")
        about = {"templates": dataclasses.asdict(templates), "length_buckets": [160]}
        (folder / name / storage.ABOUT_FILE).write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def records(world) -> BenchmarkRecords:
    return synthetic.BENCHMARK.load(world)


@pytest.fixture(scope="module")
def engine() -> list[Sampler]:
    """The first judge's sampler, which the others take over with its compiled programs."""
    return []


@pytest.fixture
def make(model, engine, tmp_path):
    """A judge as a new process would have it, but for compiled programs."""

    def made(options: JudgeOptions = OPTIONS, cache: str = "cache", **more) -> BenchmarkSampler:
        judge = BenchmarkSampler(model / "judge", options, cache=tmp_path / cache, **more)
        if engine:
            judge._judge.sampler = engine[0]
            engine[0].stats = SamplerStats()
        engine[:] = [judge._judge.sampler]
        return judge

    return made


def drawn(judge: BenchmarkSampler) -> int:
    return judge._judge.sampler.stats.samples


def test_what_was_sampled_is_never_sampled_again(make, records):
    first = make(probes=3)
    rows, probes = first.judge(synthetic.BENCHMARK, records, Rules())
    assert len(rows) == 5 * len(records) and len(probes) == 3 * 5
    assert drawn(first) == len(rows) + len(probes) == first.kept()
    again = make(probes=3)
    assert again.judge(synthetic.BENCHMARK, records, Rules()) == (rows, probes)
    assert drawn(again) == 0
    assert "params" not in vars(again._judge)  # not even the weights were read
    # More samples: only those are drawn, and the first are the same.
    more = make(dataclasses.replace(OPTIONS, k=6))
    longer, _ = more.judge(synthetic.BENCHMARK, records, Rules())
    assert drawn(more) == 2 * len(records)
    assert [row for row in longer if row.sample < 4] == rows
    # The same as drawn without a cache.
    fresh = make(dataclasses.replace(OPTIONS, k=6), "other")
    assert fresh.judge(synthetic.BENCHMARK, records, Rules())[0] == longer
    assert again.seconds_per_sample(synthetic.BENCHMARK, Rules()) is not None


def test_other_settings_are_other_samples(make, records):
    make().judge(synthetic.BENCHMARK, records[:2], Rules())
    for options in (
        dataclasses.replace(OPTIONS, seed=1),
        dataclasses.replace(OPTIONS, temperature=0.7),
        dataclasses.replace(OPTIONS, max_new_tokens=11),
    ):
        other = make(options)
        other.judge(synthetic.BENCHMARK, records[:2], Rules())
        assert drawn(other) == 10
    fixed = make()
    rows, _ = fixed.judge(synthetic.BENCHMARK, records[:2], Rules(order="fixed"))
    assert drawn(fixed) == 10
    assert {row.order for row in rows} == {tuple(range(len(r.responses))) for r in records[:2]}


def test_ctrl_c_keeps_what_was_sampled(make, records, monkeypatch):
    judge = make()
    cache, _ = judge._open(judge.options(synthetic.BENCHMARK, Rules()))
    assert cache is not None
    add, seen = cache.add, []

    def stop(digest, row):
        if len(seen) == 17:
            raise KeyboardInterrupt
        seen.append(row)
        add(digest, row)

    monkeypatch.setattr(cache, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        judge.judge(synthetic.BENCHMARK, records, Rules())
    assert judge.kept() == 17
    spent = (cache.folder / "seconds.jsonl").read_text().splitlines()
    assert len(spent) == 1 and json.loads(spent[0])["samples"] >= 17
    again = make()
    rows, _ = again.judge(synthetic.BENCHMARK, records, Rules())
    assert drawn(again) == 5 * len(records) - 17
    whole = make(cache="other")
    assert rows == whole.judge(synthetic.BENCHMARK, records, Rules())[0]


def test_meta_scores_are_kept_apart(make, model, records, monkeypatch):
    plain, _ = make().judge(synthetic.BENCHMARK, records[:6], Rules())
    judge = make(meta=model / "meta")
    # A random model writes no scores: pretend that it did.
    readable = [dataclasses.replace(r, scores=(1.0,) * len(r.order), failure=None) for r in plain]
    cache, _ = judge._open(judge.options(synthetic.BENCHMARK, Rules()))
    assert cache is not None
    digests = {r.id: d for r, d in zip(records, map(_digest, records), strict=True)}
    for row in readable:
        cache.add(digests[row.example_id], row)
    cache.flush()
    rows, _ = judge.judge(synthetic.BENCHMARK, records[:6], Rules())
    assert all(row.meta is not None for row in rows)
    assert [dataclasses.replace(row, meta=None) for row in rows] == readable
    again = make(meta=model / "meta")
    monkeypatch.setattr(MetaRM, "scores", None)  # not called
    assert again.judge(synthetic.BENCHMARK, records[:6], Rules())[0] == rows


def test_the_meta_rm_sees_reference_and_principles(make, model, records, monkeypatch):
    judge = make(meta=model / "meta")._judge
    record = dataclasses.replace(records[0], reference=" 3", principles=(" cat",))
    row = Critique(
        record.id, 0, tuple(range(len(record.responses))), (1.0,) * len(record.responses),
        None, "stop", "",
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(
        judging_meta, "score_examples",
        lambda p, m, examples, *a, **k: seen.append(examples) or ONES,
    )  # fmt: skip
    judge.meta.scores([record], [row], judge.tokenizer, judge.mesh, 64)
    plain = dataclasses.replace(record, reference=None, principles=None)
    judge.meta.scores([plain], [row], judge.tokenizer, judge.mesh, 64)
    (given,), (bare,) = seen
    assert len(given.prompt) == len(bare.prompt) + 4


def test_a_model_is_computed_as_its_machine_can(model, world, tmp_path, one_device):
    """Trained on a TPU in bfloat16, judged and scored on a CPU."""
    file = "model.json"
    for name in ("judge", "meta"):
        folder = tmp_path / name
        shutil.copytree(model / name, folder)
        about = json.loads((folder / file).read_text())
        assert not {"attention", "compute_dtype", "scan_unroll"} & set(about["config"])
        # As older versions wrote it.
        about["config"] |= {"attention": "splash", "compute_dtype": "bfloat16", "scan_unroll": 2}
        (folder / file).write_text(json.dumps(about))
    scorer = load_meta_rm(tmp_path / "meta", one_device)
    judge = Judge.load(tmp_path / "judge", mesh=one_device)
    for config in (scorer.model, judge.model):
        assert (config.attention, config.compute_dtype) == ("chunked", "float32")
    examples = [Example((4, 5), (6, 7))]
    scores = score_examples(scorer.params, scorer.model, examples, (16,), 1, one_device)
    assert np.isfinite(scores).all()


def test_a_judge_is_loaded_in_its_compute_dtype(model, tmp_path, one_device):
    config, params = storage.load_model(model / "judge")
    half = jax.tree.map(lambda w: w.astype("bfloat16"), params)
    storage.save_model(tmp_path / "half", config, half, model / "judge")
    judge = Judge.load(tmp_path / "half", model / "meta", mesh=one_device, compute_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(judge.params)} == {"bfloat16"}
    scorer = judge.meta
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(scorer.params)} == {"bfloat16"}


def test_caches_are_planned_with_the_meta_rm_loaded(model, records, one_device, monkeypatch):
    judge = Judge.load(model / "judge", model / "meta", mesh=one_device, score_tokens=300)
    seen = []

    def critiques(*args, **more):
        seen.append("meta" in vars(judge))

    monkeypatch.setattr(judging_records.Critic, "critiques", critiques)
    judge.sample(records[:2], OPTIONS)
    assert seen == [True, True]
    assert judge.meta.tokens == 300
    # Loaded later, it is known from then on.
    plain = Judge.load(model / "judge", model / "meta", mesh=one_device)
    free = [100_000_000, 60_000_000]
    monkeypatch.setattr(plan, "free_bytes", lambda mesh: free.pop(0))
    before = plain.sampler.budget.within(64).cache_bytes
    assert plain.sampler.budget.within(64).cache_bytes == before
    _ = plain.meta
    after = plain.sampler.budget.within(64).cache_bytes
    assert before is not None and after is not None and before - after == 36_000_000


def _digest(record) -> str:
    from grm_jax.judge.cache import record_digest

    return record_digest(record)


def test_long_prompts_are_found_before_sampling(make, model, records):
    longest = dataclasses.replace(records[0], responses=("yes " * 150, "no"), labels=(1.0, 0.0))
    mixed = BenchmarkRecords([longest, *records[1:4]])
    wanted = r"1 of 4 prompts have more than 148 tokens.*or a smaller --max-new-tokens"
    with pytest.raises(DataError, match=wanted):
        make().fit(synthetic.BENCHMARK, mixed, Rules())
    with pytest.raises(DataError, match=r"more than 100 tokens.*or a larger --max-prompt-tokens"):
        make(max_prompt_tokens=100).fit(synthetic.BENCHMARK, mixed, Rules())
    skipped = make(long_prompts="skip").fit(synthetic.BENCHMARK, mixed, Rules())
    assert list(skipped) == records[1:4]
    judge = make(long_prompts="truncate-middle")
    cut = judge.fit(synthetic.BENCHMARK, mixed, Rules())
    assert "characters left out" in cut[0].responses[0] and list(cut[1:]) == records[1:4]
    options = judge.options(synthetic.BENCHMARK, Rules())
    assert judge._judge.prompt_tokens(cut[0], options) <= 148
    # A probe shows the best response twice: those that do not fit are not asked.
    judge = make(long_prompts="truncate-middle", probes=8)
    rows, probes = judge.judge(synthetic.BENCHMARK, cut, Rules())
    assert len(rows) == 20
    asked = {row.example_id for row in probes}
    assert asked and f"{cut[0].id}#identical" not in asked
    # The meta RM reads the critique too: it must fit behind the prompt.
    meta = make(meta=model / "meta", long_prompts="skip")
    assert len(meta.fit(synthetic.BENCHMARK, mixed, Rules())) == 3
    assert meta._meta_limit is not None
    meta._meta_limit = (meta._meta_limit[0], 16)
    with pytest.raises(DataError, match="nothing is left"):
        meta.fit(synthetic.BENCHMARK, mixed, Rules())
    full = make(dataclasses.replace(OPTIONS, max_new_tokens=160))
    with pytest.raises(UserError, match=r"up to 160 tokens leave no room .*has 160 positions; giv"):
        full.fit(synthetic.BENCHMARK, mixed, Rules())
    tight = make(max_prompt_tokens=20)
    with pytest.raises(DataError, match="have more than 20 tokens"):
        tight.fit(synthetic.BENCHMARK, mixed, Rules())


def test_single_responses_are_rated_where_the_benchmark_ranks_them(make):
    judge = make()
    for name, rating in (("realmistake", True), ("preferences", False)):
        options = judge.options(get_benchmark(name), Rules())
        assert judge._judge.prompts(options).single.name == (
            "compact" if rating else "compact_single"
        )
        scales = judge.scales(get_benchmark(name), Rules())
        assert scales.single == ((1, 10) if rating else (0, 1)) and scales.many == (1, 10)


def test_attacked_prompts_are_sampled_once(make, records):
    """A stopped attack goes on, since its critiques are cached like all others."""
    attacks = [one for one in ATTACKS if one.id in ("MK1", "FV1a", "POS", "LEN4", "RJ-H8")]
    found = []
    for drawn_anew in (True, False):
        judge = make()
        options = dataclasses.replace(
            judge.options(synthetic.BENCHMARK, Rules()), k=1, order="given"
        )
        asking = Asking(
            judge.prompts(options).template,
            lambda asked, judge=judge, options=options: judge.ask("attacks", asked, options),
            lambda record, judge=judge, options=options: judge.fits(record, options),
        )
        found.append(
            attack(records, attacks, asking, count=6, scales=None, threshold=0.5, resamples=20)
        )
        assert drawn(judge) == (2 * found[0].prompts if drawn_anew else 0)
    assert found[0] == found[1]
    assert set(found[0].methods) == {"greedy", "vote@1"}
    assert {row.id for row in found[0].methods["greedy"]} <= {
        "none", "again", *(one.id for one in attacks)
    }  # fmt: skip
    about = judge.provenance(options)
    assert about["templates"]["many"] == Template.load("compact").digest
    assert len(about["weights"]) == 16 and about["sampling"]["temperature"] == 1.0
