"""The bias table, on judges whose bias is known."""

from __future__ import annotations

import dataclasses
import random

import pytest

from grm_jax.critique.voting import orders, unshuffle
from grm_jax.data.critiques import Critique
from grm_jax.scoring.bias import bias_table, identical
from grm_jax.scoring.items import as_item, swapped
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import Interval

RULES = Rules()


def judged(records, shown_scores, k=8):
    """Samples of a judge that sees the responses in balanced orders."""
    rng = random.Random(0)
    rows = []
    for record in records:
        n = len(record.responses)
        for sample, order in enumerate(orders(n, k, seed=rng.getrandbits(30))):
            shown = tuple(float(score) for score in shown_scores(record, order, rng))
            rows.append(Critique(record.id, sample, order, unshuffle(shown, order), None, "stop"))
    return rows


def table(records, rows, **more):
    credits = {record.id: 1.0 for record in records}
    found = bias_table(records, rows, credits, {}, more.pop("rules", RULES), **more)
    return {finding.name: finding for finding in found}


def test_a_judge_that_likes_the_first_place(record):
    records = [record(f"r{i}", 2 + i % 2) for i in range(60)]
    rows = judged(records, lambda r, order, rng: [5 if j == 0 else 1 for j in range(len(order))])
    found = table(records, rows)
    # 1/2 above chance of pairs, 2/3 of triples.
    first = found["first shown wins, above chance"]
    assert first.value.value == pytest.approx((1 / 2 + 2 / 3) / 2) and first.unbiased == 0
    assert found["flips: other order"].value.value == 1.0
    assert found["flips: same order (sampling)"].value.value == 0.0


def test_a_judge_that_looks_at_responses_only(record):
    records = [record(f"r{i}") for i in range(60)]
    rows = judged(records, lambda r, order, rng: [9 - i for i in order])
    found = table(records, rows)
    assert found["first shown wins, above chance"].value.value == 0.0
    assert found["flips: other order"].value.value == 0.0
    noisy = judged(records, lambda r, order, rng: [rng.random() for _ in order])
    found = table(records, noisy)
    for name in ("flips: other order", "flips: same order (sampling)"):
        assert found[name].value.low < 0.5 < found[name].value.high


def test_both_games_are_one_pair(record):
    # The response in the file's first place wins as shown first, in both games.
    pairs = [as_item(record(f"r{i}")) for i in range(20)]
    records = [game for pair in pairs for game in (pair, swapped(pair))]
    rows = [Critique(game.id, -1, (0, 1), (5.0, 1.0), None, "stop") for game in records]
    found = table(records, rows, rules=Rules(order="both"))
    assert found["flips: other order"].value.value == 1.0
    assert found["first shown wins, above chance"].records == 20
    # As the file has them only, quality and place can not be told apart.
    assert not table(pairs, rows[::2], rules=Rules(order="fixed"))


def test_games_of_a_pair_are_one_piece_of_evidence(record):
    pairs = [as_item(record(f"r{i}"), f"r{i}") for i in range(50)]
    pairs = [
        dataclasses.replace(pair, responses=("longer", "x") if i < 25 else ("a", "b"))
        for i, pair in enumerate(pairs)
    ]
    games = [game for pair in pairs for game in (pair, swapped(pair))]
    credits = {game.id: float(i // 2 % 2) for i, game in enumerate(games)}
    both = bias_table(games, [], credits, {}, RULES, clusters=[g.item for g in games])
    alone = bias_table(pairs, [], {p.id: credits[p.id] for p in pairs}, {}, RULES)
    naive = bias_table(games, [], credits, {}, RULES)
    wide, same, narrow = (t[0].value.high - t[0].value.low for t in (both, alone, naive))
    assert wide == pytest.approx(same, rel=0.15) and narrow < 0.85 * wide


def test_length(record):
    long = [dataclasses.replace(record(f"l{i}"), responses=("longer", "short")) for i in range(30)]
    brief = [dataclasses.replace(record(f"b{i}"), responses=("same", "equal")) for i in range(30)]
    credits = {r.id: 1.0 for r in long} | {r.id: float(i < 6) for i, r in enumerate(brief)}
    found = {f.name: f for f in bias_table([*long, *brief], [], credits, {}, RULES)}
    assert found["accuracy where the best is longest"].value.value == 1.0
    other = found["accuracy where it is not"]
    assert other.value.value == pytest.approx(0.2) and other.unbiased == 1.0


def test_identical_responses(record):
    records = [record(f"r{i}", 1 if i % 3 == 0 else 2, best=i % 2) for i in range(30)]
    probes = identical(records, 8)
    assert len(probes) == 8 and all(p.responses[0] == p.responses[1] for p in probes)
    assert all(p.id.endswith("#identical") for p in probes)
    rows = judged(probes, lambda r, order, rng: [6, 6] if r is probes[0] else [7, 6])
    found = table(records, [], probes=rows)
    assert found["identical responses tie"].value.value == pytest.approx(1 / 8)
    assert found["where not, first shown wins, above chance"].value.value == 0.5
    assert identical(records, 0) == [] and identical(records[:1], 4) == []


def test_spread_over_sections(record):
    sections = {"a": Interval(0.9, 0.85, 0.95), "b": Interval(0.6, 0.5, 0.7)}
    (found,) = bias_table([record("r")], [], {"r": 1.0}, sections, RULES)
    assert found.value.value == pytest.approx(0.3)
    assert (found.value.low, found.value.high) == pytest.approx((0.15, 0.45))
    # Where one end has no interval, what lies between has none.
    sections["c"] = Interval(0.5, None, None)
    found = bias_table([], [], {}, sections, Rules())[-1]
    assert found.value == Interval(pytest.approx(0.4), None, None)
