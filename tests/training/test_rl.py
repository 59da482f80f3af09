"""Rollouts to batches, by hand."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.critique import Template, unshuffle
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.prompts import Prompts
from grm_jax.sampler.options import SamplingConfig
from grm_jax.training import rewards, rl
from grm_jax.training.lengths import Lengths
from grm_jax.training.losses import group_advantages
from grm_jax.training.options import RL
from grm_jax.training.rl import (
    by_length,
    groups_of,
    record_batches,
    rollout_batch,
    rollout_metrics,
    run_rl,
)
from grm_jax.training.setup import ConfigError

CONFIG = RL(prompts=3, group=2, sampling=SamplingConfig(max_new_tokens=32))
BUCKETS = (8, 16, 64)


@pytest.fixture
def groups(make_critique):
    """Three groups of two; lengths name the group and the place in it."""
    return [
        [make_critique(f"r{p}", g, (9, 1), prompt=2 + p, tokens=1 + 2 * p + g) for g in range(2)]
        for p in range(3)
    ]


REWARDS = np.asarray([[1, 1], [1, -1], [-1, -1]], np.float32)


def test_short_groups_stand_first(groups):
    batch = rollout_batch(groups[::-1], REWARDS[::-1], CONFIG, BUCKETS)
    assert batch["lengths"].tolist() == [2, 3, 4]
    assert batch["prompts"].tolist()[1] == [4, 5, 6, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(batch["advantages"], [[0, 0], [1, -1], [0, 0]], atol=1e-5)
    # All still learn: those without signal feel the KL term.
    assert batch["mask"].sum(axis=2).tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(("longest", "computed"), [(0, 0), (1, 4), (4, 4), (5, 7), (7, 7)])
def test_a_part_is_cut_to_half_where_that_holds_its_rollouts(longest, computed):
    mask = np.zeros((2, 3, 7), np.float32)
    mask[1, 2, :longest] = 1
    batch = {"mask": mask, "old": mask, "lengths": np.ones(2, np.int32)}

    def width(batch):
        assert batch["old"].shape == batch["mask"].shape and batch["lengths"].shape == (2,)
        return jnp.asarray(batch["mask"].shape[-1])

    assert int(by_length(width, jnp.asarray(0), batch)) == computed


def test_old_logprobs_and_targets_are_the_samples_own(groups):
    batch = rollout_batch(groups, REWARDS, CONFIG, BUCKETS)
    row = batch["old"][1, 1]
    np.testing.assert_allclose(row[:4], [-0.1, -0.2, -0.3, -0.4], atol=1e-6)
    assert not row[4:].any()
    assert batch["targets"][1, 1, :5].tolist() == [10, 11, 12, 13, 0]
    assert batch["mask"][1, 1, :5].tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_with_train_groups_only_signal_counts(groups, most, kept):
    config = dataclasses.replace(CONFIG, train_groups=most)
    batch = rollout_batch(groups, REWARDS, config, BUCKETS)
    assert len(batch["prompts"]) == kept
    assert batch["mask"].sum(axis=2).tolist() == [[3, 4], [0, 0], [0, 0]][:kept]
    assert batch["lengths"].tolist() == [3, 2, 4][:kept]


def test_an_average_rollout_of_a_group_with_signal_counts(make_critique):
    """Ties can be worth 0: advantage 0, but its tokens still feel the KL term."""
    group = [make_critique("r", g, (5, 5), tokens=3) for g in range(3)]
    config = dataclasses.replace(CONFIG, train_groups=1, group=3)
    batch = rollout_batch([group], np.asarray([[1, 0, -1]], np.float32), config, BUCKETS)
    assert batch["advantages"][0, 1] == 0.0
    assert batch["mask"].sum(axis=2).tolist() == [[3, 3, 3]]


def test_shapes_are_few(make_critique):
    """Prompts are padded to the sampler's buckets, completions to their maximum."""
    shapes = set()
    for tokens in range(1, 33):
        group = [make_critique("r", g, prompt=2 * tokens, tokens=tokens) for g in range(2)]
        batch = rollout_batch([group], np.zeros((1, 2), np.float32), CONFIG, BUCKETS)
        shapes.add((batch["targets"].shape[2], batch["prompts"].shape[1]))
        assert batch["targets"].shape[2] >= tokens
    assert {width for width, _ in shapes} == {32}
    assert {length for _, length in shapes} == set(BUCKETS)


