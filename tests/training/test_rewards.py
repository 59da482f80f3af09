"""The rewards of rollouts beside plain enumeration."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.critique import credit, unshuffle, vote
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.prompts import Prompts
from grm_jax.training import rewards
from grm_jax.training.losses import group_advantages
from grm_jax.training.options import RL
from grm_jax.training.setup import ConfigError


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([(9, 1), (1, 9), (5, 5), None, (8, 7), (2, 3)], (1, 0), None),
        ([(9, 1, 4), (1, 9, 9), (5, 5, 5), (8.3, 7.1, 8.3)], (0, 0, 1), None),
        ([(7,), (5,), (1,), None], (0,), 5.0),
        ([(1,), (0,), (1,), (0,), (0,), None], (1,), None),  # the paper's labels, 0 and 1
        ([None, None], (1, 0), None),
    ],
)
def test_gains_are_those_of_all_votes_of_half_of_the_group(scores, labels, threshold):
    group = len(scores)
    found = rewards.vote_gains(scores, labels, threshold)
    for i in range(group):
        values: dict[bool, list[float]] = {True: [], False: []}
        for chosen in itertools.combinations(range(group), group // 2):
            verdict = vote([scores[j] for j in chosen])
            values[i in chosen].append(credit(verdict, labels, threshold or 0.5))
        assert found[i] == pytest.approx(np.mean(values[True]) - np.mean(values[False]))


def test_the_one_who_turns_a_vote_gains_most():
    # Three tie, one is right, one is wrong by little: with the right one every vote is won.
    gains = rewards.vote_gains([(5, 5), (5, 5), (9, 1), (4, 5)], (1, 0))
    assert gains.argmax() == 2 and gains.argmin() == 3
    assert gains[0] == gains[1]


@pytest.mark.parametrize(("sign", "strengthens"), [(1, False), (-1, True)])
def test_placeless_advantages_strengthen_no_leaning(make_critique, sign, strengthens):
    rng = np.random.default_rng(0)
    prompts = Prompts(build_tokenizer(), TemplateConfig(), order=2)
    groups, earned = [], []
    for index in range(6):
        n = 2 + index % 2
        labels = tuple(float(i == 0) for i in range(n))
        record = Preference(f"r{index}", ({"role": "user", "content": "q"},), ("a",) * n, labels)
        for order in prompts.orders(record, 2):
            shown = [tuple(rng.permutation(n) + 1) for _ in range(8)]
            shown = [s[::-1] if s[0] > s[-1] and rng.random() < 0.7 else s for s in shown]
            drawn = [unshuffle([float(x) for x in s], order) for s in shown]
            groups.append(
                [make_critique(record.id, i, s, order=order) for i, s in enumerate(drawn)]
            )
            earned.append([1.0 if s.index(max(s)) == 0 else -1.0 for s in drawn])
    groups[0][0] = make_critique("r0", 0, None)
    advantages = sign * np.array(group_advantages(jnp.asarray(earned, jnp.float32)))
    advantages[3] = 0  # a group without signal
    found = rewards.placeless(advantages, groups)
    place = [[rewards.winning_place(c.scores, c.order) for c in group] for group in groups]
    assert place[0][0] is None
    push = [pushes(advantages, place, each) for each in range(3)]
    lean = np.zeros(3)
    for group, row in zip(groups, place, strict=True):
        n = len(group[0].order)
        for each in range(n):
            lean[each] += row.count(each) - (len(row) - row.count(None)) / n
    assert lean[:2].argmin() == 0, "the one shown last wins too often"
    assert (np.dot(push, lean) > 0) == strengthens
    if not strengthens:  # unlearns the leaning
        assert (found == advantages).all()
        return
    assert np.abs(push).min() > 0.01
    np.testing.assert_allclose([pushes(found, place, each) for each in range(3)], 0, atol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)
    assert (found[3] == 0).all() and found[0, 0] == advantages[0, 0] != 0


def pushes(advantages, place, which):
    """The covariance of the advantages with a win of one place, among rollouts with a winner."""
    total = 0.0
    for row, won in zip(advantages, place, strict=True):
        decided = [g for g, each in enumerate(won) if each is not None]
        wins = np.asarray([won[g] == which for g in decided], float)
        total += row[decided] @ (wins - wins.mean())
    return total


def test_placeless_advantages_need_two_groups():
    with pytest.raises(ConfigError, match=r"--rl.placeless compares .* --rl.prompts 2 or more"):
        rewards.check(RL(placeless=True, prompts=1))
    rewards.check(RL(placeless=True, prompts=2))


def test_the_text_before_the_last_box_learns_from_a_share(make_critique):
    tokenizer = build_tokenizer()
    texts = [
        "Specific Criteria: answer high\nAnalysis: [A] answer 7 yes\nScores: \\boxed{10, 5}",
        "\nScores: \\boxed{1, 5}\nAnalysis: [A]\nScores: \\boxed{5, 1}",
        "Specific Criteria: answer high",
    ]
    group = []
    for index, text in enumerate(texts):
        ids = np.asarray([*tokenizer.encode(text), tokenizer.end_id], np.int32)
        critique = make_critique("a", index, (1, 5), tokens=len(ids))
        group.append(dataclasses.replace(critique, text=text, ids=ids))
    ((first, second, none),) = rewards.shares([group], 0.25, tokenizer.decode)
    scores = len(tokenizer.encode("\nScores: \\boxed{10, 5}")) + 1  # and the end token
    assert first.tolist() == [0.25] * (len(first) - scores) + [1.0] * scores
    assert second.tolist() == [0.25] * (len(second) - scores) + [1.0] * scores
    assert none.tolist() == [1.0] * len(none)


@pytest.mark.parametrize(
    ("text", "n", "verdict"),
    [
        ("so [4, 9]", 2, "[4, 9]"),
        ("7\n\\boxed{8} \\boxed{9}", 2, "\\boxed{8} \\boxed{9}"),
        ("so \\boxed{1, 5}, not \\boxed{7}", 2, "\\boxed{1, 5}, not \\boxed{7}"),
        ("so \\boxed{7}", 1, "\\boxed{7}"),
        ("see [1]", 2, "see [1]"),
    ],
)
def test_tokens_of_the_verdict_have_their_whole_weight(text, n, verdict):
    """With a token a character, and one that ends the text."""
    ids = [*map(ord, text), 0]
    weights = rewards.token_weights(ids, text, n, 0.5, lambda ids: "".join(map(chr, ids)))
    before = len(text) - len(verdict)
    assert weights == (0.5,) * before + (1.0,) * (len(verdict) + 1)


def test_rare_rollouts_earn_more_by_their_rank():
    factors = rewards.rarity(np.asarray([[-1.0, -8.0, -3.0, -2.0]]), 0.4)
    np.testing.assert_allclose(factors, [[0.6, 0.9, 0.8, 0.7]])


def test_what_is_learnt_is_the_rule_unless_asked_for(make_critique, make_record):
    records = [make_record("a", (1, 0))]
    scores = [(9, 1), (9, 1), (1, 9), (5, 5)]
    groups = [[make_critique("a", g, s, tokens=1 + g) for g, s in enumerate(scores)]]
    config = RL(group=4)
    earned = rewards.rule(records, groups, config)
    assert earned.tolist() == [[1, 1, -1, -1]]
    assert rewards.learnt(earned, records, groups, config).tolist() == earned.tolist()
    # The longer of the two right ones is less probable; wrong ones keep their reward.
    rare = rewards.learnt(earned, records, groups, dataclasses.replace(config, rare=0.4))
    np.testing.assert_allclose(rare, [[0.6, 0.7, -1, -1]])
    voted = rewards.learnt(earned, records, groups, dataclasses.replace(config, vote=2.0))
    np.testing.assert_allclose(voted, earned + 2 * rewards.vote_gains(scores, (1, 0)), atol=1e-6)


def test_a_group_with_too_many_votes_is_refused():
    rewards.check(RL(vote=1.0, group=16))
    with pytest.raises(ConfigError, match=r"group of 2 to 16 rollouts, and --rl.group is 17"):
        rewards.check(RL(vote=1.0, group=17))
