"""What the claims are read with, beside the library's own figures and SciPy."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import types
from pathlib import Path

import ablations
import adaptive_k
import baselines
import ceiling
import earlier_rl
import evidence
import flops
import generalisation
import hybrid
import numpy as np
import paired
import policy_train
import pytest
import roads
import run
import voting
from roads import Road, Settings
from scipy import stats

from grm_jax.critique import vote
from grm_jax.data.critiques import write_critiques
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic import WorldConfig, make_item
from grm_jax.data.synthetic_files import write_world
from grm_jax.data.trajectories import read_trajectories
from grm_jax.errors import UserError
from grm_jax.model import storage
from grm_jax.model.config import ModelConfig
from grm_jax.scoring import scalar_rm
from grm_jax.scoring.aggregate import aggregate
from grm_jax.tokenizer import load_tokenizer

K = 8


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_votes_are_those_of_the_evaluation(drawn, tmp_path, k):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)
    judged = evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, K)
    ids = [record.id for group in judged for record in group.records]
    found = aggregate(records, rows, ks=(k,), scalar=scalar)
    methods = {"vote": evidence.plain, "meta": evidence.guided, "hybrid": evidence.hybrid(0.5)}
    for name, method in methods.items():
        theirs = found.method(f"{name}@{k}").credits(records)
        ours = dict(zip(ids, evidence.accuracy(judged, k, method), strict=True))
        # A verdict without a readable critique: wrong here, a rule of the benchmark there.
        judgeable = [id for id in ids if id != "r0" and not math.isnan(theirs[id])]
        whole = [id for id in judgeable if k > 2 or _all_read(rows, id)]
        assert len(whole) > 10
        assert [ours[id] for id in whole] == pytest.approx([theirs[id] for id in whole])
    theirs = found.method("scalar").credits(records)
    assert evidence.scalar_accuracy(judged) == pytest.approx([theirs[id] for id in ids])
    assert evidence.accuracy(judged[:1], k, evidence.plain)[ids.index("r0")] == 0.0


def _all_read(rows, id):
    return all(row.scores is not None for row in rows if row.example_id == id)


@pytest.mark.parametrize("kept", [1, 3, K])
def test_the_meta_rms_best_critiques_are_those_of_guided_votes(drawn, tmp_path, kept):
    records, rows, _ = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)
    for group in evidence.read_samples(records, tmp_path / "samples.jsonl", None, K):
        values = evidence.keeping(kept)(group.scores, group.meta, group.scalar)
        for record, value in zip(group.records, values, strict=True):
            drawn_here = [row for row in rows if row.example_id == record.id]
            read = [row.scores for row in drawn_here]
            if any(scores is not None for scores in read):
                guided = vote(read, meta=[row.meta for row in drawn_here], k_meta=kept)
                assert value == pytest.approx(guided.totals)


def test_missing_critiques_are_an_error(drawn, tmp_path):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", [r for r in rows if r.sample < 3])
    with pytest.raises(UserError, match=r"fewer than 8 critiques of 'r0'.*give another --runs"):
        evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, K)


def test_scores_of_the_meta_rm_that_miss_are_an_error(drawn, tmp_path):
    records, rows, scalar = drawn
    broken = next(row for row in rows if row.meta is not None)
    rows = [dataclasses.replace(row, meta=None) if row is broken else row for row in rows]
    write_critiques(tmp_path / "samples.jsonl", rows)
    words = rf"samples.jsonl: .* and not sample {broken.sample} of '{broken.example_id}'; delete"
    with pytest.raises(UserError, match=words):
        evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, K)
    write_critiques(tmp_path / "none.jsonl", [dataclasses.replace(row, meta=None) for row in rows])
    judged = evidence.read_samples(records, tmp_path / "none.jsonl", scalar, K)
    assert all((group.meta == 0).all() for group in judged)


def test_the_scalar_margin_is_of_the_critiques_winner():
    scores = np.asarray([[[9, 1, 1], [1, 9, 1], [9, 9, 1], [5, 5, 5], [np.nan] * 3]])
    scalar = np.asarray([[1.0, 4.0, -2.0]])
    assert evidence.margin(scores, scalar)[0].tolist() == [-3.0, 3.0, 4.5, 0.0, 0.0]


def test_differences_have_the_t_interval_of_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.random((5, 50)), rng.random((5, 50))
    found = paired.difference(list(a), list(b))
    test = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    low, high = test.confidence_interval()
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))


def test_seeds_without_a_difference_have_an_interval_without_width():
    found = paired.difference([np.asarray([0.5, 0.5])] * 3, [np.asarray([1.0, 0.0])] * 3)
    assert found.signed() == "+0.0 [+0.0, +0.0], p = 1"


def test_a_single_seed_has_no_interval():
    found = paired.over_seeds([0.5])
    assert (found.cell(), found.signed()) == ("50.0", "+50.0")
    written = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(written) == {
        "mean": 50.0, "low": None, "high": None, "p": None, "seeds": [50.0]
    }  # fmt: skip


@pytest.mark.parametrize("k", [4, K])
def test_voting_is_read_at_every_k(drawn, tmp_path, monkeypatch, k):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)
    judged = evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, k)
    monkeypatch.setattr(voting, "read_stage", lambda road, stage: judged)
    found = voting.read([Road(Settings(k=k), 0), Road(Settings(k=k), 1)])
    assert f"RL: guided against plain votes of {k}" in found.figures["differences"]
    test = found.figures["differences"][f"SFT, votes of {k} against the scalar RM"]
    votes, alone = found.figures["accuracy"]["SFT, votes"][str(k)], found.figures["scalar"]
    assert test["mean"] == pytest.approx(votes["mean"] - alone["mean"], abs=1e-3)


def test_records_are_told_apart_by_their_kind_and_number_of_responses(drawn, tmp_path, monkeypatch):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)

    def named(domains):
        found = [
            dataclasses.replace(record, domain=domains[i % len(domains)])
            for i, record in enumerate(records)
        ]
        return evidence.read_samples(found, tmp_path / "samples.jsonl", scalar, K)

    fresh, unseen = named(["fresh"]), named(["operands", "combinations"])
    monkeypatch.setattr(
        voting, "read_stage", lambda road, stage, shifted=False: unseen if shifted else fresh
    )
    monkeypatch.setattr(Road, "records", lambda self, shifted=False: records)
    found = generalisation.read([Road(Settings(k=K), 0)]).figures["accuracy"]

    def expected(kept):
        """The mean credit of the scalar RM."""
        chosen = [r for i, r in enumerate(records) if kept(i, r)]
        right = [np.argmax(scalar[r.id]) == np.argmax(r.labels) for r in chosen]
        return pytest.approx(100 * np.mean(right), abs=0.01)

    for name, kept in {
        "fresh": lambda i, r: True,
        "unseen operands": lambda i, r: i % 2 == 0,
        "unseen combinations": lambda i, r: i % 2 == 1,
        "3 responses": lambda i, r: len(r.responses) == 3,
    }.items():
        assert found[name]["scalar RM"]["mean"] == expected(kept), name


@pytest.mark.parametrize("k", [5, 6])
def test_no_rule_of_adaptive_k_draws_more_than_the_fixed_one(drawn, tmp_path, k):
    records, rows, scalar = drawn
    write_critiques(tmp_path / "samples.jsonl", rows)
    judged = evidence.read_samples(records, tmp_path / "samples.jsonl", scalar, K)
    mean = {name: np.concatenate(rule(judged, k)).mean() for name, rule in adaptive_k.RULES.items()}
    assert mean["fixed"] == mean["across"] == k
    # Some bound stops these 40 records after exactly 5 or 6 critiques on average.
    assert mean["within"] == k


def test_flops_of_training_know_nothing_of_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "parameters", lambda stage: 10)
    rows = [(10, 100.0), (20, 101.0), (30, 102.0), (40, 9000.0), (50, 9001.0), (55, 9001.5)]
    text = "".join(
        json.dumps({"step": step, "time": time, "train_tokens_per_second": 500.0}) + "\n"
        for step, time in rows
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "heldout/accuracy": 1}\n' + text)
    assert flops.training(tmp_path) == 6 * 10 * 50 * 55
    assert flops.updates(tmp_path) == flops.Updates(55, tokens=50.0, seconds=0.1)


def test_scalar_scores_are_kept_for_the_same_texts_alone(tmp_path, monkeypatch, make_params):
    write_world(tmp_path / "world", WorldConfig(cold_start=4, train=4, fresh=4, shifted=2))
    tokenizer = load_tokenizer(tmp_path / "world" / "tokenizer")
    config = ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
        query_pre_attn_scalar=8, vocab_size=tokenizer.vocab_size, sliding_window=16,
    )  # fmt: skip
    params = make_params(config, 3, num_labels=1)
    folder = tmp_path / "scalar_rm" / "model"
    storage.save_model(folder, config, params, tmp_path / "world" / "tokenizer")
    asked = []

    class Lengths:
        def scores(self, rows, mesh, tokens):
            asked.extend(rows)
            return [tuple(float(len(text)) for text in responses) for _, responses in rows]

    monkeypatch.setattr(scalar_rm, "load_scalar_rm", lambda *_: Lengths())
    turns = ({"role": "user", "content": "q"},)
    first = [Preference("a", turns, ("x", "yy"), (1.0, 0.0))]
    other = [Preference("a", turns, ("xxx", "y"), (1.0, 0.0))]
    for records, wanted in ((first, (1.0, 2.0)), (first, (1.0, 2.0)), (other, (3.0, 1.0))):
        assert tuple(evidence.scalar_scores(tmp_path, records)["a"]) == wanted
    assert len(asked) == 2


@pytest.mark.parametrize(("shared", "few", "many"), [(False, 20, 40), (True, 0.99, 1.01)])
def test_effective_number_of_independent_and_of_equal_critiques(shared, few, many):
    rng = np.random.default_rng(2)
    right = rng.random((4000, 1 if shared else 32)) < 0.6
    right = np.broadcast_to(right, (4000, 32))
    scores = np.stack([np.where(right, 9.0, 1.0), np.full(right.shape, 5.0)], axis=2)
    none = np.zeros(right.shape)
    group = evidence.Group((), np.zeros(4000, int), scores, none, np.zeros((4000, 2)))
    assert few <= voting.effective([group]) <= many


def test_the_weight_comes_from_the_other_half():
    records = [
        Preference(f"r{i}", ({"role": "user", "content": "q"},), ("a", "b"), (1.0, 0.0))
        for i in range(20)
    ]
    half = np.asarray([hybrid._half(record.id) for record in records])
    assert 4 < half.sum() < 16
    scores = np.ones((20, 2, 2))
    group = evidence.Group(
        tuple(records), np.zeros(20, int), scores, scores[..., 0], np.zeros((20, 2))
    )
    # Weight 1 is best in one half, and weight 4 in the other.
    credits = {w: np.zeros(20) for w in hybrid.WEIGHTS}
    credits[1.0], credits[4.0] = half.astype(float), (~half).astype(float)
    assert hybrid.crossed([group], credits).tolist() == [0.0] * 20
    assert hybrid.best_weight(credits, half) == 1.0


def test_a_branch_links_what_it_starts_from(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(Road, "run", lambda self, command: commands.append(command))
    road = Road(Settings(runs=tmp_path, options=""), 3)
    for part in ("world", "sft", "rft", "rl", "scalar_rm"):
        (road.directory / part).mkdir(parents=True)
    branch = road.branch("kl", "rl", "--rl.kl-coef", "0")
    assert sorted(path.name for path in branch.iterdir()) == ["rft", "sft", "world"]
    assert (branch / "rft").resolve() == (road.directory / "rft").resolve()
    (command,) = commands
    assert (
        command[-2:] == ["--rl.kl-coef", "0"]
        and "rl.py:tiny" in command
        and "--world.seed" in command
    )
    dry = dataclasses.replace(road, settings=dataclasses.replace(road.settings, dry=True))
    assert dry.branch("kl", "rl") == branch


def test_the_road_without_principles_learns_from_critiques_without_them(tmp_path, monkeypatch):
    commands = []

    def train(self, command):
        commands.append(command)
        (tmp_path / "0-no-principles" / command[3].partition(".")[0]).mkdir()

    monkeypatch.setattr(Road, "run", train)
    road = Road(Settings(runs=tmp_path), 0)
    write_world(road.directory / "world", WorldConfig(cold_start=40, train=4, fresh=4, shifted=2))
    stage = ablations._stage(road, ablations.NO_PRINCIPLES)
    assert stage == tmp_path / "0-no-principles" / "rl"
    # Each stage begins with the model that the one before left in this directory.
    assert [command[3] for command in commands] == ["sft.py:tiny", "rft.py:tiny", "rl.py:tiny"]
    assert not any(path.is_symlink() for path in stage.parent.iterdir() if path.name != "world")
    file = Path(commands[0][commands[0].index("--instructions") + 1])
    before = read_trajectories(road.directory / "world" / "cold_start.jsonl")
    after = read_trajectories(file)
    assert len(after) == 40
    for row, whole in zip(after, before, strict=True):
        assert "Criteria" not in row.text and whole.text.endswith("\n" + row.text)
        assert dataclasses.replace(row, text="") == dataclasses.replace(whole, text="")


def test_missing_commands_are_shown_once_and_make_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roads, "_shown", set())
    road = Road(Settings(runs=tmp_path, dry=True), 0)
    partial = tmp_path / "0" / "judged" / "rl-expected-32.jsonl"
    partial.parent.mkdir(parents=True)
    partial.write_text("{}\n", encoding="utf-8")  # of a run that was stopped
    for _ in range(2):
        road.pipeline()
        road.verdicts(road.directory / "rl")
    first, second = capsys.readouterr().out.splitlines()
    assert "grm_jax.train --config spct.py" in first and "--expected" in second
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]


def test_a_command_that_fails_is_named(tmp_path, monkeypatch):
    failed = types.SimpleNamespace(returncode=3)
    monkeypatch.setattr(roads.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"status 3: python -m grm_jax.train --config spct.py"):
        Road(Settings(runs=tmp_path), 0).pipeline()


@pytest.mark.parametrize(("status", "fails"), [(0, False), (3, False), (1, True)])
def test_rows_without_a_readable_critique_are_no_failure(tmp_path, monkeypatch, status, fails):
    ended = types.SimpleNamespace(returncode=status)
    monkeypatch.setattr(roads.subprocess, "run", lambda *_, **__: ended)
    road = Road(Settings(runs=tmp_path), 0)
    (tmp_path / "0").mkdir()
    done = road.rows_file("rl", "pairs", 2).with_suffix(".done")
    if fails:
        with pytest.raises(UserError, match=r"status 1: python -m grm_jax\.judge"):
            road.judge_rows("rl", "pairs", lambda: [{"id": "a"}], 2)
    else:
        road.judge_rows("rl", "pairs", lambda: [{"id": "a"}], 2)
        assert (tmp_path / "0" / "judged" / "pairs.jsonl").read_text() == '{"id": "a"}\n'
    assert done.exists() != fails


def test_a_model_of_the_earlier_code_takes_the_engine_of_today_alone(tmp_path):
    cards = {"earlier": {"engine": {"prompt_buckets": [32]}, "stage": "rl"},
             "today": {"engine": {"page": 48}, "stage": "rft"}}  # fmt: skip
    for name, card in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "grm.json").write_text(json.dumps(card), encoding="utf-8")
    earlier_rl._take_engine(tmp_path / "earlier", tmp_path / "today")
    found = json.loads((tmp_path / "earlier" / "grm.json").read_text(encoding="utf-8"))
    assert found == {"engine": {"page": 48}, "stage": "rl"}


def test_sets_of_principles_are_counted_in_each_group(tmp_path):
    rows = [
        (1, "a", [0, 1], "x yes"), (1, "a", [0, 1], "yes x"), (1, "b", [0, 1], "x"),
        (1, "b", [0, 1], "y"), (2, "a", [0, 1], "z"), (2, "a", [1, 0], "w"),
    ]  # fmt: skip
    text = "".join(
        f'{{"step": {step}, "example_id": "{id}", "order": {order}, '
        f'"text": "Criteria: {words}\\nScores"}}\n'
        for step, id, order, words in rows
    )
    (tmp_path / "rollouts.jsonl").write_text(text, encoding="utf-8")
    assert ceiling.principles(tmp_path) == [1.5, 1.0]


def test_pairs_are_won_critique_by_critique():
    record = Preference("r", ({"role": "user", "content": "q"},), ("a", "b", "c"), (0.0, 2.0, 1.0))
    rows = list(baselines._pairs([record]))
    assert [row["responses"] for row in rows] == [["a", "b"], ["a", "c"], ["b", "c"]]
    drawn = {
        rows[0]["id"]: [{"scores": [1, 9]}, {"scores": [5, 5]}],
        rows[1]["id"]: [{"scores": [2, 8]}, {"scores": None}],
        rows[2]["id"]: [{"scores": [7, 3]}, {"scores": [4, 6]}],
    }
    won = baselines.points([record], drawn, 2)["r"]
    assert won.tolist() == [[0, 2, 1], [0.5, 0.5, 1]]
    (group,) = evidence.grouped([record], {"r": won})
    assert evidence.accuracy([group], 1, evidence.plain).tolist() == [0.5]
    assert evidence.accuracy([group], 2, evidence.plain).tolist() == [1]  # 0.5, 2.5, 2
    unreadable = {row["id"]: [{"scores": None}] for row in rows}
    (group,) = evidence.grouped([record], baselines.points([record], unreadable, 1))
    assert evidence.accuracy([group], 1, evidence.plain).tolist() == [0]


def test_a_majority_counts_winners_and_not_scores():
    scores = np.asarray([[[9, 1], [4, 5], [4, 5], [3, 3], [np.nan, np.nan]]], float)
    none = np.zeros((1, 5)), np.zeros((1, 2))
    assert baselines._majority(scores, *none).tolist() == [[1.5, 2.5]]
    assert evidence.plain(scores, *none).tolist() == [[20, 14]]


def test_the_head_reads_the_critique_of_its_own_response():
    turns = ({"role": "user", "content": "q"},)
    record = Preference("r", turns, ("a", "b"), (0.0, 1.0), reference="c")
    assert list(baselines._single([record]))[1] == {
        "id": "r#1", "turns": [turns[0]], "responses": ["b"], "reference": "c",
    }  # fmt: skip
    drawn = {
        row["id"]: [{"critique": f"{row['responses'][0]}{j}"} for j in range(2)]
        for row in baselines._single([record])
    }
    critiqued = baselines._critiqued(record, drawn, 1)
    assert (critiqued.id, critiqued.responses) == ("r@1", ("a a1", "b b1"))


def test_the_true_score_is_that_of_the_world():
    rng = random.Random(0)
    for _ in range(20):
        item = make_item(rng, 3)
        found = [policy_train.truth(item, text) for text in item.response_texts]
        assert found == item.labels


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, True),
        ({"quick": True}, False),
        ({"settings": Settings(config="spct.py:27b,group=8")}, False),
        ({"settings": Settings(heldout=Path("mine.jsonl"))}, False),
    ],
)
def test_results_of_other_runs_do_not_replace_those_of_the_repository(how, kept):
    args = run.Arguments(**how)
    assert run.output(args) == (run.HERE if kept else args.settings.runs / "results")
    assert Settings(config="spct.py:27b,group=8").size == "27b"


def test_no_two_programs_have_one_name():
    """They import each other by file names, and recipes do so, too."""
    root = run.HERE.parents[1]
    folders = [root / "configs", root / "experiments" / "gpu", root / "experiments" / "claims"]
    names = [file.stem for folder in folders for file in folder.glob("*.py")]
    assert len(names) > 20 and len(set(names)) == len(names)


def test_a_command_can_run_with_the_code_of_another_folder(tmp_path, capsys):
    package = tmp_path / "grm_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text("open('ran', 'w').close()", encoding="utf-8")
    Road(Settings(), 0).run(["-m", "grm_jax.train"], code=tmp_path)
    assert (tmp_path / "ran").exists()
    shown = f"cd {tmp_path} && PYTHONPATH={tmp_path} python -m grm_jax.train"
    assert shown in capsys.readouterr().out