def test_describe(make_critique):
    groups = [
        [make_critique("a", 0, (9, 1), tokens=4), make_critique("a", 1, None, tokens=2)],
        [
            make_critique("b", 0, (9, 1), tokens=6),
            make_critique("b", 1, None, tokens=8, finish_reason="length"),
        ],
    ]
    earned = np.asarray([[1.0, -1.0], [0.0, 0.0]], np.float32)
    wanted = {
        "reward": 0.0,
        "correct": 0.25,
        "signal": 0.5,
        "length": 5.0,
        "tokens": 20.0,
        "truncated": 0.25,
        "unparsable": 0.5,
        "first_wins": 0.5,
    }
    assert rollout_metrics(groups, earned, earned) == wanted
    # What is added to the rule gives the second group signal, too.
    learnt = earned + np.asarray([[0.0, 0.0], [0.1, 0.0]], np.float32)
    assert rollout_metrics(groups, earned, learnt) == {**wanted, "signal": 1.0}


def test_single_responses_are_rewarded_on_their_side_of_the_threshold(make_critique, make_record):
    records = [make_record("a", (1,)), make_record("b", (0,))]
    groups = [[make_critique(r.id, i, (s,)) for i, s in enumerate((85, 1, 50))] for r in records]
    config = RL(tie="expected")
    found = rewards.rule(records, groups, config, 50.0)
    assert found.tolist() == [[1, -1, 0], [-1, 1, 0]]
    rows = rl._rows(1, records, groups, found, 50.0)
    assert [row["correct"] for row in rows] == [True, False, False, False, True, False]


def test_rollout_rows_tell_correct_from_reward(make_critique, make_record):
    """A tie is worth 0 under the expected rule and is still not correct."""
    record = make_record("a", (0, 1))
    group = [make_critique("a", 0, (5, 5)), make_critique("a", 1, (1, 9), order=(1, 0))]
    rows = rl._rows(7, [record], [group], np.asarray([[0.0, 1.0]]))
    assert [(r["step"], r["reward"], r["correct"]) for r in rows] == [
        (7, 0.0, False),
        (7, 1.0, True),
    ]
    assert rows[1]["order"] == (1, 0)
    assert rows[1]["responses"] == ("response 0", "response 1")
    assert rows[1]["labels"] == (0.0, 1.0) and rows[1]["scores"] == (1.0, 9.0)


def batches_of(records):
    run = fake_run(records, (24, 64))
    return record_batches(run, run.records, CONFIG)  # pyright: ignore[reportArgumentType]


def fake_run(records, buckets):
    tokenizer = build_tokenizer()
    templates = TemplateConfig("compact", "compact_single", "compact_meta")
    setup = types.SimpleNamespace(prompt_buckets=buckets, seed=0)
    prompts = Prompts(tokenizer, templates, order="given")
    lengths = Lengths(prompts, Template.load("compact_meta"))
    return types.SimpleNamespace(records=records, setup=setup, lengths=lengths)


def test_records_of_a_batch_have_prompts_of_one_bucket(make_record):
    short = [make_record(f"s{i}", (0, 1), " sum 1 2") for i in range(6)]
    long = [make_record(f"l{i}", (0, 1), " sum" + " 1" * 20) for i in range(6)]
    data = batches_of([*short, *long])
    seen = [next(data) for _ in range(8)]
    for batch in seen:
        assert len({record.id for record in batch}) == 3
        assert len({record.id[0] for record in batch}) == 1
    assert {record.id for batch in seen for record in batch} == {r.id for r in [*short, *long]}


@pytest.mark.parametrize("rare", ["short", "long"])
def test_a_bucket_with_too_few_records_joins_another(make_record, rare):
    short = [make_record(f"s{i}", (0, 1), " sum 1 2") for i in range(1 if rare == "short" else 6)]
    long = [
        make_record(f"l{i}", (0, 1), " sum" + " 1" * 20) for i in range(1 if rare == "long" else 6)
    ]
    data = batches_of([*short, *long])
    seen = {record.id for _ in range(12) for record in next(data)}
    assert seen == {r.id for r in [*short, *long]}


