"""Intervals, paired differences and ROC-AUC."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from grm_jax.scoring.figures import Figure, Term
from grm_jax.scoring.statistics import (
    bootstrap,
    mean_auc_within,
    mean_interval,
    paired_difference,
    proportion_interval,
    roc_auc,
)


def test_interval_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(1).choice([0.0, 0.5, 1.0], 400, p=[0.3, 0.1, 0.6])
    ours = mean_interval(values, resamples=8000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=8000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.003)
    assert ours.high == pytest.approx(theirs.high, abs=0.003)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, covered = 300, 0
    for seed in range(trials):
        found = mean_interval(rng.random(150) < 0.7, resamples=400, seed=seed)
        covered += found.low <= 0.7 <= found.high
    # 95% of 300 is 285 +- 3.8; the percentile interval is slightly too narrow.
    assert 0.90 <= covered / trials <= 0.985


def test_clusters_cover_where_independence_does_not():
    # 60 prompts, each repeated five times with the same outcome: 60 facts, not 300.
    rng = np.random.default_rng(0)
    trials, clustered, naive = 150, 0, 0
    clusters = np.repeat(np.arange(60), 5).tolist()
    for seed in range(trials):
        values = np.repeat(rng.random(60) < 0.5, 5)
        wide = mean_interval(values, clusters=clusters, resamples=300, seed=seed)
        tight = mean_interval(values, resamples=300, seed=seed)
        clustered += wide.low <= 0.5 <= wide.high
        naive += tight.low <= 0.5 <= tight.high
    assert clustered / trials >= 0.88
    assert naive / trials <= 0.75


def test_same_seed_same_interval():
    values = np.arange(50) / 50
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_chunks_do_not_change_the_number_of_resamples(monkeypatch):
    monkeypatch.setattr("grm_jax.scoring.statistics._CHUNK", 70)
    figure = Figure("g", "f", (Term(1.0, np.arange(10)),))
    _, drawn = bootstrap([figure.bind({"credit": np.ones((10, 2))})] * 2, 10)
    assert drawn.shape == (2, 2000)
    assert (drawn == 1).all()


def test_all_right_is_no_certainty():
    # Wilson, 20 of 20 at 95%: low = 1 / (1 + z^2 / 20) = 20 / 23.8415.
    found = mean_interval(np.ones(20))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(20 / 23.8415, abs=1e-5)
    # Of clusters, each counts once.
    assert mean_interval(np.ones(20), clusters=[0, 1, 2, 3, 4] * 4).low == pytest.approx(
        5 / 8.8415, abs=1e-5
    )


@pytest.mark.parametrize("values", [np.ones(40), np.arange(40) % 2, np.arange(40) / 40])
def test_below_five_clusters_nothing_is_said_of_uncertainty(values):
    for count in (1, 4, 5, 40):
        clusters = (np.arange(40) % count).tolist()
        known = count >= 5
        found = mean_interval(values, clusters=clusters, resamples=50)
        assert found.value == pytest.approx(values.mean())
        assert [bound is not None for bound in (found.low, found.high)] == [known] * 2
        assert (found.bounds is not None) == known
        apart = paired_difference(values, values[::-1], clusters=clusters, resamples=50)
        shown = (apart.low, apart.high, apart.p_value)
        assert [bound is not None for bound in shown] == [known] * 3
    few = mean_interval(values[:4], resamples=50)  # without labels each record is one
    assert few.bounds is None and mean_interval(values[:5], resamples=50).bounds is not None


def test_proportion_interval_agrees_with_scipy():
    for k, n in [(0, 7), (3, 7), (7, 7), (40, 46)]:
        ours = proportion_interval(k / n, n)
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    base = rng.random(300)
    better = base + 0.01 + 0.001 * rng.standard_normal(300)
    found = paired_difference(better, base)
    assert found.value == pytest.approx(0.01, abs=0.001)
    assert 0.009 < found.low < found.high < 0.011  # unpaired it would be +-0.05
    assert found.p_value == pytest.approx(2 / 2001)
    mirrored = paired_difference(base, better)
    assert (mirrored.value, mirrored.low) == pytest.approx((-found.value, -found.high))


def test_paired_difference_of_the_same_is_no_difference():
    values = np.random.default_rng(0).random(40)
    found = paired_difference(values, values)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_p_value_is_about_a_t_tests():
    rng = np.random.default_rng(5)
    a = rng.random(200) + 0.05
    b = rng.random(200)
    found = paired_difference(a, b, resamples=20_000)
    expected = stats.ttest_rel(a, b).pvalue
    assert 0.01 < expected < 0.5
    assert found.p_value == pytest.approx(expected, rel=0.2)


def test_paired_difference_of_a_weighted_figure():
    # Two strata of 1 and 3 records with equal weight: the single record counts three times as much.
    figure = Figure("overall", "mean", (Term(0.5, np.array([0])), Term(0.5, np.array([1, 2, 3]))))
    ours, theirs = (
        figure.bind({"credit": np.array(values, float)[:, None]})
        for values in ([1, 0, 0, 1], [0, 0, 1, 0])
    )
    found = paired_difference(ours, theirs, records=4)
    assert found.value == pytest.approx(0.5 * 1 + 0.5 * 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([]), "no records"),
        (lambda: mean_interval([0.5, math.nan]), "NaN"),
        (lambda: mean_interval([0.5], resamples=0), "resamples is 0"),
        (lambda: mean_interval([0.5, 1], clusters=["a"]), "1 clusters for 2 records"),
        (lambda: paired_difference([1], [1, 0]), "the same records"),
        (lambda: roc_auc([1, 2], [1]), "one label a score"),
        (lambda: roc_auc([1, math.inf], [1, 0]), "failed samples"),
        (lambda: roc_auc([1, 2], [1, 2]), "0 and 1"),
        (lambda: mean_auc_within([1, 2], [1, 0], ["a"]), "1 items for 2"),
        (lambda: proportion_interval(0.5, 0), "one trial"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_auc_by_hand():
    # Pairs (positive, negative): 3>1, 3>2, 2>1, 2=2 -> 3.5 of 4.
    assert roc_auc([3, 2, 1, 2], [1, 1, 0, 0]) == 3.5 / 4
    assert roc_auc([1, 1, 1], [True, False, False]) == 0.5
    assert math.isnan(roc_auc([1, 2], [1, 1]))


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 500)  # many ties
    labels = rng.random(500) < scores / 10
    pairs = np.sign(scores[labels][:, None] - scores[~labels])  # a tie counts as half
    assert roc_auc(scores, labels) == pytest.approx(np.mean(0.5 + 0.5 * pairs))


def test_auc_within_items_by_hand():
    # a: 2 > 1 -> 1.  b: 5 = 5 -> 0.5.  c: one label only -> not counted.
    scores = [2, 5, 9, 1, 5, 8]
    labels = [1, 1, 1, 0, 0, 1]
    items = ["a", "b", "c", "a", "b", "c"]
    assert mean_auc_within(scores, labels, items) == 0.75
    assert math.isnan(mean_auc_within([1, 2], [1, 1], ["a", "a"]))


def test_auc_within_items_ignores_how_easy_they_are():
    # The scores tell only the item apart: 0.5 within, far above over all.
    scores, labels, items = [], [], []
    for item, share in enumerate([0.1, 0.9]):
        for i in range(10):
            scores.append(share)
            labels.append(float(i < 10 * share))
            items.append(item)
    assert mean_auc_within(scores, labels, items) == 0.5
    assert roc_auc(scores, labels) == pytest.approx(0.9)
