"""Eq. (10), Eq. (11) and the filters of rejective fine-tuning."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grm_jax.critique import decisive, is_correct, keep_hinted, keep_rft, rule_reward, too_easy


@pytest.mark.parametrize(
    ("scores", "labels", "correct"),
    [
        ((8, 5), (1, 0), True),
        ((5, 8), (1, 0), False),
        ((8, 8), (1, 0), False),  # a tie is wrong
        ((7, 9, 8), (0, 1, 0.5), True),
        ((1, 9, 9), (0, 1, 0), False),
        ((9, 5, 5), (3, 1, 2), True),  # only the best one's place matters
        ((1,), (1,), True),
        ((0,), (0,), True),
        ((1,), (0,), False),
        ((8,), (1,), False),
        (None, (1, 0), False),
        (None, (1,), False),
    ],
)
def test_eq_10_and_11(scores, labels, correct: bool) -> None:
    assert is_correct(scores, labels) is correct
    assert rule_reward(scores, labels) == (1 if correct else -1)


@pytest.mark.parametrize(
    ("scores", "labels", "reward"),
    [
        ((8, 8), (1, 0), 0),
        ((8, 8, 8), (1, 0, 0), -1 / 3),
        ((8, 8, 9), (1, 0, 0), -1),
        ((9, 8, 8), (1, 0, 0), 1),
        ((1,), (1,), 1),
        ((1,), (0,), -1),
        (None, (1, 0), -1),
    ],
)
def test_expected_reward(scores, labels, reward: float) -> None:
    assert rule_reward(scores, labels, tie="expected") == pytest.approx(reward)


@pytest.mark.parametrize(
    ("score", "label", "correct", "expected"),
    [
        (85, 1, True, 1),
        (85, 0, False, -1),
        (1, 1, False, -1),  # a score of 1 of 100 is no label
        (1, 0, True, 1),
        (50, 1, False, 0),  # exactly on the threshold: a tie of both answers
        (50, 0, False, 0),
        (None, 1, False, -1),
    ],
)
def test_single_scores_of_another_range_are_read_by_their_threshold(
    score, label, correct, expected
) -> None:
    scores = None if score is None else (score,)
    assert is_correct(scores, (label,), threshold=50) is correct
    assert rule_reward(scores, (label,), threshold=50) == (1 if correct else -1)
    assert rule_reward(scores, (label,), threshold=50, tie="expected") == expected
    # Several responses have no threshold.
    assert is_correct((40, 30), (1, 0), threshold=50)


@st.composite
def judged(draw):
    n = draw(st.integers(2, 5))
    scores = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    labels = draw(st.permutations(range(n)))
    return scores, labels


@given(judged())
def test_both_tie_rules_agree_without_a_tie(item) -> None:
    scores, labels = item
    best = labels.index(max(labels))
    assume(scores.count(max(scores)) == 1 or scores[best] < max(scores))
    assert rule_reward(scores, labels, tie="expected") == rule_reward(scores, labels)


@given(judged())
def test_expected_reward_is_the_mean_over_broken_ties(item) -> None:
    scores, labels = item
    top = [index for index, score in enumerate(scores) if score == max(scores)]
    rewards = [
        rule_reward([score + (index == winner) for index, score in enumerate(scores)], labels)
        for winner in top
    ]
    assert rule_reward(scores, labels, tie="expected") == pytest.approx(sum(rewards) / len(rewards))


@given(judged(), st.randoms())
def test_reward_does_not_depend_on_the_order(item, random) -> None:
    scores, labels = item
    order = random.sample(range(len(scores)), len(scores))
    for tie in ("paper", "expected"):
        shown = rule_reward([scores[i] for i in order], [labels[i] for i in order], tie=tie)
        assert shown == rule_reward(scores, labels, tie=tie)


def test_rft_filters() -> None:
    assert keep_rft([True, False, True]) == [True, False, True]
    assert keep_rft([True, True, True]) == [False, False, False]
    assert keep_rft([False, False]) == [False, False]
    assert keep_rft([True]) == [False]
    assert keep_rft([]) == []
    assert too_easy([True] * 3) and not too_easy([True, False]) and not too_easy([])
    assert keep_hinted(True) and not keep_hinted(False)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ((8, 9), (1, 1), "2 best responses"),
        ((8, 9), (1, 0, 0), "2 scores for 3 labels"),
        ((8, 9), (), "labels is empty"),
        (None, (1, float("nan")), "NaN"),
    ],
)
def test_impossible_ground_truth_raises(scores, labels, message: str) -> None:
    for call in (is_correct, rule_reward, lambda s, r: rule_reward(s, r, tie="expected")):
        with pytest.raises(ValueError, match=message):
            call(scores, labels)


def test_unknown_tie_rule_raises() -> None:
    with pytest.raises(ValueError, match="'paper' or 'expected'"):
        rule_reward((8, 9), (1, 0), tie="soft")  # pyright: ignore[reportArgumentType]


def test_a_critique_is_decisive_where_one_response_alone_has_the_top_score():
    assert decisive((3.0, 7.0, 3.0))
    assert not decisive((7.0, 3.0, 7.0))
    assert decisive((3.0,), threshold=5.0) and not decisive((5.0,), threshold=5.0)
    assert decisive((5.0,))