def test_groups_of_two_orders_cancel_what_a_place_earns(make_record, make_critique):
    """A judge that prefers the place shown first, whatever stands there, learns nothing of it."""
    records = [make_record("a", (0, 1)), make_record("b", (1, 0))]
    prompts = Prompts(build_tokenizer(), TemplateConfig(), order=2)
    first = [(9, 1), (9, 1), (9, 1), (1, 9)]  # as shown, in each order
    rollouts = {
        record.id: [
            make_critique(record.id, i, unshuffle(first[i // 2], order), order=order)
            for i, order in enumerate(prompts.orders(record, 8))
        ]
        for record in records
    }
    asked, groups = groups_of(records, rollouts, 2)
    assert [record.id for record in asked] == ["a", "a", "b", "b"]
    assert [{c.order for c in group} for group in groups[:2]] in (
        [{(0, 1)}, {(1, 0)}], [{(1, 0)}, {(0, 1)}],
    )  # fmt: skip
    earned = rewards.rule(asked, groups, CONFIG)
    advantages = np.asarray(group_advantages(jnp.asarray(earned)))
    chose_first = np.asarray([[i < 3 for i in range(4)]] * 4)
    assert np.abs(advantages).min() > 0.5
    np.testing.assert_allclose(advantages[0::2] + advantages[1::2], 0, atol=1e-5)
    np.testing.assert_allclose(advantages[chose_first].sum(), 0, atol=1e-5)


def test_a_batch_strengthens_no_leaning_where_that_is_asked(make_critique):
    """Three of four rollouts prefer the place shown first, and only where it is right is there
    signal: the batch would teach that place."""
    groups = [
        [make_critique(f"r{p}", g, (9, 1) if g < 3 else (1, 9)) for g in range(4)] for p in range(2)
    ]
    rewards_of = np.asarray([[1, 1, 1, -1], [1, 1, 1, 1]], np.float32)
    config = dataclasses.replace(CONFIG, prompts=2, group=4, orders=2)
    usual = rollout_batch(groups, rewards_of, config, BUCKETS)["advantages"]
    config = dataclasses.replace(config, placeless=True)
    found = rollout_batch(groups, rewards_of, config, BUCKETS)["advantages"]
    assert np.abs(usual[0]).min() > 0.5 and np.abs(found).max() < 1e-5
    unlearnt = rollout_batch(groups, -rewards_of, config, BUCKETS)["advantages"]
    np.testing.assert_allclose(unlearnt, -usual)


def test_shares_go_with_their_rollouts(groups):
    """Groups are sorted by length; each token keeps the share of its own rollout."""
    shares = [[np.arange(1, c.tokens + 1) / 10 for c in group] for group in groups[::-1]]
    batch = rollout_batch(groups[::-1], REWARDS[::-1], CONFIG, BUCKETS, shares)
    assert (batch["share"] > 0).tolist() == (batch["mask"] > 0).tolist()
    assert batch["share"].sum(axis=2) == pytest.approx(
        np.asarray([[sum(range(1, c.tokens + 1)) / 10 for c in group] for group in groups])
    )
    assert "share" not in rollout_batch(groups, REWARDS, CONFIG, BUCKETS)


def test_how_often_the_first_one_wins_is_counted_against_chance(make_critique):
    drawn = [
        make_critique("a", 0, (9, 1)),  # the first of two
        make_critique("a", 1, (9, 1), order=(1, 0)),  # the second
        make_critique("b", 0, (1, 2, 9), order=(2, 0, 1)),  # the first of three
        make_critique("b", 1, (9, 2, 9)),  # a tie
        make_critique("c", 0, None),
        make_critique("d", 0, (7,)),
    ]
    assert rl.first_wins(drawn) == pytest.approx((1 / 2 - 1 / 2 + 2 / 3) / 3)
    assert rl.first_wins(drawn[3:]) == 0.0


def test_prompts_must_be_whole_records_of_their_orders():
    with pytest.raises(ConfigError, match=r"--rl.prompts 3 .* --rl.orders 2 .* --rl.prompts 4"):
        run_rl(None, dataclasses.replace(CONFIG, orders=2))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_filtered_sampling_is_refused(change):
    config = dataclasses.replace(CONFIG, sampling=SamplingConfig(**change))
    with pytest.raises(
        ConfigError, match=r"must be drawn from the whole distribution.*--rl.sampling.top-k 0"
    ):
        run_rl(None, config)  # pyright: ignore[reportArgumentType]
