"""Methods and rates, against answers computed by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from grm_jax.critique.adaptive import decided
from grm_jax.critique.voting import credit, vote
from grm_jax.data.rows import DataError
from grm_jax.scoring.aggregate import aggregate, default_ks, is_uneven, subsets
from grm_jax.scoring.replay import decided_after
from grm_jax.scoring.rules import Rules


def credits(found, records, rules=Rules()) -> dict[str, dict[str, float]]:
    return {method.name: method.credits(records, rules) for method in found.methods}


def test_default_ks():
    assert default_ks(0) == default_ks(1) == ()
    assert default_ks(2) == (2,)
    assert default_ks(6) == (2, 4, 6)
    assert default_ks(32) == (2, 4, 8, 16, 32)


def test_every_method_by_hand(record, row):
    # Best is response 0. Singles: right, wrong, tie, right -> (1 + 0 + .5 + 1) / 4.
    # Blocks of 2: (9+4, 5+8) = tie 13:13 -> .5; (6+7, 6+3) -> 1; mean .75. Block of 4: 26:22 -> 1.
    rows = [
        row("a", -1, [4, 5]),
        row("a", 0, [9, 5]),
        row("a", 1, [4, 8]),
        row("a", 2, [6, 6]),
        row("a", 3, [7, 3]),
    ]
    # Reshuffled among 0, 2 and among 1, 3: (2, 1): 10:14 -> 0, (0, 3): 16:8 -> 1; and so on.
    records = [record("a")]
    found = aggregate(records, rows)
    mine = credits(found, records)
    pairs = {(0, 1): 0.5, (2, 3): 1.0, (1, 2): 0.0, (0, 3): 1.0}
    drawn = [pairs[tuple(pair)] for pair in subsets(4, 2, 2).tolist()]
    assert drawn[:2] == [0.5, 1.0] and len(drawn) == 16
    assert mine == {
        "greedy": {"a": 0.0},
        "sample@1": {"a": 0.625},
        "vote@2": {"a": pytest.approx(sum(drawn) / 16)},
        "vote@4": {"a": 1.0},
    }
    undecided = [float(method.votes.undecided(0.5).mean()) for method in found.methods]
    assert undecided == [0, 0.25, drawn.count(0.5) / 16, 0]
    strict = credits(found, records, Rules(ties="wrong"))
    assert strict["sample@1"] == {"a": 0.5}
    assert strict["vote@2"] == {"a": pytest.approx(drawn.count(1.0) / 16)}


def test_guided_votes_by_hand(record, row):
    # k = 4, half kept. Ranked by meta: samples 1 and 2 -> 4+6 : 8+6 -> wrong; all four: right.
    # k = 2: the blocks are (0, 1), kept 1: wrong; (2, 3), kept 2: tie; (1, 2): 1; (0, 3): 3, right.
    rows = [
        row("a", 0, [9, 5], meta=-1.0),
        row("a", 1, [4, 8], meta=2.0),
        row("a", 2, [6, 6], meta=1.5),
        row("a", 3, [7, 3], meta=1.0),
    ]
    records = [record("a")]
    found = credits(aggregate(records, rows), records)
    assert found["vote@4"] == {"a": 1.0}
    assert found["meta@4"] == {"a": 0.0}
    pairs = {(0, 1): 0.0, (2, 3): 0.5, (1, 2): 0.0, (0, 3): 1.0}
    drawn = [pairs[tuple(pair)] for pair in subsets(4, 2, 2).tolist()]
    assert found["meta@2"] == {"a": pytest.approx(sum(drawn) / 16)}
    # One kept: sample 1, wrong. Three: 17:17, a tie.
    more = credits(aggregate(records, rows, k_meta=[1, 3]), records)
    assert more["meta@4/1"] == {"a": 0.0}
    assert more["meta@4/3"] == {"a": 0.5}
    assert "meta@2/1" in more and "meta@2/3" not in more


def test_blocks_come_first_and_orders_stay_balanced():
    # 3 responses: samples i and j saw the same order if i = j mod 3; a vote of 6 has each twice.
    plan = subsets(32, 6, 3)
    assert plan[:5].tolist() == [list(range(6 * i, 6 * i + 6)) for i in range(5)]
    assert len(plan) == 20  # four rounds of five: at least sixteen votes
    for vote_of in plan:
        assert len(set(vote_of.tolist())) == 6
        assert np.bincount(vote_of % 3, minlength=3).tolist() == [2, 2, 2]
    assert subsets(8, 8, 2).tolist() == [list(range(8))]
    assert subsets(4, 1, 2).tolist() == [[0], [1], [2], [3]]
    assert subsets(32, 8, 2).tolist() == subsets(32, 8, 2).tolist()


def test_a_rest_is_left_out(record, row):
    # k = 2 of 5 samples: (0, 1) right, (2, 3) wrong; sample 4 alone is not used. Unsorted.
    scores = [[9, 1], [9, 1], [1, 9], [1, 9], [9, 1]]
    rows = [row("a", i, scores[i]) for i in (4, 2, 0, 3, 1)]
    records = [record("a")]
    found = aggregate(records, rows, ks=[2, 5])
    first = found.method("vote@2").votes.scores()[0][:2]
    assert first.tolist() == [[9, 1], [1, 9]]
    assert credits(found, records)["vote@5"] == {"a": 1.0}  # 29 : 21
    assert credits(found, records)["sample@1"] == {"a": pytest.approx(0.6)}


def test_failed_samples_are_left_out_and_counted(record, row):
    rows = [
        row("a", 0, None, finish_reason="length", tokens=10),
        row("a", 1, [9, 2], tokens=4),
        row("b", 0, None, tokens=4),
        row("b", 1, None, finish_reason="length", tokens=10),
    ]
    records = [record("a"), record("b")]
    found = aggregate(records, rows)
    assert credits(found, records) == {
        "sample@1": {"a": 0.5, "b": 0.0},
        "vote@2": {"a": 1.0, "b": 0.0},  # a is judged by its one usable sample
    }
    assert found.unjudged == ("b",)
    assert found.method("sample@1").votes.unjudged().mean() == 0.75
    assert found.method("vote@2").votes.unjudged().mean() == 0.5
    for rule, value in (("half", 0.5), ("chance", 0.5)):
        assert credits(found, records, Rules(unparsed=rule))["vote@2"] == {"a": 1.0, "b": value}
    rates = found.rates["sampled"]
    assert (rates.samples, rates.failed, rates.truncated, rates.tokens) == (4, 0.75, 0.5, 7)
    assert rates.failures == {"no_box": 0.75}


def test_rates_tell_greedy_from_sampled_and_name_kinds(record):
    from grm_jax.data.critiques import Critique

    rows = [
        Critique("a", -1, (0, 1), None, "wrong_count", "stop"),
        Critique("a", 0, (0, 1), None, "truncated", "length"),
        Critique("a", 1, (0, 1), (1.0, 2.0), None, "length"),
    ]
    rates = aggregate([record("a")], rows).rates
    assert rates["greedy"].failures == {"wrong_count": 1.0}
    assert rates["sampled"].failures == {"truncated": 0.5}
    assert rates["sampled"].truncated == 1.0


def test_a_record_judged_greedily_alone_is_not_unjudged(record, row):
    rows = [row("a", -1, [2, 1]), row("a", 0, None)]
    assert aggregate([record("a")], rows).unjudged == ()


def test_adaptive_votes_are_over_all_of_a_records_samples(record, row):
    # a: 9+4 : 5+8 = tie; b: one sample, right; c: samples 0 and 2 of what would have been more.
    rows = [
        row("a", 0, [9, 5]),
        row("a", 1, [4, 8]),
        row("b", 0, [9, 5]),
        row("c", 0, [1, 2]),
        row("c", 2, [3, 9]),
    ]
    records = [record("a"), record("b"), record("c")]
    found = aggregate(records, rows, uneven=True)
    assert credits(found, records) == {
        "sample@1": {"a": 1.0, "b": 1.0, "c": 0.0},  # every record has one
        "adaptive@2": {"a": 0.5, "b": 1.0, "c": 0.0},
    }
    assert found.method("adaptive@2").samples == pytest.approx(5 / 3)
    assert found.rates["sampled"].samples == 5
    assert is_uneven(rows) and not is_uneven(rows[:2])
    with pytest.raises(DataError, match="draw the same samples of every record"):
        aggregate(records, rows)
    with pytest.raises(DataError, match="each once"):
        aggregate(records, [*rows, row("b", 0, [9, 5])], uneven=True)


def test_single_responses(record, row):
    # Mean of (1, 0) is on the threshold: a toss-up, and strictly wrong.
    records = [record("good", 1, label=1.0), record("bad", 1, label=0.0)]
    rows = [row(id, i, [score]) for id in ("good", "bad") for i, score in enumerate([1, 0])]
    found = aggregate(records, rows)
    assert credits(found, records) == {
        "sample@1": {"good": 0.5, "bad": 0.5},
        "vote@2": {"good": 0.5, "bad": 0.5},
    }
    assert found.method("vote@2").votes.undecided(0.5).all()
    strict, low = Rules(ties="wrong"), Rules(threshold=0.4)
    assert credits(found, records, strict)["vote@2"] == {"good": 0, "bad": 0}
    assert credits(found, records, low)["vote@2"] == {"good": 1, "bad": 0}


def test_methods_agree_with_the_votes_they_stand_for(record, row):
    rng = random.Random(0)
    records = [record(f"r{i}", rng.choice([2, 3, 4]), best=rng.choice([0, 1])) for i in range(60)]
    rows = []
    for one in records:
        n = len(one.responses)
        for sample in range(8):
            scores = None if rng.random() < 0.2 else [rng.randint(1, 5) + 0.1 for _ in range(n)]
            rows.append(row(one.id, sample, scores, n, meta=rng.random()))
    found = aggregate(records, rows)
    mean = credits(found, records)
    for one in records:
        mine = sorted((r for r in rows if r.example_id == one.id), key=lambda r: r.sample)
        for k in (2, 4, 8):
            blocks = [[mine[i] for i in plan] for plan in subsets(8, k, len(one.labels))]
            plain = [credit(vote([r.scores for r in b]), one.labels) for b in blocks]
            guided = [
                credit(vote([r.scores for r in b], meta=[r.meta for r in b]), one.labels)
                for b in blocks
            ]
            for name, wanted in ((f"vote@{k}", plain), (f"meta@{k}", guided)):
                assert mean[name][one.id] == pytest.approx(sum(wanted) / len(wanted))


def test_hybrid_votes_are_the_same_votes_plus_the_scalar_scores(record, row):
    rng = np.random.default_rng(1)
    records = [record(f"r{i}", int(rng.integers(1, 5))) for i in range(40)]
    rows, scalar = [], {}
    for one in records:
        n = len(one.responses)
        scalar[one.id] = rng.normal(size=n).tolist()
        for sample in range(8):
            failed = rng.random() < 0.2
            scores = None if failed else rng.integers(1, 11, n).tolist()
            rows.append(row(one.id, sample, scores, n))
    plain = aggregate(records, rows)
    found = aggregate(records, rows, scalar={**scalar, "other": (1.0,)}, scalar_weight=0.7)
    assert [m.name for m in found.methods] == [
        "sample@1", "vote@2", "vote@4", "vote@8", "hybrid@2", "hybrid@4", "hybrid@8",
        "adaptive@8", "scalar",
    ]  # fmt: skip
    alone = found.method("scalar")
    assert alone.votes.count == 1 and alone.samples == 0
    for one, scores in zip(records, alone.votes.scores(), strict=True):
        assert scores.tolist() == [scalar[one.id]]
    for k in (2, 4, 8):
        votes = plain.method(f"vote@{k}").votes.scores()
        hybrids = found.method(f"hybrid@{k}").votes.scores()
        for one, vote_means, hybrid in zip(records, votes, hybrids, strict=True):
            n = len(one.responses)
            mine = [r for r in rows if r.example_id == one.id]
            for s, plan in enumerate(subsets(8, k, n)):
                drawn = [mine[i].scores for i in plan if mine[i].scores is not None]
                if not drawn:
                    assert np.isnan(hybrid[s]).all(), "a scalar RM does not stand in for a vote"
                    continue
                mean, other = np.mean(drawn, axis=0), np.array(scalar[one.id])
                np.testing.assert_allclose(mean, vote_means[s])
                wanted = mean - mean.mean() + 0.7 * (other - other.mean())
                np.testing.assert_allclose(hybrid[s], wanted if n > 1 else mean, atol=1e-8)
    # A large weight leaves the scalar RM's order, none the votes'.
    of = credits(aggregate(records, rows, scalar=scalar, scalar_weight=0.0), records)
    assert of["hybrid@8"] == pytest.approx(of["vote@8"])
    several = [one for one in records if len(one.responses) > 1]
    of = credits(
        aggregate(records, rows, scalar=scalar, scalar_weight=1e6),
        records,
        Rules(unparsed="excluded"),
    )
    judged = [one.id for one in several if not np.isnan(of["hybrid@8"][one.id])]
    assert [of["hybrid@8"][id] for id in judged] == [of["scalar"][id] for id in judged]


def test_a_scalar_rm_compares_single_responses_with_its_own_threshold(record, row):
    records = [record("good", 1, label=1.0), record("bad", 1, label=0.0), record("two")]
    rows = [row(r.id, 0, [0.0] * len(r.responses), len(r.responses)) for r in records]
    scalar = {"good": [-1.0], "bad": [-3.0], "two": [-5.0, -6.0]}
    for threshold, wanted in ((-2.0, [1, 1, 1]), (-0.5, [0, 1, 1]), (-1.0, [0.5, 1, 1])):
        found = aggregate(records, rows, ks=[1], scalar=scalar, scalar_threshold=threshold)
        mine = credits(found, records)
        assert list(mine["scalar"].values()) == wanted
        assert mine["hybrid@1"] == {"good": 0, "bad": 1, "two": 1}, "singles by the vote alone"
    mine = credits(aggregate(records, rows, scalar=scalar), records)["scalar"]
    assert np.isnan(mine["good"]) and np.isnan(mine["bad"]) and mine["two"] == 1


def test_scalar_scores_of_other_data_are_named(record, row):
    records = [record("a"), record("b")]
    rows = [row(id, 0, [2, 1]) for id in ("a", "b")]
    for scalar, words in (
        ({"a": (1.0, 2.0)}, "1 of 2 records have no scores of the scalar RM, the first is 'b'"),
        ({"a": (1.0, 2.0), "b": (1.0,)}, "the scores of 'b' are .1.0,., it has 2 responses"),
        ({"a": (1.0, float("nan")), "b": (1.0, 2.0)}, "one finite number a response"),
    ):
        with pytest.raises(DataError, match=words):
            aggregate(records, rows, scalar=scalar)


def test_adaptive_votes_stop_where_the_rule_says():
    rng = np.random.default_rng(0)
    for n in (2, 3):
        scores = rng.integers(1, 11, (200, 16, n)) + np.array([1.5] + [0] * (n - 1))
        scores[rng.random((200, 16)) < 0.1] = np.nan
        for bound in (0.0, 0.01, 0.2):
            wanted = []
            for record in scores:
                seen = [None if np.isnan(s[0]) else tuple(s) for s in record]
                stops = (m for m in range(1, 16) if decided(seen[:m], 16 - m, bound))
                wanted.append(next(stops, 16))
            assert decided_after(scores, bound, 1, 10).tolist() == wanted
            assert bound == 0 or len(set(wanted)) > 4
    # Single ones against the middle of their scale, as `Critic` does.
    scores = rng.integers(1, 11, (100, 16, 1)).astype(float)
    for bound in (0.0, 0.05):
        wanted = []
        for record in scores:
            seen = [(s[0], 5.5) for s in record]
            stops = (m for m in range(1, 16) if decided(seen[:m], 16 - m, bound, span=4.5, width=9))
            wanted.append(next(stops, 16))
        assert decided_after(scores, bound, 1, 10).tolist() == wanted
    # Margins of one point: nothing is certain before the end comes near.
    close = np.tile(np.array([6.0, 5.0]), (1, 8, 1))
    assert decided_after(close, 0.0, 1, 10).tolist() == [8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda records, rows: (records, []), "no samples"),
        (lambda records, rows: ([], rows), "no records"),
        (lambda records, rows: (records * 2, rows), "the same id"),
        (lambda records, rows: (records, rows[:-1]), "'b' has 1 samples .0., others have 2"),
        (lambda records, rows: (records, rows[:2]), "1 of 2 records have no sample, .* 'b'"),
        (lambda records, rows: (records[:1], rows), "'b' is none of the 1 records"),
        (lambda records, rows: (records, [*rows, rows[0]]), "others have 3"),
    ],
)
def test_faults_are_named(record, row, change, words):
    records = [record("a"), record("b")]
    rows = [row(id, sample, [2, 1]) for id in ("a", "b") for sample in (0, 1)]
    with pytest.raises(DataError, match=words):
        aggregate(*change(records, rows))


def test_more_faults_are_named(record, row):
    with pytest.raises(DataError, match="saw 3 responses, the record has 2"):
        aggregate([record("a")], [row("a", 0, [1, 2, 3])])
    with pytest.raises(DataError, match="1 of 2 usable samples have no meta score"):
        aggregate([record("a")], [row("a", 0, [1, 2], meta=1.0), row("a", 1, [1, 2])])
    with pytest.raises(DataError, match="2 greedy ones"):
        aggregate([record("a")], [row("a", -1, [1, 2]), row("a", -1, [1, 2])])
    with pytest.raises(ValueError, match="vote@4 needs 4 samples a record, there are 1"):
        aggregate([record("a")], [row("a", 0, [1, 2])], ks=[4])
    with pytest.raises(ValueError, match="k_meta is 0"):
        aggregate([record("a")], [row("a", 0, [1, 2])], k_meta=[0])
    with pytest.raises(KeyError, match=r"no method 'vote@9'; there are sample@1"):
        aggregate([record("a")], [row("a", 0, [1, 2])]).method("vote@9")


def test_a_failed_sample_needs_no_meta_score(record, row):
    rows = [row("a", 0, [2, 1], meta=0.3), row("a", 1, None)]
    records = [record("a")]
    assert credits(aggregate(records, rows), records)["meta@2"] == {"a": 1.0}
