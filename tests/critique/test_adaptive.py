"""Adaptive k against brute force: what could still come, and how often it does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.critique import beyond_reach, change_probability, decided, vote

SCORES = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3))), min_size=1, max_size=6
)


@given(SCORES, st.integers(0, 2))
def test_beyond_reach_is_what_no_continuation_can_change(scores, remaining):
    """Every continuation with scores 1 to 3, all of them tried."""
    found = beyond_reach(scores, remaining, span=2.0)
    if not any(scores):
        assert not found
        return
    now = vote(scores).best
    pairs = list(itertools.product(range(1, 4), repeat=2))
    futures = [vote([*scores, *more]).best for more in itertools.product(pairs, repeat=remaining)]
    assert found == (len(now) == 1 and all(best == now for best in futures))


def test_three_responses_are_each_a_rival():
    assert not beyond_reach([(9, 1, 5)], 1)
    assert beyond_reach([(9, 1, 2)] * 2, 1)
    assert not beyond_reach([(9, 1, 5)] * 2, 1)
    assert not beyond_reach([(9,)] * 3, 0)


def simulate(bound: float, k: int, seed: int) -> tuple[float, float, float]:
    """Share of items stopped before k, samples saved, verdicts that k samples would have changed.

    Items are pairs of random distributions over the scores 1 to 10, from clear to even.
    """
    rng = np.random.default_rng(seed)
    stopped = saved = changed = 0
    items = 400
    for _ in range(items):
        centre = rng.normal(0, 1.5)
        a = np.clip(np.round(rng.normal(5.5 + centre / 2, 2, k)), 1, 10)
        b = np.clip(np.round(rng.normal(5.5 - centre / 2, 2, k)), 1, 10)
        scores = list(zip(a.tolist(), b.tolist(), strict=True))
        for m in range(1, k):
            if decided(scores[:m], k - m, bound):
                stopped += 1
                saved += k - m
                changed += vote(scores[:m]).best != vote(scores).best
                break
    return stopped / items, saved / (items * k), changed / items


@pytest.mark.parametrize("bound", [0.0, 0.01, 0.05])
def test_verdicts_change_as_rarely_as_stated(bound):
    runs = np.asarray([simulate(bound, 32, seed) for seed in range(3)]).mean(axis=0)
    stopped, saved, changed = runs
    # An item is looked at after every sample, so its chances add up over looks; still of this size.
    assert changed <= max(2.5 * bound, 1e-9)
    assert stopped > 0.5
    assert saved > {0.0: 0.02, 0.01: 0.3, 0.05: 0.5}[bound]


def test_the_probability_is_the_frequency():
    """Of a change within the rest, for items whose samples so far are typical of them."""
    rng = np.random.default_rng(0)
    stated, seen = [], []
    for _ in range(6000):
        centre = rng.normal(0, 3.0)  # wide against the spread of a mean of 8: nothing to shrink to
        margins = rng.normal(centre, 2.0, 24)
        scores = [(5.0 + m / 2, 5.0 - m / 2) for m in margins]
        stated.append(change_probability(scores[:8], 16))
        seen.append(vote(scores[:8]).best != vote(scores).best)
    stated, seen = np.asarray(stated), np.asarray(seen)
    for low, high in [(0.0, 0.02), (0.02, 0.1), (0.1, 0.25), (0.25, 0.5)]:
        chosen = (stated >= low) & (stated < high)
        assert chosen.sum() > 100
        assert abs(seen[chosen].mean() - stated[chosen].mean()) < 0.05


def test_what_is_never_decided():
    assert change_probability([(9, 1)], 3) == 1.0
    assert change_probability([(9, 1), (1, 9)], 3) == 1.0  # a tie
    assert change_probability([(9,)] * 8, 3) == 1.0
    assert change_probability([(9, 1)] * 2, 0) == 0.0
    assert not decided([None] * 8, 8, 0.5)
    assert not decided([(9, 1)] * 3, 20, 0.5)  # fewer than four
    assert decided([(9, 1)] * 4, 20, 0.05) and not decided([(9, 1)] * 4, 20, 0.0)
    assert decided([(10, 1)] * 4, 3, 0.0)
