"""Judges without a model."""

from __future__ import annotations

import dataclasses

import pytest

from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.judges import judge_rows


def test_longer_by_hand(record):
    long_best = dataclasses.replace(record("a"), responses=("longer", "short"))
    long_worst = dataclasses.replace(record("b"), responses=("one", "three"))
    equal = dataclasses.replace(record("c"), responses=("same", "äöüß"))  # characters, not bytes
    records = [long_best, long_worst, equal, record("d", 1, label=0.0)]
    rows = judge_rows("longer", records)
    assert [(row.sample, row.scores) for row in rows] == [
        (-1, (6.0, 5.0)),
        (-1, (3.0, 5.0)),
        (-1, (4.0, 4.0)),
        (-1, (0.5,)),
    ]
    (greedy,) = aggregate(records, rows).methods
    assert greedy.credits(records) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5}
    assert greedy.votes.undecided(0.5).mean() == 0.5
    assert judge_rows("longer", records, rating=True)[3].scores == (10.0,)  # "response 0"


def test_random_is_chance_and_seeded(record):
    records = [record(f"r{i}", 1 + i % 4, best=0, label=float(i % 8 == 0)) for i in range(800)]
    rows = judge_rows("random", records, k=8, seed=1)
    found = aggregate(records, rows)
    for n, chance in ((1, 0.5), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)):
        credits = found.method("sample@1").credits(records)
        mine = [credits[one.id] for one in records if len(one.responses) == n]
        # 1,600 draws: four standard errors are 0.05.
        assert sum(mine) / len(mine) == pytest.approx(chance, abs=0.05)
    assert rows == judge_rows("random", records, k=8, seed=1)
    assert rows != judge_rows("random", records, k=8, seed=2)
    # What a record gets does not depend on its neighbours.
    assert rows[9 * 5 : 9 * 6] == judge_rows("random", records[5:6], k=8, seed=1)


def test_faults(record):
    with pytest.raises(ValueError, match="unknown judge 'shorter'; there are longer, random"):
        judge_rows("shorter", [record("a")])
    with pytest.raises(ValueError, match="k is -1"):
        judge_rows("random", [record("a")], k=-1)
