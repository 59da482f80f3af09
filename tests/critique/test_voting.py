"""Orders, votes, guided votes, credit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.critique import (
    credit,
    majority,
    mean_scores,
    orders,
    rule_reward,
    shuffle,
    unshuffle,
    vote,
)
from grm_jax.critique.voting import hybrid_scores

NAN = float("nan")


def test_hybrid_scores_are_two_centred_scores_added() -> None:
    rng = np.random.default_rng(0)
    means, scalar = rng.uniform(1, 10, (5, 3)), rng.normal(size=(5, 3))
    wanted = means - means.mean(1, keepdims=True)
    wanted += 2 * (scalar - scalar.mean(1, keepdims=True))
    np.testing.assert_allclose(np.stack(hybrid_scores(means.T, scalar.T, 2.0), 1), wanted)
    one = hybrid_scores((6.0, 5.0, 1.0), (0.2, 0.4, 0.0))
    assert one == pytest.approx([2.0, 1.1, -3.1])  # 6 - 4 + (0.2 - 0.2) / 2, ...
    # Only differences count: neither side's level matters, and one response differs from none.
    assert hybrid_scores((106.0, 105.0, 101.0), (9.2, 9.4, 9.0)) == pytest.approx(one)
    assert hybrid_scores((7.0,), (3.0,)) == [0.0]


@given(st.integers(1, 6), st.integers(0, 20), st.integers())
def test_balanced_orders(n: int, k: int, seed: int) -> None:
    shown = orders(n, k, seed=seed)
    assert len(shown) == k
    assert len(set(shown)) == min(k, n)  # distinct prompts
    assert all(sorted(order) == list(range(n)) for order in shown)
    assert shown == orders(n, k + 3, seed=seed)[:k]
    for upto in range(1, k + 1):  # balanced at every length, so that sampling may stop early
        for place in range(n):
            count = Counter(order[place] for order in shown[:upto])
            times = [count[response] for response in range(n)]
            assert max(times) - min(times) <= (0 if upto % n == 0 else 1)
        shared = Counter(shown[:upto]).values()
        assert max(shared) - min(shared) <= 1


@given(st.integers(1, 6), st.integers(0, 20), st.integers())
def test_random_orders(n: int, k: int, seed: int) -> None:
    shown = orders(n, k, mode="random", seed=seed)
    assert shown == orders(n, k + 3, mode="random", seed=seed)[:k]
    assert all(sorted(order) == list(range(n)) for order in shown)


def test_orders_depend_on_the_seed() -> None:
    for mode in ("balanced", "random"):
        assert len({tuple(orders(6, 6, mode=mode, seed=seed)) for seed in range(20)}) > 15
    with pytest.raises(ValueError, match="n=0"):
        orders(0, 3, seed=0)
    with pytest.raises(ValueError, match="'balanced' or 'random'"):
        orders(2, 3, mode="latin", seed=0)  # pyright: ignore[reportArgumentType]


def test_orders_are_the_same_on_every_machine() -> None:
    assert orders(3, 4, seed=0) == [(1, 2, 0), (2, 0, 1), (0, 1, 2), (1, 2, 0)]
    assert orders(3, 2, mode="random", seed=1) == [(0, 2, 1), (0, 1, 2)]


@given(st.permutations(range(5)))
def test_unshuffle_undoes_shuffle(order: list[int]) -> None:
    responses = ("a", "b", "c", "d", "e")
    assert unshuffle(shuffle(responses, order), order) == responses
    assert unshuffle(None, order) is None


def test_wrong_order_raises() -> None:
    for order in [(0, 0), (1, 2), (0,)]:
        with pytest.raises(ValueError, match="not an order of 2 responses"):
            unshuffle((8, 9), order)


def test_the_papers_example() -> None:
    # Table 17: samples 2 and 3 saw the responses in swapped order.
    raw = [((8, 8), (0, 1)), ((9, 5), (1, 0)), ((10, 7), (1, 0))]
    verdict = vote([unshuffle(scores, order) for scores, order in raw])
    assert verdict.totals == (20, 27)
    assert verdict.best == (1,)
    assert verdict.mean == (20 / 3, 9)
    assert verdict.agreement == 1  # the tied first sample has the winner among its best
    assert (verdict.used, verdict.failed, verdict.left_out, verdict.tie) == (3, 0, 0, False)


def test_failed_samples_are_left_out_and_counted() -> None:
    verdict = vote([None, (8, 6), None, (5, 7)])
    assert verdict.totals == (13, 13)
    assert verdict.best == (0, 1) and verdict.tie
    assert (verdict.kept, verdict.used, verdict.failed) == ((1, 3), 2, 2)
    assert verdict.agreement == 0.5
    assert {verdict.pick(seed) for seed in range(20)} == {0, 1}
    empty = vote([None, None])
    assert (empty.totals, empty.best, empty.failed, empty.agreement) == ((), (), 2, None)
    assert empty.pick(0) is None
    assert credit(empty, (1, 0)) == 0


def test_meta_guided_vote() -> None:
    scores = [(9, 1), (1, 9), None, (1, 9), (9, 1)]
    verdict = vote(scores, meta=[0.5, 3.0, NAN, 0.5, 0.5])
    # k // 2 = 2: sample 1, then the earliest of the three equal ones.
    assert verdict.kept == (0, 1)
    assert (verdict.used, verdict.left_out, verdict.failed) == (2, 2, 1)
    assert vote(scores, meta=[0, 3, None, 2, 1], k_meta=1).totals == (1, 9)
    # Fewer parsed than k_meta: all of those.
    assert vote(scores, meta=[0, 3, None, 2, 1], k_meta=5) == vote(scores)
    # k = 1 keeps 1, so that guided and plain voting start at the same point.
    assert vote([(9, 1)], meta=[-15.8]) == vote([(9, 1)])
    assert vote([None, None], meta=[1, 2]).best == ()
    assert vote([(9, 1), (1, 9)], meta=[float("-inf"), 0.0]).totals == (1, 9)


def test_vote_refuses_what_is_not_a_sample() -> None:
    cases = [
        (([],), {}, "scores is empty"),
        (([(8, 9), (8,)],), {}, "sample 1 has 1 scores, sample 0 has 2"),
        (([()],), {}, "sample 0 has 0 scores"),
        (([(8, NAN)],), {}, "a failed sample is None"),
        (([(8, 9)],), {"k_meta": 1}, "k_meta without meta"),
        (([(8, 9)],), {"meta": [1, 2]}, "2 meta scores for 1 samples"),
        (([(8, 9)],), {"meta": [NAN]}, r"meta\[0\] is nan"),
        (([(8, 9)],), {"meta": [None]}, r"meta\[0\] is None"),
        (([(8, 9)],), {"meta": [1], "k_meta": 2}, r"k_meta is 2 .* 1\.\.1"),
        (([(8, 9)],), {"meta": [1], "k_meta": 0}, r"k_meta is 0"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            vote(*args, **kwargs)


@st.composite
def samples(draw, low: int = 2, high: int = 4):
    n = draw(st.integers(low, high))
    # Tenths: their plain float sums depend on the order, which must not decide a tie.
    row = st.lists(st.integers(10, 50).map(lambda x: x / 10), min_size=n, max_size=n)
    rows = draw(st.lists(st.one_of(st.none(), row.map(tuple)), min_size=1, max_size=8))
    return n, rows


@given(samples(), st.randoms())
def test_voting_is_equivariant_under_reordering_the_responses(item, random) -> None:
    n, rows = item
    order = random.sample(range(n), n)
    verdict = vote(rows)
    shown = vote([None if row is None else tuple(shuffle(row, order)) for row in rows])
    assert sorted(order[place] for place in shown.best) == list(verdict.best)
    assert shown.agreement == pytest.approx(verdict.agreement)
    if verdict.totals:
        assert unshuffle(shown.totals, order) == verdict.totals


@given(samples(), st.randoms())
def test_voting_does_not_depend_on_the_order_of_samples(item, random) -> None:
    _, rows = item
    verdict, mixed = vote(rows), vote(random.sample(rows, len(rows)))
    assert (verdict.totals, verdict.best, verdict.failed) == (
        mixed.totals,
        mixed.best,
        mixed.failed,
    )


@given(samples(), st.data())
def test_guided_vote_is_the_vote_of_the_kept_samples(item, data) -> None:
    _, rows = item
    meta = data.draw(st.lists(st.floats(-20, 20), min_size=len(rows), max_size=len(rows)))
    k_meta = data.draw(st.integers(1, len(rows)))
    verdict = vote(rows, meta=meta, k_meta=k_meta)
    parsed = [index for index, row in enumerate(rows) if row is not None]
    assert verdict.used == min(k_meta, len(parsed))
    assert verdict.used + verdict.left_out + verdict.failed == len(rows)
    dropped = set(parsed) - set(verdict.kept)
    assert all(meta[kept] >= meta[index] for kept in verdict.kept for index in dropped)
    if parsed:
        assert verdict.totals == vote([rows[index] for index in verdict.kept]).totals


@given(samples(), st.integers(0, 3))
def test_credit_of_one_sample_is_its_expected_reward(item, best: int) -> None:
    n, rows = item
    labels = [float(index == best % n) for index in range(n)]
    for row in rows:
        expected = rule_reward(row, labels, tie="expected")
        assert 2 * credit(vote([row]), labels) - 1 == pytest.approx(expected)


def test_credit() -> None:
    assert credit(vote([(8, 9)]), (0, 1)) == 1
    assert credit(vote([(8, 9)]), (1, 0)) == 0
    assert credit(vote([(9, 9, 8)]), (1, 0, 0)) == 0.5
    assert credit(vote([(9, 9, 8)]), (0, 0, 1)) == 0
    with pytest.raises(ValueError, match="about 2 responses, labels has 3"):
        credit(vote([(8, 9)]), (1, 0, 0))
    with pytest.raises(ValueError, match="2 best responses"):
        credit(vote([(8, 9)]), (1, 1))


def test_credit_of_a_single_response() -> None:
    assert credit(vote([(7,), None, (4,)]), (1,), 5) == 1
    assert credit(vote([(7,), (4,)]), (0,), 5) == 0
    assert credit(vote([(7,), (4,)]), (0,), 6) == 1
    assert credit(vote([(7,), (4,)]), (1,), 5.5) == 0.5
    assert credit(vote([(7,), (4,)], meta=[0, 1]), (0,), 5) == 1
    assert credit(vote([None]), (0,), 5) == credit(vote([None]), (1,), 5) == 0
    with pytest.raises(ValueError, match="give a threshold"):
        credit(vote([(7,)]), (1,))
    with pytest.raises(ValueError, match="correct \\(1\\) or incorrect \\(0\\)"):
        credit(vote([(7,)]), (8,), 5)
    with pytest.raises(ValueError, match="about 2 responses, labels has 1"):
        credit(vote([(7, 8)]), (1,), 5)


def test_semi_scalar_and_pairwise() -> None:
    assert mean_scores([(1.0, -2.0), None, (2.0, 0.0)]) == (1.5, -1.0)
    assert mean_scores([None]) == ()
    verdict = majority([0, 1, None, 1], 2)
    assert (verdict.totals, verdict.best, verdict.failed) == ((1, 2), (1,), 1)
    assert majority([0, 1], 2).tie
    with pytest.raises(ValueError, match=r"choices\[1\] is 2"):
        majority([0, 2], 2)
